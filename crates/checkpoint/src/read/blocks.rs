//! Blocks of data files: sets of them, and the few that a thread has verified last.

use std::path::Path;

use super::runs::{ItemRuns, ReadRun};
use crate::metadata::{BLOCK_BYTES, FileMetadata, Metadata};
use crate::storage::{DataFile, PageBuffer};
use crate::{Error, Result};

/// A set of blocks. Files without checksums have none that could be in it.
#[derive(Debug, Clone)]
pub(super) struct Marks(Vec<Vec<bool>>);

impl Marks {
    /// The empty set.
    pub(super) fn none(metadata: &Metadata) -> Self {
        let blocks = |file: &FileMetadata| vec![false; file.block_crcs.as_ref().map_or(0, Vec::len)];
        Self(metadata.files.iter().map(blocks).collect())
    }

    /// Every block with a checksum of the files that are read.
    #[cfg(feature = "cli")]
    pub(super) fn all_of(metadata: &Metadata, is_read: &[bool]) -> Self {
        let blocks = |(file, is_read): (&FileMetadata, &bool)| {
            vec![true; file.block_crcs.as_ref().filter(|_| *is_read).map_or(0, Vec::len)]
        };
        Self(metadata.files.iter().zip(is_read).map(blocks).collect())
    }

    /// Adds a block of a file with checksums.
    pub(super) fn insert(&mut self, file: usize, block: usize) {
        if let Some(mark) = self.0[file].get_mut(block) {
            *mark = true;
        }
    }

    /// The blocks of a file of that length as ranges of bytes, as long as they can be.
    pub(super) fn ranges_of(&self, file: usize, len_bytes: u64) -> Vec<std::ops::Range<u64>> {
        let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
        for (block, _) in self.0[file].iter().enumerate().filter(|(_, is_marked)| **is_marked) {
            let start = block as u64 * BLOCK_BYTES;
            let end = (start + BLOCK_BYTES).min(len_bytes);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// Whether a block is in the set.
    pub(super) fn contains(&self, file: usize, block: usize) -> bool {
        self.0[file].get(block) == Some(&true)
    }

    /// The blocks as (file, block), in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, usize)> {
        let of_file = |(file, marks)| {
            let blocks = <Vec<bool> as AsRef<[bool]>>::as_ref(marks).iter().enumerate();
            blocks.filter(|(_, is_marked)| **is_marked).map(move |(block, _)| (file, block))
        };
        self.0.iter().enumerate().flat_map(of_file)
    }

    /// Calls `each` with the pieces of a run that lie in marked blocks, cut at the blocks' ends.
    pub(super) fn marked(
        &self,
        run: ReadRun,
        mut each: impl FnMut(usize, ReadRun) -> Result<()>,
    ) -> Result<()> {
        let marks = &self.0[run.file];
        let (first, last) = blocks_of(&run);
        let in_file = first..(last + 1).min(marks.len());
        in_file.filter(|block| marks[*block]).try_for_each(|block| {
            let start = block as u64 * BLOCK_BYTES;
            each(block, run.within(start, start + BLOCK_BYTES))
        })
    }

    /// Calls `each` with the pieces of a run that lie outside of marked blocks, as long as they can be.
    pub(super) fn unmarked(&self, run: ReadRun, mut each: impl FnMut(ReadRun) -> Result<()>) -> Result<()> {
        let marks = &self.0[run.file];
        let (first, last) = blocks_of(&run);
        let mut start = run.offset_bytes;
        let in_file = first..(last + 1).min(marks.len());
        for block in in_file.filter(|block| marks[*block]) {
            let end = block as u64 * BLOCK_BYTES;
            if start < end {
                each(run.within(start, end))?;
            }
            start = end + BLOCK_BYTES;
        }
        let end = run.offset_bytes + run.len_bytes as u64;
        if start < end { each(run.within(start, end)) } else { Ok(()) }
    }
}

/// How many bytes of each block a rank wants. Files without checksums have no blocks.
#[derive(Debug)]
pub(super) struct Wants(Vec<Vec<u32>>);

impl Wants {
    /// Nothing.
    pub(super) fn none(metadata: &Metadata) -> Self {
        let blocks = |file: &FileMetadata| vec![0; file.block_crcs.as_ref().map_or(0, Vec::len)];
        Self(metadata.files.iter().map(blocks).collect())
    }

    /// Adds the bytes of an item.
    pub(super) fn add(&mut self, runs: &ItemRuns) {
        let blocks = &mut self.0[runs.file()];
        for block in runs.blocks() {
            if let Some(bytes) = blocks.get_mut(block) {
                *bytes = bytes.saturating_add(runs.in_block(block).len() as u32);
            }
        }
    }

