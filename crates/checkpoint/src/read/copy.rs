//! One thread's copying: byte runs of items, cut at verified blocks, into the bytes of a box.

use std::ops::Range;

use sconce_dtensor::{CopyRun, TensorBox, copy_runs};

use super::Pass;
use super::blocks::Verified;
use crate::Result;
use crate::metadata::{Metadata, TensorStorageMetadata};
use crate::plan::ReadItem;
use crate::storage::DataFile;

/// One contiguous piece of a file that goes to one contiguous piece of a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadRun {
    /// Position in the metadata's files.
    pub(super) file: usize,
    /// Where it begins in the file.
    pub(super) offset_bytes: u64,
    /// Where it goes inside the box's bytes.
    pub(super) dst_bytes: usize,
    /// Its length, never 0.
    pub(super) len_bytes: usize,
}

impl ReadRun {
    /// The part that lies between two offsets of the file.
    pub(super) fn within(self, start: u64, end: u64) -> Self {
        let from = self.offset_bytes.max(start);
        let to = (self.offset_bytes + self.len_bytes as u64).min(end);
        let skipped = (from - self.offset_bytes) as usize;
        let (dst_bytes, len_bytes) = (self.dst_bytes + skipped, (to - from) as usize);
        Self { offset_bytes: from, dst_bytes, len_bytes, ..self }
    }

    /// The part that goes to a range of the box's bytes.
    fn into_range(self, range: &Range<usize>) -> Option<Self> {
        let from = self.dst_bytes.max(range.start);
        let to = (self.dst_bytes + self.len_bytes).min(range.end);
        let offset_bytes = self.offset_bytes + (from - self.dst_bytes) as u64;
        (from < to).then(|| Self { offset_bytes, dst_bytes: from, len_bytes: to - from, ..self })
    }
}

/// The byte runs of an item whose destination is `wanted`: the longest that there are, in row-major order.
pub(super) fn runs_of<'r>(
    item: &ReadItem,
    saved: &TensorStorageMetadata,
    wanted: &TensorBox,
) -> impl Iterator<Item = ReadRun> + use<'r> {
    let size = saved.dtype.size_bytes();
    let chunk = &saved.chunks[item.chunk];
    let (file, start) = (chunk.file, chunk.offset_bytes);
    copy_runs(&item.part, &chunk.bounds, wanted).map(move |CopyRun { src, dst, len }| ReadRun {
        file,
        offset_bytes: start + (src * size) as u64,
        dst_bytes: dst * size,
        len_bytes: len * size,
    })
}

/// One thread's copying in one pass.
pub(super) struct Copier<'r> {
    metadata: &'r Metadata,
    files: &'r [Option<Box<dyn DataFile>>],
    pass: Pass<'r>,
    verified: Verified,
    /// Whether anything was overwritten since this was last set to false.
    pub(super) has_written: bool,
}

impl<'r> Copier<'r> {
    pub(super) fn new(
        metadata: &'r Metadata,
        files: &'r [Option<Box<dyn DataFile>>],
        pass: Pass<'r>,
    ) -> Self {
        Self { metadata, files, pass, verified: Verified::default(), has_written: false }
    }

    /// Compares the checksum of a block.
    pub(super) fn verify(&mut self, file: usize, block: usize) -> Result<()> {
        let data = open_file(self.files, file);
        self.verified.block(file, block, &self.metadata.files[file], data).map(drop)
    }

    /// Copies the pieces of this pass into `to`, the bytes of a box from `start` on.
    pub(super) fn copy(
        &mut self,
        items: &[&ReadItem],
        wanted: &TensorBox,
        start: usize,
        to: &mut [u8],
    ) -> Result<()> {
        let range = start..start + to.len();
        for item in items {
            for run in runs_of(item, &self.metadata.tensors[item.saved], wanted) {
                if let Some(run) = run.into_range(&range) {
                    let at = run.dst_bytes - start;
                    self.copy_run(run, &mut to[at..at + run.len_bytes])?;
                }
            }
        }
        Ok(())
    }

    fn copy_run(&mut self, run: ReadRun, to: &mut [u8]) -> Result<()> {
        let Self { metadata, files, pass, verified, has_written } = self;
        let data = open_file(files, run.file);
        let part = |piece: &ReadRun| {
            let at = piece.dst_bytes - run.dst_bytes;
            at..at + piece.len_bytes
        };
        match pass {
            Pass::Unmarked(marks) => marks.unmarked(run, |piece| {
                *has_written = true;
                data.read_at(piece.offset_bytes, &mut to[part(&piece)])
            }),
            Pass::Marked(marks) => marks.marked(run, |block, piece| {
                let bytes = verified.block(run.file, block, &metadata.files[run.file], data)?;
                let from = (piece.offset_bytes % crate::BLOCK_BYTES) as usize;
                *has_written = true;
                to[part(&piece)].copy_from_slice(&bytes[from..from + piece.len_bytes]);
                Ok(())
            }),
        }
    }
}

fn open_file(files: &[Option<Box<dyn DataFile>>], file: usize) -> &dyn DataFile {
    let Some(data) = &files[file] else {
        unreachable!("files with runs were opened before anything is read");
    };
    data.as_ref()
}
