//! The only place that publishes: a directory is written beside its target and takes its place by one rename.
//!
//! `<name>.tmp` is the one place in which `<name>` is written, and its manifest, made first and filled last, is locked
//! by whoever writes it: a second writer is refused, and what a dead one left is told from what a live one works on.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::lock;
use super::remove::{Removal, remove, remove_aside, set_aside};
use crate::format::MANIFEST_NAME;
use crate::{Error, Result};

/// What is added to a checkpoint's name while it is written.
pub(crate) const STAGING_SUFFIX: &str = ".tmp";

/// How often a directory that another process makes and removes meanwhile is tried again.
const ATTEMPTS: usize = 100;

/// A directory being written, and the lock on it.
#[derive(Debug)]
pub(crate) struct Staging {
    dir: PathBuf,
    manifest: File,
}

/// What stands where a checkpoint is to be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Free,
    EmptyDirectory,
    Checkpoint,
    Other,
}

impl Staging {
    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Fills the manifest, the last file of a checkpoint.
    pub(crate) fn write_manifest(&mut self, bytes: &[u8], sync: bool) -> Result<()> {
        let path = self.dir.join(MANIFEST_NAME);
        self.manifest.write_all(bytes).map_err(|e| Error::io("write", &path, &e))?;
        if sync {
            self.manifest.sync_all().map_err(|e| Error::io("sync", &path, &e))?;
        }
        Ok(())
    }
}

/// Makes the directory in which the checkpoint at `target` is written, after checking that it may take its place.
///
/// # Errors
/// `AlreadyExists`: a checkpoint without `overwrite`, or anything else that is not an empty directory. `Busy`: another
/// process saves to the same target.
pub(crate) fn prepare(target: &Path, overwrite: bool, sync: bool) -> Result<Staging> {
    let found = look(target)?;
    if found == Target::Other || (found == Target::Checkpoint && !overwrite) {
        let is_checkpoint = found == Target::Checkpoint;
        return Err(Error::AlreadyExists { path: target.to_owned(), is_checkpoint });
    }
    create_parents(&parent_of(target), sync)?;
    remove_aside(target);
    let dir = staging_path(target);
    for _ in 0..ATTEMPTS {
        match fs::create_dir(&dir) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => match remove(&dir)? {
                Removal::Written => break,
                Removal::Read => set_aside(&dir).map(drop)?,
                Removal::Foreign => return Err(Error::AlreadyExists { path: dir, is_checkpoint: false }),
                Removal::Gone => {}
            },
            Err(e) => return Err(Error::io("create directory", &dir, &e)),
        }
        if let Some(manifest) = lock::create(&dir)? {
            return Ok(Staging { dir, manifest });
        }
    }
    Err(Error::Busy { path: target.to_owned() })
}

/// Puts `staging` in the place of `target`: after it, under any crash, the old or the new checkpoint is there.
pub(crate) fn publish(staging: Staging, target: &Path, sync: bool) -> Result<()> {
    let replaced = match sync_and_rename(&staging.dir, target, sync) {
        Ok(replaced) => replaced,
        Err(error) => {
            abandon(staging);
            return Err(error);
        }
    };
    if sync {
        sync_directory(&parent_of(target))?;
    }
    let Staging { dir, manifest } = staging;
    // Readers of the new checkpoint wait no longer; the one that it replaced is under the staging name now.
    drop(manifest);
    if replaced {
        discard(&dir);
    }
    Ok(())
}

/// As [`publish`], for a directory of another format, which has no manifest.
pub(crate) fn publish_foreign(staging: Staging, target: &Path) -> Result<()> {
    let manifest = staging.dir.join(MANIFEST_NAME);
    match fs::remove_file(&manifest) {
        Ok(()) => publish(staging, target, true),
        Err(e) => {
            abandon(staging);
            Err(Error::io("remove", &manifest, &e))
        }
    }
}

/// Puts one file of `staging` in the place of `target`, at which nothing may be.
pub(crate) fn publish_file(staging: Staging, name: &str, target: &Path) -> Result<()> {
    let renamed = renameat_with(CWD, staging.dir.join(name), CWD, target, RenameFlags::NOREPLACE);
    abandon(staging);
    renamed.map_err(|errno| Error::io("rename to", target, &io::Error::from(errno)))?;
    sync_directory(&parent_of(target))
}

/// Whether a checkpoint was replaced; it has the name of `staging` then.
fn sync_and_rename(staging: &Path, target: &Path, sync: bool) -> Result<bool> {
    if sync {
        sync_directory(staging)?;
    }
    if look(target)? == Target::Checkpoint {
        renameat_with(CWD, staging, CWD, target, RenameFlags::EXCHANGE)
            .map_err(|errno| Error::io("exchange with", target, &io::Error::from(errno)))?;
        return Ok(true);
    }
    // A rename never replaces a directory that is not empty: it cannot destroy what came since the look.
    fs::rename(staging, target).map_err(|e| Error::io("rename to", target, &e))?;
    Ok(false)
}

/// Gives up a save.
pub(crate) fn abandon(staging: Staging) {
    let Staging { dir, manifest } = staging;
    drop(manifest);
    discard(&dir);
}

/// Removes a directory that is no checkpoint any more, or never was. Best effort: what is left is under a name that is
/// never taken for a checkpoint's, and the next save removes it.
fn discard(dir: &Path) {
    if matches!(remove(dir), Ok(Removal::Read)) {
        let _ = set_aside(dir);
    }
}

fn look(target: &Path) -> Result<Target> {
    let io = |e: &io::Error| Error::io("look at", target, e);
    match fs::symlink_metadata(target) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Target::Free),
        Err(e) => return Err(io(&e)),
        Ok(found) if !found.is_dir() => return Ok(Target::Other),
        Ok(_) => {}
    }
    if target.join(MANIFEST_NAME).is_file() {
        return Ok(Target::Checkpoint);
    }
    let is_empty = fs::read_dir(target).map_err(|e| io(&e))?.next().is_none();
    Ok(if is_empty { Target::EmptyDirectory } else { Target::Other })
}

/// Creates a directory and those above it; with `sync`, so that a crash of the machine does not take them back.
fn create_parents(dir: &Path, sync: bool) -> Result<()> {
    let is_new = |dir: &&Path| !dir.as_os_str().is_empty() && !dir.exists();
    let new: Vec<&Path> = dir.ancestors().take_while(is_new).collect();
    fs::create_dir_all(dir).map_err(|e| Error::io("create directory", dir, &e))?;
    if !sync {
        return Ok(());
    }
    new.into_iter().rev().try_for_each(|dir| sync_directory(&parent_of(dir)))
}

pub(crate) fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Where the checkpoint at `target` is written.
pub(crate) fn staging_path(target: &Path) -> PathBuf {
    let mut name = target.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(STAGING_SUFFIX);
    target.with_file_name(name)
}

pub(crate) fn sync_directory(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|e| Error::io("sync directory", dir, &e))
}
