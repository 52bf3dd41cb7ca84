//! A data file of the local file system being read: its length checked, its bytes lent in pieces.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::path::Arg;

use super::DataFile;
#[cfg(feature = "mmap")]
use super::mmap::Mapping;
use crate::{Error, Result};

/// How data files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    #[cfg(feature = "mmap")]
    mapped: bool,
}

/// A file of the local file system, open for reading.
pub struct LocalFile {
    path: PathBuf,
    bytes: Bytes,
}

enum Bytes {
    Positional(File),
    #[cfg(feature = "mmap")]
    Mapped(Mapping),
}

impl Access {
    /// Reads at positions into memory of this process: right for every file and every file system.
    pub fn positional() -> Self {
        Self::default()
    }

    #[cfg(feature = "mmap")]
    pub(super) fn of_mapped_files() -> Self {
        Self { mapped: true }
    }
}

impl LocalFile {
    /// Opens a file that is `len_bytes` long.
    ///
    /// # Errors
    /// `Io`, `Length`.
    pub fn open(path: impl Into<PathBuf>, len_bytes: u64, access: Access) -> Result<Self> {
        let path = path.into();
        let file = open_regular(CWD, &path).map_err(|e| Error::io("open", &path, &e))?;
        Self::of(file, path, len_bytes, access)
    }

    /// A file that is open; `path` is its name in messages.
    pub(super) fn of(file: File, path: PathBuf, len_bytes: u64, access: Access) -> Result<Self> {
        let io = |op: &str, error: &std::io::Error| Error::io(op, &path, error);
        let got = file.metadata().map_err(|e| io("stat", &e))?.len();
        if got != len_bytes {
            return Err(Error::Length { path, expected: len_bytes, got });
        }
        let bytes = access.open(file).map_err(|e| io("map", &e))?;
        Ok(Self { path, bytes })
    }
}

/// Opens a file of which nothing is believed: one that is not regular is an error. A pipe would keep us waiting for a writer.
pub(super) fn open_regular(dir: impl AsFd, path: impl Arg) -> std::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(dir, path, flags, Mode::empty())?);
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"))
}

impl DataFile for LocalFile {
    fn read_at(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()> {
        let read = match &self.bytes {
            Bytes::Positional(file) => file.read_exact_at(to, offset_bytes),
            #[cfg(feature = "mmap")]
            Bytes::Mapped(mapping) => mapping.read(offset_bytes, to),
        };
        read.map_err(|e| Error::io("read", &self.path, &e))
    }

    fn mapped(&self) -> Option<&[u8]> {
        match &self.bytes {
            Bytes::Positional(_) => None,
            #[cfg(feature = "mmap")]
            Bytes::Mapped(mapping) => Some(mapping.bytes()),
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(feature = "mmap")]
impl Access {
    fn open(self, file: File) -> std::io::Result<Bytes> {
        if self.mapped {
            super::mmap::map_as_promised(&file).map(Bytes::Mapped)
        } else {
            Ok(Bytes::Positional(file))
        }
    }
}

#[cfg(not(feature = "mmap"))]
impl Access {
    fn open(self, file: File) -> std::io::Result<Bytes> {
        Ok(Bytes::Positional(file))
    }
}
