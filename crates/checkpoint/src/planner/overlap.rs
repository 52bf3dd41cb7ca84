//! Saved chunks ∩ wanted boxes: what a load reads.

use sconce_dtensor::{LocalTensor, TensorBox, uncovered};

use super::layout::{first_overlap, meet};
use crate::metadata::TensorStorageMetadata;
use crate::plan::ReadItem;
use crate::{Error, Result};

/// What is read for one tensor.
pub(super) struct Found {
    pub(super) items: Vec<ReadItem>,
    /// The first wanted part that no chunk holds.
    pub(super) missing: Option<TensorBox>,
}

/// The parts of saved chunks that the boxes of `tensor` want; `saved` is at position `at` of the metadata.
///
/// # Errors
/// `DTypeMismatch`, `ShapeMismatch`; `Overlap` if two chunks claim the same element.
pub(super) fn plan_tensor(
    fqn: &str,
    tensor: &dyn LocalTensor,
    at: usize,
    saved: &TensorStorageMetadata,
) -> Result<Found> {
    if tensor.dtype() != saved.dtype {
        return Err(Error::dtypes(fqn, tensor.dtype(), saved.dtype));
    }
    if tensor.global_shape() != saved.shape {
        let (expected, got) = (tensor.global_shape().to_vec(), saved.shape.clone());
        return Err(Error::ShapeMismatch { fqn: fqn.to_owned(), expected, got });
    }
    let mut found = Found { items: Vec::new(), missing: None };
    for (index, wanted) in tensor.local_boxes().iter().enumerate() {
        let first = found.items.len();
        let chunks = saved.chunks.iter().enumerate().filter(|(_, chunk)| meet(&chunk.bounds, wanted));
        let part = |(chunk, meta): (usize, &crate::ChunkStorageMetadata)| {
            let part = meta.bounds.intersect(wanted)?;
            Some(ReadItem { fqn: fqn.to_owned(), index, saved: at, chunk, part })
        };
        found.items.extend(chunks.filter_map(part));
        let parts: Vec<&TensorBox> = found.items[first..].iter().map(|item| &item.part).collect();
        if let Some((first, second)) = first_overlap(&parts) {
            let (first, second) = (first.to_string(), second.to_string());
            return Err(Error::Overlap { fqn: saved.fqn.clone(), first, second });
        }
        // Parts are disjoint, so the count is the coverage.
        if found.missing.is_none() && parts.iter().map(|part| part.numel()).sum::<usize>() != wanted.numel() {
            let parts: Vec<TensorBox> = parts.into_iter().cloned().collect();
            found.missing = uncovered(wanted, &parts).into_iter().next();
        }
    }
    Ok(found)
}
