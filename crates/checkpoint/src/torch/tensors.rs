//! Tensors of `torch.save` archives as data files: in place where they are row-major, else put in order.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::saved::StoredTensor;
use crate::Result;
use crate::metadata::{ChunkStorageMetadata, TensorStorageMetadata};
use crate::region::Region;
use crate::storage::DataFile;
use sconce_dtensor::TensorBox;

/// A tensor that is one chunk, in `file` from `offset_bytes` on.
pub(super) fn tensor_metadata(
    fqn: String,
    stored: &StoredTensor,
    file: usize,
    offset_bytes: u64,
) -> TensorStorageMetadata {
    let chunk = ChunkStorageMetadata { bounds: TensorBox::whole(&stored.shape), file, offset_bytes };
    let chunks = if chunk.bounds.is_empty() { Vec::new() } else { vec![chunk] };
    TensorStorageMetadata { fqn, dtype: stored.dtype, shape: stored.shape.clone(), chunks }
}

/// A tensor's bytes in row-major order, made when they are first read and kept until the last of them was.
#[derive(Debug)]
pub(super) struct TensorFile {
    stored: StoredTensor,
    bytes: Mutex<Option<Region>>,
}

impl TensorFile {
    pub(super) fn new(stored: StoredTensor) -> Self {
        let in_place = stored.is_contiguous().then(|| stored.storage().clone());
        Self { stored, bytes: Mutex::new(in_place) }
    }
}

impl DataFile for TensorFile {
    fn read_at(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()> {
        let mut kept = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = match kept.take() {
            Some(bytes) => bytes,
            None => Region::of_memory(self.stored.row_major()?, self.path()),
        };
        if self.stored.is_contiguous() || offset_bytes + (to.len() as u64) < bytes.len() {
            *kept = Some(bytes.clone());
        }
        drop(kept);
        bytes.read(offset_bytes, to)
    }

    fn path(&self) -> &Path {
        self.stored.storage().path()
    }
}
