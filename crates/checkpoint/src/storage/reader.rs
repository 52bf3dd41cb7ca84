//! A data file being read: its length and blocks checked, its bytes lent in pieces.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

#[cfg(feature = "mmap")]
use super::mmap::Mapping;
use crate::metadata::{BLOCK_BYTES, FileMetadata};
use crate::{Error, Result};

/// How data files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    #[cfg(feature = "mmap")]
    mapped: bool,
}

/// One data file of a checkpoint, open.
pub(crate) struct ShardReader {
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

impl ShardReader {
    /// Opens a file that is as long as the manifest says.
    ///
    /// # Errors
    /// `Io`, `Length`.
    pub(crate) fn open(dir: &Path, meta: &FileMetadata, access: Access) -> Result<Self> {
        let path = dir.join(&meta.name);
        let io = |op: &str, error: &std::io::Error| Error::io(op, &path, error);
        let file = File::open(&path).map_err(|e| io("open", &e))?;
        let got = file.metadata().map_err(|e| io("stat", &e))?.len();
        if got != meta.len_bytes {
            return Err(Error::Length { path, expected: meta.len_bytes, got });
        }
        let bytes = access.open(file).map_err(|e| io("map", &e))?;
        Ok(Self { path, bytes })
    }

    /// Copies the bytes from `offset_bytes` on to `to`.
    pub(crate) fn read(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()> {
        let read = match &self.bytes {
            Bytes::Positional(file) => file.read_exact_at(to, offset_bytes),
            #[cfg(feature = "mmap")]
            Bytes::Mapped(mapping) => mapping.read(offset_bytes, to),
        };
        read.map_err(|e| Error::io("read", &self.path, &e))
    }

    /// Compares the checksum of one block with the manifest's.
    ///
    /// # Errors
    /// `Corrupt` naming file and block.
    pub(crate) fn verify_block(&self, meta: &FileMetadata, block: usize, buffer: &mut Vec<u8>) -> Result<()> {
        let start = block as u64 * BLOCK_BYTES;
        let len = (meta.len_bytes - start).min(BLOCK_BYTES) as usize;
        let (expected, got) = (meta.block_crcs[block], self.crc(start, len, buffer)?);
        if got == expected {
            return Ok(());
        }
        Err(Error::Corrupt {
            path: self.path.clone(),
            what: format!("block {block}"),
            offset_bytes: start,
            expected: format!("CRC32 {expected:08x}"),
            got: format!("CRC32 {got:08x}"),
        })
    }

    fn crc(&self, start: u64, len: usize, buffer: &mut Vec<u8>) -> Result<u32> {
        #[cfg(feature = "mmap")]
        if let Bytes::Mapped(mapping) = &self.bytes {
            let hash = mapping.slice(start, len).map(crc32fast::hash);
            return hash.map_err(|e| Error::io("read", &self.path, &e));
        }
        buffer.resize(len, 0);
        self.read(start, buffer)?;
        Ok(crc32fast::hash(buffer))
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
