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
use candle_core::{CpuStorage, CudaDevice, CudaStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor};
use sconce_mesh::cuda::{CudaBytes, CudaBytesMut, read_chunks, uninit, write_chunks};
use sconce_mesh::{ProcessGroup, ReduceOp};

use crate::buffers::Buffers;
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

/// Room for whole parameters, one storage each. Taken when a gathering is begun, so that filling it does not wait for what
/// is computed meanwhile: memory is there once its stream has come to where it was taken.
pub(crate) fn room(
    flat: &FlatParameter,
    dtype: DType,
    device: &CudaDevice,
) -> sconce_mesh::Result<Vec<Storage>> {
    let dtype = sconce_mesh::DType::try_from(dtype)?;
    let params = flat.params().iter().map(|param| uninit(device, dtype, param.numel).map(Storage::Cuda));
    params.collect()
}

/// Fills `room` with all parameters of a unit, from this rank's shard and the others'.
///
/// Ranks: collective over `group`: one all-gather.
pub(crate) fn gather<T: Float>(
    group: &ProcessGroup,
    flat: &FlatParameter,
    shard: &[T],
    mut room: Vec<Storage>,
) -> sconce_mesh::Result<Vec<Storage>> {
    let numel = flat.shard_numel();
    let (mut params, layouts): (Vec<&mut CudaStorage>, Vec<Layout>) = room
        .iter_mut()
        .zip(flat.params())
        .filter_map(|(storage, param)| match storage {
            Storage::Cuda(storage) => Some((storage, Layout::contiguous(param.numel))),
            _ => None,
        })
        .unzip();
    let Some(device) = params.first().map(|param| param.device.clone()) else { return Ok(room) };
    let mut own = uninit(&device, T::DTYPE, numel)?;
    put(&mut own, shard)?;
    let input = CudaBytes::of_marked(&own, &Layout::contiguous(numel))?;
    let lent = params.iter_mut().zip(&layouts).map(|(param, layout)| CudaBytesMut::of(param, layout));
    let mut pieces = lent.collect::<sconce_mesh::Result<Vec<_>>>()?;
    if flat.is_one_sequence() {
        group.cuda_all_gather(&input, &mut pieces)?;
    } else {
        gather_cut::<T>(group, flat, &input, &mut pieces, &device)?;
    }
    drop(pieces);
    Ok(room)
}

/// The same where trainable and frozen parameters take turns in what is gathered.
fn gather_cut<T: Float>(
    group: &ProcessGroup,
    flat: &FlatParameter,
    input: &CudaBytes<'_>,
    params: &mut [CudaBytesMut<'_>],
    device: &CudaDevice,
) -> sconce_mesh::Result<()> {
    let (size, numel) = (size_of::<T>(), flat.shard_numel());
    let mut whole = uninit(device, T::DTYPE, numel * group.size())?;
    let all = Layout::contiguous(numel * group.size());
    group.cuda_all_gather(input, &mut [CudaBytesMut::of(&mut whole, &all)?])?;
    let whole = CudaBytes::of_marked(&whole, &all)?;
    for (index, param) in params.iter_mut().enumerate() {
        for shard in 0..group.size() {
            let run = flat.run(index, shard);
            let from = (shard * numel + run.shard_offset) * size;
            let mut to = param.range_mut(run.param_offset * size..(run.param_offset + run.len) * size);
            to.copy_from(&whole.range(from..from + run.len * size))?;
        }
    }
    Ok(())
}

/// Notes that a gradient is written by now, so that its reduction waits for nothing that is computed later.
pub(crate) fn mark_written(gradient: &Tensor) -> Result<()> {
    gradient.inplace_op1(&Mark)
}

struct Mark;

impl InplaceOp1 for Mark {
    fn name(&self) -> &'static str {
        "fsdp-mark-written"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        sconce_mesh::cuda::mark_written(storage).map_err(candle_core::Error::wrap)
    }
}

/// Room for this rank's shard of the reduced gradients.
pub(crate) fn reduced_room(
    flat: &FlatParameter,
    dtype: DType,
    device: &CudaDevice,
) -> crate::Result<Storage> {
    let dtype = sconce_mesh::DType::try_from(dtype)?;
    Ok(Storage::Cuda(uninit(device, dtype, flat.trainable_shard_numel())?))
}

/// This rank's shard of the gradients, reduced in the shard group and over replicas, in host memory.
///
/// Ranks: collective over the shard group, then over the replicate group.
pub(crate) fn reduce<T: Float>(
    reduction: &Reduction,
    mut reduced: CudaStorage,
    op: ReduceOp,
) -> crate::Result<Vec<T>> {
    let Reduction { flat, groups, gradients, .. } = reduction;
    let device = reduced.device.clone();
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
        // Marked when the reduction was begun; zeros are of now.
        let was_given = gradients[parts.len()].is_some();
        parts.push(if was_given {
            CudaBytes::of_marked(storage, layout)?
        } else {
            CudaBytes::of(storage, layout)?
        });
    }
    let numel = flat.trainable_shard_numel();
    let mut output = CudaBytesMut::of(&mut reduced, &Layout::contiguous(numel))?;
    groups.shard.cuda_reduce_scatter(&parts, &mut output, op)?;
    if groups.replicate.size() > 1 {
        groups.replicate.cuda_all_reduce(&mut output, op)?;
    }
    let mut values = host_room(&reduction.pass.buffers, numel);
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
    read_chunks(&output.to_read(), |at, chunk| bytes[at..at + chunk.len()].copy_from_slice(chunk))?;
    Ok(values)
}

/// Host memory for a reduced gradient. In f32 it is what the optimizer is given and gives back; a short one is cast first.
fn host_room<T: Float>(buffers: &Buffers, numel: usize) -> Vec<T> {
    match T::DTYPE {
        sconce_mesh::DType::F32 => buffers.take(numel),
        _ => vec![T::default(); numel],
    }
}

/// Copies values of host memory to a storage of as many.
fn put<T: Float>(to: &mut CudaStorage, values: &[T]) -> sconce_mesh::Result<()> {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    write_chunks(&mut CudaBytesMut::of(to, &Layout::contiguous(values.len()))?, |at, chunk| {
        let end = at + chunk.len();
        chunk.copy_from_slice(&bytes[at..end]);
    })
}