    /// The blocks of which anything is wanted as (file, block, bytes), in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, usize, u32)> {
        let of_file = |(file, blocks)| {
            let blocks = <Vec<u32> as AsRef<[u32]>>::as_ref(blocks).iter().copied().enumerate();
            blocks.filter(|(_, bytes)| *bytes > 0).map(move |(block, bytes)| (file, block, bytes))
        };
        self.0.iter().enumerate().flat_map(of_file)
    }

    /// The blocks of which anything is wanted.
    pub(super) fn marks(&self) -> Marks {
        Marks(self.0.iter().map(|blocks| blocks.iter().map(|bytes| *bytes > 0).collect()).collect())
    }
}

/// The first and the last block of a run, which is not empty.
fn blocks_of(run: &ReadRun) -> (usize, usize) {
    let last_byte = run.offset_bytes + run.len_bytes as u64 - 1;
    ((run.offset_bytes / BLOCK_BYTES) as usize, (last_byte / BLOCK_BYTES) as usize)
}

/// The blocks that a thread verified last: small tensors share one, and boxes that come from several files alternate.
#[derive(Default)]
pub(crate) struct Verified {
    /// The latest first.
    recent: Vec<Block>,
}

#[derive(Default)]
struct Block {
    file: usize,
    block: usize,
    /// Empty if the file is mapped.
    bytes: PageBuffer,
}

/// Blocks that a thread keeps.
const KEPT: usize = 4;

impl Verified {
    /// The bytes of a block whose checksum is right.
    ///
    /// # Errors
    /// `Corrupt` naming file and block; `Io`.
    pub(crate) fn block<'b>(
        &'b mut self,
        file: usize,
        block: usize,
        meta: &FileMetadata,
        data: &'b dyn DataFile,
    ) -> Result<&'b [u8]> {
        if let Some(at) = self.recent.iter().position(|kept| (kept.file, kept.block) == (file, block)) {
            self.recent[..=at].rotate_right(1);
        } else {
            let mut bytes = if self.recent.len() < KEPT { PageBuffer::default() } else { self.take_oldest() };
            read_block(block, meta, data, &mut bytes)?;
            self.recent.insert(0, Block { file, block, bytes });
        }
        Ok(block_bytes(block, meta, data, &self.recent[0].bytes))
    }

    fn take_oldest(&mut self) -> PageBuffer {
        self.recent.pop().unwrap_or_default().bytes
    }
}

/// Reads a block, unless its file is mapped, and compares its checksum; [`block_bytes`] are its bytes then.
///
/// # Errors
/// `Corrupt` naming file and block; `Io`.
pub(super) fn read_block(
    block: usize,
    meta: &FileMetadata,
    data: &dyn DataFile,
    buffer: &mut PageBuffer,
) -> Result<()> {
    if data.mapped().is_none() {
        let range = range_of(block, meta);
        data.read_at(range.start, buffer.resized((range.end - range.start) as usize))?;
    }
    check_block(meta, block, block_bytes(block, meta, data, buffer), data.path())
}

/// The bytes of a block that was read.
pub(super) fn block_bytes<'b>(
    block: usize,
    meta: &FileMetadata,
    data: &'b dyn DataFile,
    buffer: &'b PageBuffer,
) -> &'b [u8] {
    let range = range_of(block, meta);
    data.mapped().map_or(buffer.bytes(), |bytes| &bytes[range.start as usize..range.end as usize])
}

fn range_of(block: usize, meta: &FileMetadata) -> std::ops::Range<u64> {
    let start = block as u64 * BLOCK_BYTES;
    start..(start + BLOCK_BYTES).min(meta.len_bytes)
}

/// Compares the checksum of a block.
pub(crate) fn check_block(meta: &FileMetadata, block: usize, bytes: &[u8], path: &Path) -> Result<()> {
    let expected = meta.block_crcs.as_ref().and_then(|crcs| crcs.get(block).copied());
    let got = crc32fast::hash(bytes);
    if expected == Some(got) {
        return Ok(());
    }
    Err(Error::Corrupt {
        path: path.to_owned(),
        what: format!("block {block}"),
        offset_bytes: block as u64 * BLOCK_BYTES,
        fqns: Vec::new(),
        expected: expected.map_or("no such block".to_owned(), |crc| format!("CRC32 {crc:08x}")),
        got: format!("CRC32 {got:08x}"),
    })
}
