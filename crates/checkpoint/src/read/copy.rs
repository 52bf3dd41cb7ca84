//! One thread's copying: byte runs of items, cut at verified blocks, into the bytes of a box.

use sconce_dtensor::TensorBox;
use sconce_mesh::copy_past_caches;

use super::blocks::{Marks, Verified};
use super::runs::{ItemRuns, ReadRun};
use crate::Result;
use crate::metadata::Metadata;
use crate::plan::ReadItem;
use crate::storage::DataFile;

/// Which pieces a rank reads by itself.
#[derive(Clone, Copy)]
pub(super) struct Own<'m> {
    /// Blocks that it reads whole and verifies.
    pub(super) alone: &'m Marks,
    /// These, and the blocks whose pieces it does not read: what lies outside has no checksum that is looked at.
    pub(super) checked: &'m Marks,
}

impl Own<'_> {
    /// Whether this rank itself reads any of the blocks of an item.
    pub(super) fn has_any(&self, runs: &ItemRuns) -> bool {
        let is_other = |block| self.checked.contains(runs.file(), block);
        runs.blocks().any(|block| self.alone.contains(runs.file(), block) || !is_other(block))
    }
}

/// Pieces of this length on are copied past the caches, unless they are used at once: what is loaded is larger than these
/// are.
const LONG_PIECE: usize = 64 << 10;

/// One thread's copying.
pub(super) struct Copier<'r> {
    metadata: &'r Metadata,
    files: &'r [Option<Box<dyn DataFile>>],
    own: Own<'r>,
    verified: Verified,
    /// Whether what is copied is used at once.
    stays_cached: bool,
    /// Whether anything was overwritten since this was last set to false.
    pub(super) has_written: bool,
}

impl<'r> Copier<'r> {
    pub(super) fn new(metadata: &'r Metadata, files: &'r [Option<Box<dyn DataFile>>], own: Own<'r>) -> Self {
        Self { metadata, files, own, verified: Verified::default(), stays_cached: false, has_written: false }
    }

    /// One whose copies are used at once, and which has blocks of the same metadata already.
    #[cfg(feature = "cli")]
    pub(super) fn cached(self, verified: Verified) -> Self {
        Self { verified, stays_cached: true, ..self }
    }

    /// The blocks that it verified last.
    #[cfg(feature = "cli")]
    pub(super) fn into_verified(self) -> Verified {
        self.verified
    }

    /// Whether this rank itself reads anything of the items of a box.
    pub(super) fn has_any(&self, items: &[&ReadItem], wanted: &TensorBox) -> bool {
        let runs = |item: &&ReadItem| {
            ItemRuns::new(&item.part, item.chunk, &self.metadata.tensors[item.saved], wanted)
        };
        items.iter().map(runs).any(|runs| self.own.has_any(&runs))
    }

    /// Copies what of the items this rank reads by itself into `to`, the bytes of a box from `start` on.
    pub(super) fn copy(
        &mut self,
        items: &[&ReadItem],
        wanted: &TensorBox,
        start: usize,
        to: &mut [u8],
    ) -> Result<()> {
        let range = start..start + to.len();
        for item in items {
            let saved = &self.metadata.tensors[item.saved];
            for run in ItemRuns::new(&item.part, item.chunk, saved, wanted).iter() {
                if let Some(run) = run.into_range(&range) {
                    let at = run.dst_bytes - start;
                    self.copy_run(run, &mut to[at..at + run.len_bytes])?;
                }
            }
        }
        Ok(())
    }

    fn copy_run(&mut self, run: ReadRun, to: &mut [u8]) -> Result<()> {
        let Self { metadata, files, own, verified, stays_cached, has_written } = self;
        let data = open_file(files, run.file);
        let part = |piece: &ReadRun| {
            let at = piece.dst_bytes - run.dst_bytes;
            at..at + piece.len_bytes
        };
        own.alone.marked(run, |block, piece| {
            let bytes = verified.block(run.file, block, &metadata.files[run.file], data)?;
            let from = (piece.offset_bytes % crate::BLOCK_BYTES) as usize;
            *has_written = true;
            let (from, to) = (&bytes[from..from + piece.len_bytes], &mut to[part(&piece)]);
            if piece.len_bytes >= LONG_PIECE && !*stays_cached {
                copy_past_caches(from, to)
            } else {
                to.copy_from_slice(from)
            }
            Ok(())
        })?;
        own.checked.unmarked(run, |piece| {
            *has_written = true;
            data.read_at(piece.offset_bytes, &mut to[part(&piece)])
        })
    }
}

pub(super) fn open_file(files: &[Option<Box<dyn DataFile>>], file: usize) -> &dyn DataFile {
    let Some(data) = &files[file] else {
        unreachable!("files with runs were opened before anything is read");
    };
    data.as_ref()
}
