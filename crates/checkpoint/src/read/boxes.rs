//! Boxes of one tensor, read one after the other: its files stay open, and the blocks that were verified last are kept.

use std::sync::Arc;

use sconce_dtensor::TensorBox;

use super::blocks::{Marks, Verified};
use super::copy::{Copier, Own};
use super::runs::ItemRuns;
use crate::metadata::{BLOCK_BYTES, ChunkStorageMetadata, Metadata, TensorStorageMetadata};
use crate::plan::ReadItem;
use crate::storage::{DataFile, StorageReader};
use crate::{Error, Result};

/// A tensor of a checkpoint with the files that it lies in, and no others, open.
pub(crate) struct OpenTensor {
    metadata: Arc<Metadata>,
    /// Position in the metadata.
    pub(crate) position: usize,
    files: Vec<Option<Box<dyn DataFile>>>,
    /// Every block of these files that has a checksum.
    blocks: Marks,
}

/// One thread's reading of an [`OpenTensor`].
pub(crate) struct BoxReader<'t> {
    tensor: &'t OpenTensor,
    copier: Copier<'t>,
}

impl OpenTensor {
    /// Opens the files of the tensor at a position of the metadata.
    ///
    /// # Errors
    /// Those of the storage.
    pub(crate) fn open(
        reader: &dyn StorageReader,
        metadata: &Arc<Metadata>,
        position: usize,
    ) -> Result<Self> {
        let mut is_read = vec![false; metadata.files.len()];
        metadata.tensors[position].chunks.iter().for_each(|chunk| is_read[chunk.file] = true);
        let blocks = Marks::all_of(metadata, &is_read);
        let open = |(file, is_read)| if is_read { reader.open(file).map(Some) } else { Ok(None) };
        let files = metadata.files.iter().zip(is_read).map(open).collect::<Result<_>>()?;
        Ok(Self { metadata: metadata.clone(), position, files, blocks })
    }

    /// A reader that has verified blocks of the same checkpoint already, if any.
    pub(crate) fn reader(&self, verified: Verified) -> BoxReader<'_> {
        let own = Own { alone: &self.blocks, checked: &self.blocks };
        let copier = Copier::new(&self.metadata, &self.files, own).cached(verified);
        BoxReader { tensor: self, copier }
    }

    fn saved(&self) -> &TensorStorageMetadata {
        &self.metadata.tensors[self.position]
    }

    /// Elements from one on, a box of its own, up to the end of the block in which it lies; pieces that are cut there read
    /// no block twice. 0 if nobody saved it.
    pub(crate) fn elements_in_block(&self, element: &TensorBox) -> usize {
        let saved = self.saved();
        let holds = |chunk: &ChunkStorageMetadata| chunk.bounds.contains(element);
        let Some(chunk) = saved.chunks.iter().position(holds) else { return 0 };
        let Some(run) = ItemRuns::new(element, chunk, saved, element).iter().next() else { return 0 };
        (BLOCK_BYTES - run.offset_bytes % BLOCK_BYTES) as usize / saved.dtype.size_bytes()
    }
}

impl BoxReader<'_> {
    /// What the reader of another tensor of the checkpoint may begin with.
    pub(crate) fn into_verified(self) -> Verified {
        self.copier.into_verified()
    }

    /// Reads a box of the tensor, row-major, into memory of its size; every block that has a checksum is verified.
    ///
    /// # Errors
    /// `Corrupt`, `Io`; `Uncovered` for a box of which a part was not saved.
    pub(crate) fn read(&mut self, wanted: &TensorBox, to: &mut [u8]) -> Result<()> {
        let saved = self.tensor.saved();
        let mut found = 0;
        for (chunk, held) in saved.chunks.iter().enumerate() {
            let Some(part) = held.bounds.intersect(wanted) else { continue };
            found += part.numel();
            let item =
                ReadItem { fqn: saved.fqn.clone(), index: 0, saved: self.tensor.position, chunk, part };
            let copied = self.copier.copy(&[&item], wanted, 0, to);
            copied.map_err(|error| error.naming_tensors(&self.tensor.metadata))?;
        }
        // Readers refuse chunks that overlap, so the count is the coverage.
        if found != wanted.numel() {
            let (shape, missing) = (saved.shape.clone(), wanted.to_string());
            return Err(Error::Uncovered { fqn: saved.fqn.clone(), shape, missing });
        }
        Ok(())
    }
}
