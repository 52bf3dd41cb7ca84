//! A data file being written: every byte leaves tensor memory once and is checksummed on the way.
//!
//! ```text
//! file     |header|  box  |    box    |        box        |box|
//! threads  |  range 0      |   range 1       |    range 2     |     each in order, cut at multiples of 4 MiB
//! ```
//!
//! On a disk each thread copies into an aligned buffer and writes that past the page cache (`O_DIRECT`): the device
//! is the limit, and the page cache keeps what training reads. In tmpfs, and where the file system has no direct writes,
//! large pieces are written from where they lie.

mod range;

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, fallocate, fstatfs};
use sconce_dtensor::LocalTensor;

use crate::storage::pages::PAGE_BYTES;
use crate::threads::deal;
use crate::{Error, Result};

use range::{RangeWriter, SEGMENT_BYTES};

/// A box and where it lies in the file.
pub(crate) struct Piece<'t> {
    pub(crate) fqn: &'t str,
    pub(crate) tensor: &'t dyn LocalTensor,
    pub(crate) index: usize,
    pub(crate) bytes: Range<u64>,
}

/// What a data file is made of: the header, and pieces one after the other up to its end.
pub(crate) struct Contents<'t> {
    pub(crate) header: Vec<u8>,
    pub(crate) pieces: Vec<Piece<'t>>,
}

/// Files from this size on are written past the page cache, where that is possible: below it starting threads and
/// aligning costs more than it saves.
const DIRECT_BYTES: u64 = 16 << 20;
/// Direct writes in flight that reach the device's speed: measured 2.6 GB/s with one, 3.0 with four, of 4 MiB each.
const DIRECT_THREADS: u64 = 4;
/// A thread is worth starting for this much.
const BYTES_PER_THREAD: u64 = 8 << 20;
/// `TMPFS_MAGIC` of linux/magic.h: memory, where neither direct writes nor preallocation save anything.
const TMPFS: i64 = 0x0102_1994;

/// Writes a new file with `contents` and returns the checksums of its blocks; with `sync`, once it is on the device.
///
/// `threads` is how many the caller's share of the cores allows.
///
/// # Errors
/// `Io`; `Tensor` if a box cannot be read.
pub(super) fn write_file(
    path: &Path,
    contents: &Contents<'_>,
    threads: usize,
    sync: bool,
) -> Result<(u64, Vec<u32>)> {
    let len_bytes = contents.len_bytes();
    let (file, direct) = create(path, len_bytes)?;
    let wanted = if direct { DIRECT_THREADS } else { threads as u64 };
    let threads = (len_bytes / BYTES_PER_THREAD).clamp(1, wanted.max(1));
    let part = len_bytes.div_ceil(threads).next_multiple_of(SEGMENT_BYTES as u64);
    let write = |nth: usize| {
        let nth = nth as u64;
        let range = nth * part..((nth + 1) * part).min(len_bytes);
        let mut writer = RangeWriter::new(&file, path, range.start, direct);
        contents.lend(range, &mut |bytes| writer.push(bytes))?;
        writer.finish()
    };
    let n_parts = len_bytes.div_ceil(part.max(1)).max(1) as usize;
    let crcs = deal(n_parts, n_parts, write)?;
    if direct && !len_bytes.is_multiple_of(PAGE_BYTES as u64) {
        // Direct writes are whole pages.
        file.set_len(len_bytes).map_err(|e| Error::io("set the length of", path, &e))?;
    }
    if sync {
        file.sync_all().map_err(|e| Error::io("sync", path, &e))?;
    }
    Ok((len_bytes, crcs.concat()))
}

/// The new file, room for it, and whether it is written past the page cache.
fn create(path: &Path, len_bytes: u64) -> Result<(File, bool)> {
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    let file = file.map_err(|e| Error::io("create", path, &e))?;
    let kind = fstatfs(&file).map_err(|e| Error::io("stat", path, &e.into()))?;
    if kind.f_type as i64 == TMPFS {
        return Ok((file, false));
    }
    reserve(&file, len_bytes).map_err(|e| Error::io("allocate", path, &e))?;
    if len_bytes < DIRECT_BYTES {
        return Ok((file, false));
    }
    // A file system without direct writes refuses the flag.
    let direct = OpenOptions::new().write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path);
    Ok(direct.map_or((file, false), |direct| (direct, true)))
}

/// Takes the room of the whole file at once: a full disk is noticed before anything is written.
fn reserve(file: &File, len_bytes: u64) -> io::Result<()> {
    if len_bytes == 0 {
        return Ok(());
    }
    // With the size set, direct writes of several threads do not wait for each other to lengthen the file.
    match fallocate(file, FallocateFlags::empty(), 0, len_bytes) {
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl Contents<'_> {
    pub(crate) fn len_bytes(&self) -> u64 {
        self.pieces.last().map_or(self.header.len() as u64, |piece| piece.bytes.end)
    }

    /// Lends the bytes of a range of the file in order, in pieces as they lie in memory.
    pub(crate) fn lend(&self, range: Range<u64>, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let header = self.header.len() as u64;
        if range.start < header {
            write(&self.header[range.start as usize..range.end.min(header) as usize])?;
        }
        let first = self.pieces.partition_point(|piece| piece.bytes.end <= range.start);
        for piece in self.pieces[first..].iter().take_while(|piece| piece.bytes.start < range.end) {
            piece.lend(&range, write)?;
        }
        Ok(())
    }
}

impl Piece<'_> {
    /// Lends what of the box lies in a range of the file.
    pub(super) fn lend(&self, range: &Range<u64>, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (start, len) = (self.bytes.start, (self.bytes.end - self.bytes.start) as usize);
        let from = (range.start.max(start) - start) as usize;
        let to = (range.end.min(self.bytes.end) - start) as usize;
        let (mut outcome, mut count) = (Ok(()), 0);
        let lent = self.tensor.read_box_range(self.index, from..to, &mut |bytes| {
            count += bytes.len();
            if outcome.is_ok() {
                outcome = write(bytes);
            }
        });
        lent.map_err(|error| Error::tensor(self.fqn, &error))?;
        if outcome.is_ok() && count != to - from {
            return Err(Error::Tensor {
                fqn: self.fqn.to_owned(),
                cause: format!("bytes {from}..{to} of {len} of box {} are {count}", self.index),
            });
        }
        outcome
    }
}

#[cfg(test)]
mod tests;
