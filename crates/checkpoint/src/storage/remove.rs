//! Removing directories that are checkpoints no more, or never became one: never under a reader or a live writer.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::commit::sync_directory;
use super::lock::{self, Claim};
use crate::format::{MANIFEST_NAME, shard};
use crate::{Error, Result};

/// What became of a directory that was to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// It is gone, or was not there.
    Gone,
    /// Readers use it: it is as it was.
    Read,
    /// Another process writes or removes it: it is as it was.
    Written,
    /// It holds files that no checkpoint has, or is no directory: it is as it was.
    Foreign,
}

/// Removes a checkpoint or what is left of one, unless somebody uses it.
///
/// It first loses its name, then its manifest, then the rest: at no moment, under any crash, half of it can be taken for
/// a checkpoint.
///
/// # Errors
/// `Io`.
pub(crate) fn remove(dir: &Path) -> Result<Removal> {
    loop {
        match contents(dir)? {
            Contents::None => return Ok(Removal::Gone),
            Contents::Foreign => return Ok(Removal::Foreign),
            Contents::Ours => {}
        }
        let Some(manifest) = open_or_create(dir)? else { return Ok(Removal::Gone) };
        let path = dir.join(MANIFEST_NAME);
        match lock::claim(&manifest).map_err(|e| Error::io("lock", &path, &e))? {
            Claim::Read => return Ok(Removal::Read),
            Claim::Written => return Ok(Removal::Written),
            Claim::Taken => {}
        }
        if lock::is_at(&manifest, &path).map_err(|e| Error::io("stat", &path, &e))? {
            let aside = if is_aside(dir) { dir.to_owned() } else { set_aside(dir)? };
            remove_files(&aside)?;
            return Ok(Removal::Gone);
        }
    }
}

/// Gives a directory that readers use another name, under which it is no checkpoint. They read on.
pub(crate) fn set_aside(dir: &Path) -> Result<PathBuf> {
    let mut nth = 0u32;
    loop {
        let aside = aside_path(dir, nth);
        match fs::rename(dir, &aside) {
            Ok(()) => {
                sync_directory(&super::commit::parent_of(dir))?;
                return Ok(aside);
            }
            Err(e) if matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => nth += 1,
            Err(e) => return Err(Error::io("rename", dir, &e)),
        }
    }
}

/// Removes what was set aside of `target` and is not used any more. Best effort: the rest is for the next time.
pub(crate) fn remove_aside(target: &Path) {
    let existing = (0u32..).map(|nth| aside_path(target, nth)).take_while(|path| path.exists());
    for path in existing.collect::<Vec<_>>() {
        let _ = remove(&path);
    }
}

/// `step-1.old-0` beside `step-1` or `step-1.tmp`.
fn aside_path(dir: &Path, nth: u32) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = name.strip_suffix(super::commit::STAGING_SUFFIX).unwrap_or(&name);
    dir.with_file_name(format!("{name}.old-{nth}"))
}

/// The name whose directory was set aside under `name`.
pub(crate) fn aside_of(name: &str) -> Option<&str> {
    let (of, nth) = name.rsplit_once(".old-")?;
    (!nth.is_empty() && nth.bytes().all(|b| b.is_ascii_digit())).then_some(of)
}

fn is_aside(dir: &Path) -> bool {
    dir.file_name().and_then(|name| aside_of(name.to_str()?)).is_some()
}

/// The manifest of a directory, made if it has none, so that it can be locked. `None` if there is no directory.
fn open_or_create(dir: &Path) -> Result<Option<File>> {
    let path = dir.join(MANIFEST_NAME);
    match OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path) {
        Ok(manifest) => Ok(Some(manifest)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("open", &path, &e)),
    }
}

/// What lies at a path.
enum Contents {
    /// Nothing.
    None,
    /// A directory with nothing but files of a checkpoint.
    Ours,
    /// Anything else, which has the name by chance.
    Foreign,
}

