//! Saved chunks ∩ wanted boxes, as byte runs: what a load reads, and where it goes.

use sconce_dtensor::{CopyRun, LocalTensor, TensorBox, copy_runs, uncovered};

use crate::metadata::{Metadata, TensorStorageMetadata};
use crate::{Error, Result};

/// What is read for one wanted box.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct ReadPlan {
    pub(crate) runs: Vec<ReadRun>,
}

/// One contiguous piece of a file that goes to one contiguous piece of a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReadRun {
    /// Position in the metadata's files.
    pub(crate) file: usize,
    /// Where it begins in the file.
    pub(crate) offset_bytes: u64,
    /// Where it goes inside the box's bytes.
    pub(crate) dst_bytes: usize,
    /// Its length.
    pub(crate) len_bytes: usize,
}

/// One plan a box that `tensor` holds.
///
/// # Errors
/// `DTypeMismatch`, `ShapeMismatch`; `Uncovered` if the checkpoint lacks a part.
pub(crate) fn plan_reads(
    fqn: &str,
    tensor: &dyn LocalTensor,
    saved: &TensorStorageMetadata,
) -> Result<Vec<ReadPlan>> {
    if tensor.dtype() != saved.dtype {
        return Err(Error::dtypes(fqn, tensor.dtype(), saved.dtype));
    }
    if tensor.global_shape() != saved.shape {
        let (expected, got) = (tensor.global_shape().to_vec(), saved.shape.clone());
        return Err(Error::ShapeMismatch { fqn: fqn.to_owned(), expected, got });
    }
    tensor.local_boxes().iter().map(|wanted| plan_box(saved, wanted)).collect()
}

fn plan_box(saved: &TensorStorageMetadata, wanted: &TensorBox) -> Result<ReadPlan> {
    let size = saved.dtype.size_bytes();
    let (mut plan, mut found) = (ReadPlan::default(), 0);
    for chunk in &saved.chunks {
        let Some(overlap) = chunk.bounds.intersect(wanted) else { continue };
        found += overlap.numel();
        for CopyRun { src, dst, len } in copy_runs(&overlap, &chunk.bounds, wanted) {
            plan.push(ReadRun {
                file: chunk.file,
                offset_bytes: chunk.offset_bytes + (src * size) as u64,
                dst_bytes: dst * size,
                len_bytes: len * size,
            });
        }
    }
    // Chunks are disjoint, so the count is the coverage.
    if found == wanted.numel() {
        return Ok(plan);
    }
    let chunks: Vec<TensorBox> = saved.chunks.iter().map(|chunk| chunk.bounds.clone()).collect();
    let missing = uncovered(wanted, &chunks).first().map(TensorBox::to_string).unwrap_or_default();
    Err(Error::Uncovered { fqn: saved.fqn.clone(), shape: saved.shape.clone(), missing })
}

impl ReadPlan {
    /// Appends a run, or lengthens the last one if it goes on there and here.
    fn push(&mut self, run: ReadRun) {
        if let Some(last) = self.runs.last_mut()
            && last.file == run.file
            && last.offset_bytes + last.len_bytes as u64 == run.offset_bytes
            && last.dst_bytes + last.len_bytes == run.dst_bytes
        {
            last.len_bytes += run.len_bytes;
        } else {
            self.runs.push(run);
        }
    }
}

/// The blocks of each file that the plans touch, sorted.
pub(crate) fn touched_blocks<'p>(
    metadata: &Metadata,
    plans: impl Iterator<Item = &'p ReadPlan>,
) -> Vec<Vec<usize>> {
    let block = crate::metadata::BLOCK_BYTES;
    let mut touched: Vec<Vec<bool>> =
        metadata.files.iter().map(|f| vec![false; f.block_crcs.len()]).collect();
    for run in plans.flat_map(|plan| &plan.runs) {
        let (first, last) = (run.offset_bytes / block, (run.offset_bytes + run.len_bytes as u64 - 1) / block);
        touched[run.file][first as usize..=last as usize].fill(true);
    }
    let numbers = |marks: &Vec<bool>| (0..marks.len()).filter(|nth| marks[*nth]).collect();
    touched.iter().map(numbers).collect()
}
