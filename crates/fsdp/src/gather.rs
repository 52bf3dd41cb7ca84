//! Gathering: every rank's shard of a unit to whole parameters, in the dtype that the model computes in.

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Storage};
use half::{bf16, f16};
use sconce_mesh::ProcessGroup;

use crate::buffers::Buffers;
use crate::flat_param::FlatParameter;
use crate::mixed_precision::Float;
use crate::pass::Pass;

/// All parameters of a unit, each in a storage of its own, from this rank's shard and the others'.
///
/// `room` was taken by [`room`] when the gathering was begun.
/// Ranks: collective over `group`: one all-gather, none for a unit without parameters.
pub(crate) fn gather(
    group: &ProcessGroup,
    flat: &FlatParameter,
    shard: &Arc<Vec<f32>>,
    pass: &Pass,
    room: Vec<Storage>,
) -> sconce_mesh::Result<Vec<Storage>> {
    if flat.params().is_empty() {
        return Ok(Vec::new());
    }
    match pass.precision.param_dtype {
        DType::F16 => gather_as::<f16>(group, flat, &f16::from_shard(shard), pass, room),
        DType::BF16 => gather_as::<bf16>(group, flat, &bf16::from_shard(shard), pass, room),
        _ => gather_as::<f32>(group, flat, shard, pass, room),
    }
}

/// What a gathering needs of the device before it begins; nothing on the CPU.
#[cfg(feature = "cuda")]
pub(crate) fn room(flat: &FlatParameter, pass: &Pass) -> sconce_mesh::Result<Vec<Storage>> {
    match &pass.device {
        candle_core::Device::Cuda(device) => crate::cuda::room(flat, pass.precision.param_dtype, device),
        _ => Ok(Vec::new()),
    }
}

/// What a gathering needs of the device before it begins; nothing on the CPU.
#[cfg(not(feature = "cuda"))]
pub(crate) fn room(_flat: &FlatParameter, _pass: &Pass) -> sconce_mesh::Result<Vec<Storage>> {
    Ok(Vec::new())
}

#[cfg(feature = "cuda")]
fn gather_as<T: Float>(
    group: &ProcessGroup,
    flat: &FlatParameter,
    shard: &[T],
    pass: &Pass,
    room: Vec<Storage>,
) -> sconce_mesh::Result<Vec<Storage>> {
    match &pass.device {
        candle_core::Device::Cuda(_) => crate::cuda::gather(group, flat, shard, room),
        _ => gather_on_cpu(group, flat, shard, &pass.buffers),
    }
}

#[cfg(not(feature = "cuda"))]
fn gather_as<T: Float>(
    group: &ProcessGroup,
    flat: &FlatParameter,
    shard: &[T],
    pass: &Pass,
    _room: Vec<Storage>,
) -> sconce_mesh::Result<Vec<Storage>> {
    gather_on_cpu(group, flat, shard, &pass.buffers)
}

/// Gives back what [`gather`] returned.
pub(crate) fn release(gathered: Storage, buffers: &Buffers) {
    match gathered {
        Storage::Cpu(CpuStorage::F32(values)) => buffers.give(values),
        Storage::Cpu(CpuStorage::F16(values)) => buffers.give(values),
        Storage::Cpu(CpuStorage::BF16(values)) => buffers.give(values),
        // Nothing else is gathered on the CPU; the driver keeps the memory of a CUDA device for the next unit.
        _ => {}
    }
}

/// Straight into the buffers that the model's cells will own.
fn gather_on_cpu<T: Float>(
    group: &ProcessGroup,
    flat: &FlatParameter,
    shard: &[T],
    buffers: &Buffers,
) -> sconce_mesh::Result<Vec<Storage>> {
    let mut params: Vec<Vec<T>> = flat.params().iter().map(|p| buffers.take(p.numel)).collect();
    let mut padding = vec![T::default(); flat.padding()];
    group.all_gather_vectored(shard, &mut flat.pieces(&mut params, &mut padding))?;
    Ok(params.into_iter().map(|values| Storage::Cpu(T::storage(values))).collect())
}
