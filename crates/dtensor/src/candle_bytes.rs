//! Bytes of candle tensors, lent in place; those of CUDA tensors through host memory. Conversions only; no communication.

use std::cell::RefCell;
use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Storage, Tensor};
#[cfg(feature = "cuda")]
use sconce_mesh::cuda::{CudaBytes, CudaBytesMut, read_chunks, write_chunks};
use sconce_mesh::{DType, cpu_bytes, cpu_bytes_mut, prefer_huge_pages};

use crate::error::CandleContext;
use crate::local_tensor::check_range;
use crate::{Error, Result};

/// The dtype of a tensor, if collectives and checkpoints carry it.
pub(crate) fn dtype_of(tensor: &Tensor) -> Result<DType> {
    Ok(DType::try_from(tensor.dtype())?)
}

/// Lends the row-major bytes of `tensor`; one that is not contiguous or not on the CPU is copied first.
pub(crate) fn read_bytes(tensor: &Tensor, read: &mut dyn FnMut(&[u8])) -> Result<()> {
    let what = || format!("reading a tensor of shape {:?}", tensor.dims());
    let host = tensor.to_device(&Device::Cpu).and_then(|t| t.contiguous()).during(what)?;
    let (storage, layout) = host.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        unreachable!("the tensor was made contiguous on the CPU above");
    };
    let size = storage_size(storage);
    read(&cpu_bytes(storage)?[start * size..end * size]);
    Ok(())
}

/// Lends a range of the row-major bytes of `tensor`, in order: of a CUDA tensor in pieces that a device copies while the
/// one before is used, of any other in one.
pub(crate) fn read_range(tensor: &Tensor, range: Range<usize>, read: &mut dyn FnMut(&[u8])) -> Result<()> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() {
        return read_cuda_range(tensor, range, read);
    }
    let mut outcome = Ok(());
    read_bytes(tensor, &mut |bytes| {
        outcome = check_range(&range, bytes.len()).map(|()| read(&bytes[range.clone()]));
    })?;
    outcome
}

#[cfg(feature = "cuda")]
fn read_cuda_range(tensor: &Tensor, range: Range<usize>, read: &mut dyn FnMut(&[u8])) -> Result<()> {
    let what = || format!("reading a tensor of shape {:?}", tensor.dims());
    let contiguous = tensor.contiguous().during(what)?;
    let (storage, layout) = contiguous.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("a copy is on the device of its source") };
    let bytes = CudaBytes::of(storage, layout)?;
    check_range(&range, bytes.len_bytes())?;
    Ok(read_chunks(&bytes.range(range), |_, chunk| read(chunk))?)
}

/// The tensor in host memory, itself if it is there already.
pub(crate) fn on_host(tensor: &Tensor) -> Result<Tensor> {
    on_device(tensor, &Device::Cpu)
}

/// The tensor on `device`, itself if it is there already.
pub(crate) fn on_device(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    let moved = tensor.to_device(device);
    moved.during(|| format!("moving a tensor of shape {:?} to {:?}", tensor.dims(), device.location()))
}

/// Lends the row-major bytes of a contiguous tensor to `write`; whoever shares its storage sees the change. Those of a CUDA
/// tensor are copied to host memory and back.
///
/// # Errors
/// `Candle` for a tensor that is not contiguous, or neither on the CPU nor on a CUDA device.
pub(crate) fn write_bytes(tensor: &Tensor, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
    if tensor.elem_count() == 0 {
        // candle takes the zero strides of an empty tensor for repeated elements and refuses. Borrowers may view
        // the bytes as any element type, so that nothing, too, is aligned.
        write(bytemuck::cast_slice_mut::<u64, u8>(&mut []));
        return Ok(());
    }
    let what = || format!("writing into a tensor of shape {:?}", tensor.dims());
    tensor.inplace_op1(&LendBytes(RefCell::new(write))).during(what)
}

fn storage_size(storage: &CpuStorage) -> usize {
    use candle_core::backend::BackendStorage;
    storage.dtype().size_in_bytes()
}

/// The only public way to a tensor's storage for writing is an in-place op.
struct LendBytes<'w>(RefCell<&'w mut WriteBytes<'w>>);

type WriteBytes<'w> = dyn FnMut(&mut [u8]) + 'w;

impl InplaceOp1 for LendBytes<'_> {
    fn name(&self) -> &'static str {
        "sconce-write-bytes"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("the destination is not contiguous: {layout:?}");
        };
        let size = storage_size(storage);
        let bytes = cpu_bytes_mut(storage).map_err(candle_core::Error::wrap)?;
        (self.0.borrow_mut())(&mut bytes[start * size..end * size]);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let lend = |storage| -> sconce_mesh::Result<()> {
            let mut device = CudaBytesMut::of(storage, layout)?;
            let mut words = vec![0u64; device.len_bytes().div_ceil(8)];
            let bytes = &mut bytemuck::cast_slice_mut(&mut words)[..device.len_bytes()];
            read_chunks(&device.to_read(), |at, chunk| bytes[at..at + chunk.len()].copy_from_slice(chunk))?;
            (self.0.borrow_mut())(bytes);
            write_chunks(&mut device, |at, chunk| {
                let end = at + chunk.len();
                chunk.copy_from_slice(&bytes[at..end]);
            })
        };
        lend(storage).map_err(candle_core::Error::wrap)
    }
}

/// A zeroed CPU tensor of the given dtype. Its memory is touched when it is filled, not here.
pub(crate) fn zeros(shape: &[usize], dtype: DType) -> Result<Tensor> {
    let candle_dtype = candle_core::DType::try_from(dtype)?;
    let zeros = Tensor::zeros(shape, candle_dtype, &Device::Cpu);
    let zeros = zeros.during(|| format!("allocating a tensor of shape {shape:?}"))?;
    write_bytes(&zeros, &mut prefer_huge_pages)?;
    Ok(zeros)
}

/// A copy of a contiguous tensor that shares no storage with it.
pub(crate) fn deep_copy(tensor: &Tensor) -> Result<Tensor> {
    tensor.copy().during(|| format!("copying a tensor of shape {:?}", tensor.dims()))
}

/// Refuses a tensor whose shape is not `expected`.
pub(crate) fn check_shape(what: &str, expected: &[usize], tensor: &Tensor) -> Result<()> {
    if tensor.dims() == expected {
        return Ok(());
    }
    let got = tensor.dims().to_vec();
    Err(Error::ShapeMismatch { what: what.to_owned(), expected: expected.to_vec(), got })
}
