//! Gradients of a unit to the mean gradient of a shard: reduce-scatter in the shard group, all-reduce over replicas.

use candle_core::{CpuStorage, Storage, Tensor};
use sconce_mesh::ReduceOp;

use crate::flat_param::FlatParameter;
use crate::strategy::Groups;
use crate::{Error, Result};

/// The mean over all ranks of the mesh of this rank's shard of the gradients; a missing gradient is zero.
///
/// Ranks: collective over the shard group, then over the replicate group.
///
/// # Source
/// `_reduce_grad` of `torch/distributed/fsdp/_runtime_utils.py`. torch divides by about the square root before and
/// by the rest after; in f32 one division after the sums gives the same bits for world sizes that are powers of two.
pub(crate) fn reduce_gradients(
    flat: &FlatParameter,
    groups: &Groups,
    gradients: &[Option<Tensor>],
) -> Result<Vec<f32>> {
    let mut reduced = vec![0f32; flat.shard_numel()];
    let storages: Vec<_> = gradients.iter().map(|g| g.as_ref().map(Tensor::storage_and_layout)).collect();
    let zeros = vec![0f32; zeros_needed(flat, gradients)];
    let mut parts: Vec<&[f32]> = Vec::with_capacity(storages.len());
    for (param, lent) in flat.params().iter().zip(&storages) {
        parts.push(match lent {
            None => &zeros[..param.numel],
            Some((storage, layout)) => match (&**storage, layout.contiguous_offsets()) {
                (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => &values[start..end],
                (other, _) => {
                    let got = format!("gradient {:?}", other.dtype());
                    return Err(Error::UnsupportedDType { fqn: param.fqn.clone(), got });
                }
            },
        });
    }
    groups.shard.reduce_scatter_vectored(&parts, &mut reduced, ReduceOp::Sum)?;
    groups.replicate.all_reduce(&mut reduced, ReduceOp::Sum)?;
    let n_ranks = (groups.shard.size() * groups.replicate.size()) as f32;
    reduced.iter_mut().for_each(|g| *g /= n_ranks);
    Ok(reduced)
}

/// Length of the longest parameter without gradient.
fn zeros_needed(flat: &FlatParameter, gradients: &[Option<Tensor>]) -> usize {
    let missing = flat.params().iter().zip(gradients).filter(|(_, g)| g.is_none());
    missing.map(|(param, _)| param.numel).max().unwrap_or(0)
}
