//! What units do with memory of a CUDA device: storage of cells, gathering and reduction. The order of things, and all that
//! is not about a device, is where it is for the CPU.
//!
//! ```text
//! gather   shard [S] of host memory ─cast, copy─▶ device ─all-gather─▶ [n·S] ─copies on the device─▶ one storage a parameter
//! reduce   gradients, one a parameter ─reduce-scatter─▶ [S] ─all-reduce over replicas─▶ [S] ─copy─▶ host memory
//! ```
//!
//! Collectives run on the group's progress thread and on its own stream, beside what this thread puts on candle's.

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor};
use sconce_mesh::cuda::{CudaBytes, CudaBytesMut, read_chunks, uninit, write_chunks};
use sconce_mesh::{ProcessGroup, ReduceOp};

use crate::error::CandleContext;
use crate::flat_param::FlatParameter;
use crate::grad_sync::Reduction;
use crate::mixed_precision::Float;

/// Storage of a freed parameter: a byte of a dtype without kernels, so that any op on it is an error.
pub(crate) fn freed(device: &CudaDevice) -> Result<CudaStorage> {
    let slice = CudaStorageSlice::F4(device.alloc_zeros::<u8>(1)?);
    Ok(CudaStorage { slice, device: device.clone() })
}

/// A value that only puts ops in order.
pub(crate) fn order(device: &CudaDevice) -> Result<CudaStorage> {
    Ok(CudaStorage::wrap_cuda_slice(device.alloc_zeros::<f32>(1)?, device.clone()))
}

/// A storage of a dtype, for a cell that is freed at once.
pub(crate) fn typed(device: &CudaDevice, dtype: DType) -> Result<CudaStorage> {
    let dtype = sconce_mesh::DType::try_from(dtype).map_err(candle_core::Error::wrap)?;
    uninit(device, dtype, 1).map_err(candle_core::Error::wrap)
}

/// A copy of contiguous elements.
pub(crate) fn copy_storage(storage: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let copy = || {
        let from = CudaBytes::of(storage, layout)?;
        let numel = layout.shape().elem_count();
        let mut made = uninit(&storage.device, from.dtype(), numel)?;
        CudaBytesMut::of(&mut made, &Layout::contiguous(numel))?.copy_from(&from)?;
        Ok::<_, sconce_mesh::Error>(made)
    };
    copy().map_err(candle_core::Error::wrap)
}

/// All parameters of a unit, each in a storage of its own, from this rank's shard and the others'.
///
/// Ranks: collective over `group`: one all-gather.
pub(crate) fn gather<T: Float>(
    group: &ProcessGroup,
    flat: &FlatParameter,
    shard: &[T],
    device: &CudaDevice,
) -> sconce_mesh::Result<Vec<Storage>> {
    let (dtype, size, numel) = (T::DTYPE, size_of::<T>(), flat.shard_numel());
    let mut own = uninit(device, dtype, numel)?;
    put(&mut own, shard)?;
    let mut whole = uninit(device, dtype, numel * group.size())?;
    let all = Layout::contiguous(numel * group.size());
    let input = CudaBytes::of(&own, &Layout::contiguous(numel))?;
    group.cuda_all_gather(&input, &mut [CudaBytesMut::of(&mut whole, &all)?])?;
    let whole = CudaBytes::of(&whole, &all)?;
    let param = |(index, layout): (usize, &crate::ParamLayout)| {
        let mut param = uninit(device, dtype, layout.numel)?;
        let mut to = CudaBytesMut::of(&mut param, &Layout::contiguous(layout.numel))?;
        for shard in 0..group.size() {
            let run = flat.run(index, shard);
            let from = (shard * numel + run.shard_offset) * size;
            let mut to = to.range_mut(run.param_offset * size..(run.param_offset + run.len) * size);
            to.copy_from(&whole.range(from..from + run.len * size))?;
        }
        Ok(Storage::Cuda(param))
    };
    flat.params().iter().enumerate().map(param).collect()
}

/// This rank's shard of the gradients, reduced in the shard group and over replicas, in host memory.
///
/// Ranks: collective over the shard group, then over the replicate group.
pub(crate) fn reduce<T: Float>(
    reduction: &Reduction,
    device: &CudaDevice,
    op: ReduceOp,
) -> crate::Result<Vec<T>> {
    let Reduction { flat, groups, gradients, .. } = reduction;
    let dtype = reduction.pass.precision.reduce_dtype;
    let zeros = |numel| Tensor::zeros(numel, dtype, &candle_core::Device::Cuda(device.clone()));
    let named = flat.trainable().iter().zip(gradients);
    let given = named.map(|(param, gradient)| match gradient {
        Some(gradient) => Ok(gradient.clone()),
        None => zeros(param.numel).during(|| format!("gradient of {}", param.fqn)),
    });
    let given = given.collect::<crate::Result<Vec<Tensor>>>()?;
    let lent: Vec<_> = given.iter().map(Tensor::storage_and_layout).collect();
    let mut parts = Vec::with_capacity(lent.len());
    for ((storage, layout), param) in lent.iter().zip(flat.trainable()) {
        let Storage::Cuda(storage) = &**storage else {
            let got = format!("a gradient on {:?}", storage.device().location());
            return Err(crate::Error::UnsupportedDType { fqn: param.fqn.clone(), got });
        };
        parts.push(CudaBytes::of(storage, layout)?);
    }
    let numel = flat.trainable_shard_numel();
    let mut reduced = uninit(device, T::DTYPE, numel)?;
    let mut output = CudaBytesMut::of(&mut reduced, &Layout::contiguous(numel))?;
    groups.shard.cuda_reduce_scatter(&parts, &mut output, op)?;
    if groups.replicate.size() > 1 {
        groups.replicate.cuda_all_reduce(&mut output, op)?;
    }
    let mut values = vec![T::default(); numel];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
    read_chunks(&output.to_read(), |at, chunk| bytes[at..at + chunk.len()].copy_from_slice(chunk))?;
    Ok(values)
}

/// Copies values of host memory to a storage of as many.
fn put<T: Float>(to: &mut CudaStorage, values: &[T]) -> sconce_mesh::Result<()> {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    write_chunks(&mut CudaBytesMut::of(to, &Layout::contiguous(values.len()))?, |at, chunk| {
        let end = at + chunk.len();
        chunk.copy_from_slice(&bytes[at..end]);
    })
}
