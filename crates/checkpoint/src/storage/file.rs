//! A data file being written: bytes in order, and a checksum of every block on the way.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::metadata::BLOCK_BYTES;
use crate::{Error, Result};

/// Small pieces are collected up to this size; larger ones are written from where they lie.
const BUFFER_BYTES: usize = 1 << 20;

/// Writes one new file.
pub(crate) struct BlockWriter {
    path: PathBuf,
    file: File,
    pending: Vec<u8>,
    len_bytes: u64,
    crcs: Vec<u32>,
    crc: crc32fast::Hasher,
}

impl BlockWriter {
    /// Creates `path`, which must not exist.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::io("create", path, &e))?;
        let (pending, crc) = (Vec::new(), crc32fast::Hasher::new());
        Ok(Self { path: path.to_owned(), file, pending, len_bytes: 0, crcs: Vec::new(), crc })
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.checksum(bytes);
        if self.pending.len() + bytes.len() <= BUFFER_BYTES {
            self.pending.extend_from_slice(bytes);
            return Ok(());
        }
        self.flush()?;
        if bytes.len() >= BUFFER_BYTES {
            return self.file.write_all(bytes).map_err(|e| Error::io("write", &self.path, &e));
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }

    /// Ends the file; with `sync`, returns once it is on the device. Length and checksums of its blocks.
    pub(crate) fn finish(mut self, sync: bool) -> Result<(u64, Vec<u32>)> {
        self.flush()?;
        if sync {
            self.file.sync_all().map_err(|e| Error::io("sync", &self.path, &e))?;
        }
        if !self.len_bytes.is_multiple_of(BLOCK_BYTES) {
            self.crcs.push(self.crc.finalize());
        }
        Ok((self.len_bytes, self.crcs))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all(&self.pending).map_err(|e| Error::io("write", &self.path, &e))?;
        self.pending.clear();
        Ok(())
    }

    fn checksum(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = (BLOCK_BYTES - self.len_bytes % BLOCK_BYTES) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.crc.update(now);
            self.len_bytes += now.len() as u64;
            if self.len_bytes.is_multiple_of(BLOCK_BYTES) {
                self.crcs.push(std::mem::take(&mut self.crc).finalize());
            }
            bytes = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_checked_whatever_the_pieces_were() {
        let all: Vec<u8> = (0..5 * BLOCK_BYTES / 2 + 17).map(|i| ((i * i) >> 7) as u8).collect();
        let dir = tempfile::tempdir().unwrap();
        for (nth, piece) in [1000, 700_001, BLOCK_BYTES as usize, all.len()].into_iter().enumerate() {
            let path = dir.path().join(nth.to_string());
            let mut writer = BlockWriter::create(&path).unwrap();
            all.chunks(piece).for_each(|bytes| writer.write(bytes).unwrap());
            let (len_bytes, crcs) = writer.finish(false).unwrap();
            assert_eq!(len_bytes, all.len() as u64);
            assert_eq!(crcs, all.chunks(BLOCK_BYTES as usize).map(crc32fast::hash).collect::<Vec<_>>());
            assert_eq!(std::fs::read(&path).unwrap(), all);
        }
    }
}