fn contents(dir: &Path) -> Result<Contents> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // A link that leads nowhere is there all the same.
        Err(e) if e.kind() == ErrorKind::NotFound && dir.is_symlink() => return Ok(Contents::Foreign),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Contents::None),
        Err(e) if e.kind() == ErrorKind::NotADirectory => return Ok(Contents::Foreign),
        Err(e) => return Err(Error::io("list", dir, &e)),
    };
    // What is written in another format has our manifest beside it until it is published.
    let is_written_here = dir.join(MANIFEST_NAME).exists();
    for entry in entries {
        let name = entry.map_err(|e| Error::io("list", dir, &e))?.file_name();
        let is_ours = |name: &str| {
            name == MANIFEST_NAME || shard::is_file_name(name) || (is_written_here && is_foreign(name))
        };
        if !name.to_str().is_some_and(is_ours) {
            return Ok(Contents::Foreign);
        }
    }
    Ok(Contents::Ours)
}

/// The files of the writers of torch's and Hugging Face's formats.
fn is_foreign(name: &str) -> bool {
    let is_torch = name == ".metadata" || (name.starts_with("__") && name.ends_with(".distcp"));
    let is_hf = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    is_torch || (name.starts_with("model") && is_hf)
}

fn remove_files(dir: &Path) -> Result<()> {
    let gone = |e: io::Error| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) };
    let manifest = dir.join(MANIFEST_NAME);
    fs::remove_file(&manifest).or_else(gone).map_err(|e| Error::io("remove", &manifest, &e))?;
    fs::remove_dir_all(dir).or_else(gone).map_err(|e| Error::io("remove", dir, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(at: &Path, name: &str, files: &[&str]) -> PathBuf {
        let dir = at.join(name);
        fs::create_dir(&dir).unwrap();
        files.iter().for_each(|file| fs::write(dir.join(file), "").unwrap());
        dir
    }

    #[test]
    fn what_nobody_uses_goes_whatever_is_left_of_it() {
        let parent = tempfile::tempdir().unwrap();
        let shard = shard::file_name(0, 0, 1);
        let cases: [(&str, &[&str]); 4] = [
            ("a", &[]),
            ("b.tmp", &[MANIFEST_NAME]),
            ("c.old-3", &[&shard]),
            ("d", &[MANIFEST_NAME, &shard]),
        ];
        for (name, files) in cases {
            assert_eq!(remove(&directory(parent.path(), name, files)).unwrap(), Removal::Gone, "{name}");
        }
        assert_eq!(remove(&parent.path().join("never")).unwrap(), Removal::Gone);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn readers_and_writers_keep_it() {
        let parent = tempfile::tempdir().unwrap();
        let dir = directory(parent.path(), "a.tmp", &[]);
        let writer = lock::create(&dir).unwrap().unwrap();
        assert_eq!(remove(&dir).unwrap(), Removal::Written);
        drop(writer);
        let reader = File::open(dir.join(MANIFEST_NAME)).unwrap();
        assert_eq!(lock::share(&reader).unwrap(), lock::Share::Taken);
        assert_eq!(remove(&dir).unwrap(), Removal::Read);
        assert_eq!(set_aside(&dir).unwrap(), parent.path().join("a.old-0"));
        remove_aside(&parent.path().join("a"));
        assert!(parent.path().join("a.old-0").exists());
        drop(reader);
        remove_aside(&parent.path().join("a"));
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_of_others_is_never_removed() {
        let parent = tempfile::tempdir().unwrap();
        let dir = directory(parent.path(), "a.tmp", &["thesis.tex"]);
        assert_eq!(remove(&dir).unwrap(), Removal::Foreign);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        assert_eq!(remove(&dir.join("thesis.tex")).unwrap(), Removal::Foreign);
        let nowhere = parent.path().join("b.tmp");
        std::os::unix::fs::symlink("nowhere", &nowhere).unwrap();
        assert_eq!(remove(&nowhere).unwrap(), Removal::Foreign);
        assert!(nowhere.is_symlink());
    }
}
