//! Gathering: every rank's shard of a unit to whole parameters, in the dtype that the model computes in.

use std::sync::Arc;

use candle_core::{CpuStorage, DType};
use half::{bf16, f16};
use sconce_mesh::ProcessGroup;

use crate::buffers::Buffers;
use crate::flat_param::FlatParameter;
use crate::mixed_precision::Float;

/// All parameters of a unit, each in a storage of its own, from this rank's shard and the others'.
///
/// Ranks: collective over `group`: one all-gather, none for a unit without parameters.
pub(crate) fn gather(
    group: &ProcessGroup,
    flat: &FlatParameter,
    shard: &Arc<Vec<f32>>,
    dtype: DType,
    buffers: &Buffers,
) -> sconce_mesh::Result<Vec<CpuStorage>> {
    if flat.params().is_empty() {
        return Ok(Vec::new());
    }
    match dtype {
        DType::F16 => gather_as::<f16>(group, flat, &f16::from_shard(shard), buffers),
        DType::BF16 => gather_as::<bf16>(group, flat, &bf16::from_shard(shard), buffers),
        _ => gather_as::<f32>(group, flat, shard, buffers),
    }
}

/// Gives back what [`gather`] returned.
pub(crate) fn release(gathered: CpuStorage, buffers: &Buffers) {
    match gathered {
        CpuStorage::F32(values) => buffers.give(values),
        CpuStorage::F16(values) => buffers.give(values),
        CpuStorage::BF16(values) => buffers.give(values),
        // Nothing else is gathered.
        _ => {}
    }
}

/// Straight into the buffers that the model's cells will own.
fn gather_as<T: Float>(
    group: &ProcessGroup,
    flat: &FlatParameter,
    shard: &[T],
    buffers: &Buffers,
) -> sconce_mesh::Result<Vec<CpuStorage>> {
    let mut params: Vec<Vec<T>> = flat.params().iter().map(|p| buffers.take(p.numel)).collect();
    let mut padding = vec![T::default(); flat.padding()];
    group.all_gather_vectored(shard, &mut flat.pieces(&mut params, &mut padding))?;
    Ok(params.into_iter().map(T::storage).collect())
}
