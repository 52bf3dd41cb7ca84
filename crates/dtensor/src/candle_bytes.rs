//! Bytes of candle tensors, lent in place. Conversions only; no communication.

use std::cell::RefCell;

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Storage, Tensor};
use sconce_mesh::{DType, cpu_bytes, cpu_bytes_mut, prefer_huge_pages};

use crate::error::CandleContext;
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

/// Lends the row-major bytes of a contiguous CPU tensor to `write`; whoever shares its storage sees the change.
///
/// # Errors
/// `Candle` for a tensor that is not contiguous or not on the CPU.
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
