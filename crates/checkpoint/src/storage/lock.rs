//! Locks between processes: a directory's manifest is its lock file. Whoever writes, publishes or removes the directory
//! holds it exclusively, whoever reads from it shares it.
//!
//! The locks are flock's: they end with the process that holds them, so that what a dead one left is told from what a
//! live one works on, without guessing by age. A file system without locks protects nobody, and therefore nothing is
//! removed there that somebody might use.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::format::MANIFEST_NAME;
use crate::{Error, Result};

/// What an attempt to take a manifest exclusively found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// It is the caller's now, until the file is closed.
    Taken,
    /// Others read from the directory, or the file system has no locks and they might.
    Read,
    /// Another process writes or removes the directory.
    Written,
}

/// What an attempt to share a manifest found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    /// It is shared until the file is closed, or the file system has no locks.
    Taken,
    /// Its checkpoint was removed.
    Removed,
    /// Another process publishes or removes the directory.
    Written,
}

/// Tries to take an open manifest exclusively; does not wait.
pub(crate) fn claim(manifest: &File) -> io::Result<Claim> {
    match manifest.try_lock() {
        Ok(()) => Ok(Claim::Taken),
        Err(TryLockError::Error(e)) if is_unsupported(&e) => Ok(Claim::Read),
        Err(TryLockError::Error(e)) => Err(e),
        Err(TryLockError::WouldBlock) => match manifest.try_lock_shared() {
            Ok(()) => manifest.unlock().map(|()| Claim::Read),
            Err(TryLockError::WouldBlock) => Ok(Claim::Written),
            Err(TryLockError::Error(e)) => Err(e),
        },
    }
}

/// Creates the manifest of a new directory and takes it; `None` if another process was faster.
pub(crate) fn create(dir: &Path) -> Result<Option<File>> {
    let path = dir.join(MANIFEST_NAME);
    let io = |op: &str, e: &io::Error| Error::io(op, &path, e);
    let manifest = match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
        Ok(manifest) => manifest,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => return Ok(None),
        Err(e) => return Err(io("create", &e)),
    };
    // Between its creation and the lock a cleaner may have taken it; between the two looks, removed it.
    let claim = claim(&manifest).map_err(|e| io("lock", &e))?;
    let is_mine = claim != Claim::Written && is_at(&manifest, &path).map_err(|e| io("stat", &e))?;
    Ok(is_mine.then_some(manifest))
}

/// Tries to share an open manifest: while the file is open, nobody removes its directory. Does not wait.
pub(crate) fn share(manifest: &File) -> io::Result<Share> {
    match manifest.try_lock_shared() {
        // The file of a checkpoint that was removed before the lock is one without a name.
        Ok(()) if manifest.metadata()?.nlink() == 0 => Ok(Share::Removed),
        Ok(()) => Ok(Share::Taken),
        Err(TryLockError::WouldBlock) => Ok(Share::Written),
        Err(TryLockError::Error(e)) if is_unsupported(&e) => Ok(Share::Taken),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

/// Whether the open file is the one that the path names.
pub(crate) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let mine = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (mine.dev(), mine.ino())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let unsupported = [Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOLCK];
    error.raw_os_error().is_some_and(|code| unsupported.iter().any(|errno| errno.raw_os_error() == code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let dir = tempfile::tempdir().unwrap();
        let writer = create(dir.path()).unwrap().unwrap();
        assert!(create(dir.path()).unwrap().is_none());
        let path = dir.path().join(MANIFEST_NAME);
        let other = File::open(&path).unwrap();
        assert_eq!(claim(&other).unwrap(), Claim::Written);
        drop(writer);
        let readers = [File::open(&path).unwrap(), File::open(&path).unwrap()];
        assert!(readers.iter().all(|reader| share(reader).unwrap() == Share::Taken));
        assert_eq!(claim(&other).unwrap(), Claim::Read);
        drop(readers);
        assert_eq!(claim(&other).unwrap(), Claim::Taken);
    }

    #[test]
    fn a_reader_that_comes_during_a_removal_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let remover = create(dir.path()).unwrap().unwrap();
        let path = dir.path().join(MANIFEST_NAME);
        let reader = File::open(&path).unwrap();
        assert_eq!(share(&reader).unwrap(), Share::Written);
        fs::remove_file(&path).unwrap();
        drop(remover);
        assert_eq!(share(&reader).unwrap(), Share::Removed);
    }
}
