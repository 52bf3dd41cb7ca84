//! The only place that publishes: a directory is written beside its target and takes its place by one rename.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::format::MANIFEST_NAME;
use crate::{Error, Result};

/// What stands where a checkpoint is to be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Free,
    EmptyDirectory,
    Checkpoint,
    Other,
}

/// Makes the directory in which the checkpoint at `target` is written, after checking that it may take its place.
///
/// # Errors
/// `AlreadyExists`: a checkpoint without `overwrite`, or anything else that is not an empty directory.
pub(crate) fn prepare(target: &Path, overwrite: bool) -> Result<PathBuf> {
    let found = look(target)?;
    if found == Target::Other || (found == Target::Checkpoint && !overwrite) {
        let is_checkpoint = found == Target::Checkpoint;
        return Err(Error::AlreadyExists { path: target.to_owned(), is_checkpoint });
    }
    let parent = parent_of(target);
    fs::create_dir_all(&parent).map_err(|e| Error::io("create directory", &parent, &e))?;
    let mut nth = 0u32;
    loop {
        let staging = staging_name(target, nth);
        match fs::create_dir(&staging) {
            Ok(()) => return Ok(staging),
            // Left by a save that died, or in use by another.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => nth += 1,
            Err(e) => return Err(Error::io("create directory", &staging, &e)),
        }
    }
}

/// Puts `staging` in the place of `target`: after it, under any crash, the old or the new checkpoint is there.
pub(crate) fn publish(staging: &Path, target: &Path, sync: bool) -> Result<()> {
    if sync {
        sync_directory(staging)?;
    }
    let exchange = look(target)? != Target::Free;
    let flags = if exchange { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
    renameat_with(CWD, staging, CWD, target, flags)
        .map_err(|errno| Error::io("rename to", target, &io::Error::from(errno)))?;
    if sync {
        sync_directory(&parent_of(target))?;
    }
    if exchange {
        discard(staging);
    }
    Ok(())
}

/// Removes a directory that is no checkpoint any more, or never was. Best effort: what is left carries `.tmp-` in its
/// name and is never taken for a checkpoint.
pub(crate) fn discard(staging: &Path) {
    let _ = fs::remove_dir_all(staging);
}

fn look(target: &Path) -> Result<Target> {
    let io = |e: &io::Error| Error::io("look at", target, e);
    match fs::symlink_metadata(target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Target::Free),
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

fn parent_of(target: &Path) -> PathBuf {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn staging_name(target: &Path, nth: u32) -> PathBuf {
    let mut name = target.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(format!(".tmp-{}-{nth}", std::process::id()));
    parent_of(target).join(name)
}

fn sync_directory(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|e| Error::io("sync directory", dir, &e))
}
