//! A range of a file or of memory that is read at positions.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Result};

/// Bytes `start..start + len` of a source; positions count from `start`.
#[derive(Debug, Clone)]
pub(crate) struct Region {
    source: Source,
    path: Arc<Path>,
    start: u64,
    len: u64,
}

#[derive(Debug, Clone)]
enum Source {
    File(Arc<File>),
    Memory(Arc<Vec<u8>>),
}

impl Region {
    /// A whole regular file. A link, which no checkpoint of torch's holds, is refused unless `follow`.
    pub(crate) fn open(path: &Path, follow: bool) -> Result<Self> {
        let look = if follow { std::fs::metadata(path) } else { std::fs::symlink_metadata(path) };
        let found = look.map_err(|e| Error::io("open", path, &e))?;
        if !found.is_file() {
            let what = if found.is_symlink() { "a symbolic link" } else { "no regular file" };
            return Err(Error::refused(path, 0, what));
        }
        let file = File::open(path).map_err(|e| Error::io("open", path, &e))?;
        let len = file.metadata().map_err(|e| Error::io("stat", path, &e))?.len();
        Ok(Self { source: Source::File(Arc::new(file)), path: path.into(), start: 0, len })
    }

    /// Bytes in memory that were made from the file at `path`.
    #[cfg_attr(
        not(feature = "torch"),
        expect(dead_code, reason = "only torch's files hold what must be unpacked")
    )]
    pub(crate) fn of_memory(bytes: Vec<u8>, path: &Path) -> Self {
        let len = bytes.len() as u64;
        Self { source: Source::Memory(Arc::new(bytes)), path: path.into(), start: 0, len }
    }

    /// A part of this region; `None` if it is not inside.
    pub(crate) fn part(&self, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (end <= self.len).then(|| Self { start: self.start + start, len, ..self.clone() })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The file, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn owned_path(&self) -> PathBuf {
        self.path.to_path_buf()
    }

    /// Where the region begins in its file or memory.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Copies bytes from `offset` on to `to`, all of it or an error.
    pub(crate) fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        self.read_io(offset, to).map_err(|e| Error::io("read", &self.path, &e))
    }

    /// The bytes of the whole region; the caller has looked at its length.
    pub(crate) fn read_all(&self) -> Result<Vec<u8>> {
        let len = usize::try_from(self.len)
            .map_err(|_| Error::refused(&self.path, self.start, "more than memory holds"))?;
        let mut bytes = vec![0; len];
        self.read(0, &mut bytes)?;
        Ok(bytes)
    }

    fn read_io(&self, offset: u64, to: &mut [u8]) -> IoResult<()> {
        let end = offset.checked_add(to.len() as u64).filter(|end| *end <= self.len);
        let end = end.ok_or_else(|| IoError::from(ErrorKind::UnexpectedEof))?;
        match &self.source {
            Source::File(file) => file.read_exact_at(to, self.start + offset),
            Source::Memory(bytes) => {
                to.copy_from_slice(&bytes[(self.start + offset) as usize..(self.start + end) as usize]);
                Ok(())
            }
        }
    }
}

#[cfg(feature = "torch")]
impl rawzip::ReaderAt for Region {
    fn read_at(&self, to: &mut [u8], offset: u64) -> IoResult<usize> {
        let len = self.len.saturating_sub(offset).min(to.len() as u64) as usize;
        self.read_io(offset, &mut to[..len])?;
        Ok(len)
    }
}

/// Reads a region from its beginning to its end.
#[cfg_attr(
    not(feature = "torch"),
    expect(dead_code, reason = "only torch's files hold what must be unpacked")
)]
pub(crate) struct Sequential {
    pub(crate) region: Region,
    pub(crate) at: u64,
}

impl std::io::Read for Sequential {
    fn read(&mut self, to: &mut [u8]) -> IoResult<usize> {
        let len = (self.region.len - self.at).min(to.len() as u64) as usize;
        self.region.read_io(self.at, &mut to[..len])?;
        self.at += len as u64;
        Ok(len)
    }
}
