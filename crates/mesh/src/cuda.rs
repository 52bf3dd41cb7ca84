//! CUDA memory as collectives and copies see it: bytes of contiguous elements with their dtype. No communication.
//!
//! Devices are made by `Device::new_cuda_with_stream`. candle's other constructor has memory on which no stream waits for
//! another, and collectives run on a stream of their own.
//!
//! candle's kernels do not note what they write: they pass their results as if they were read. So a stream that reads a
//! storage waits for all that the storage's own stream was given so far, unless somebody noted the write
//! ([`mark_written`]).

mod bounce;
mod ffi;

use std::ops::Range;
use std::sync::Arc;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{CudaDevice, CudaStorage, DType as CandleDType, Layout};
use cudarc::driver::{CudaContext, CudaStream, CudaView, CudaViewMut, DevicePtrMut, DeviceSlice};

pub use self::bounce::{read_chunks, write_chunks};
use crate::{DType, Error, Result};

/// The bytes of contiguous elements on a CUDA device.
#[derive(Debug)]
pub struct CudaBytes<'a> {
    view: CudaView<'a, u8>,
    dtype: DType,
    /// Whether the last write is noted in the memory's event.
    is_marked: bool,
}

/// [`CudaBytes`], to be written.
#[derive(Debug)]
pub struct CudaBytesMut<'a> {
    whole: CudaViewMut<'a, u8>,
    /// Which bytes of `whole`: a part of a mutable view can only be lent.
    range: Range<usize>,
    dtype: DType,
}

/// Runs `$body` with the slice of a storage of a dtype that collectives carry.
macro_rules! with_slice {
    ($slice:expr, $values:ident => $body:expr) => {
        match $slice {
            CudaStorageSlice::U8($values) => $body,
            CudaStorageSlice::U32($values) => $body,
            CudaStorageSlice::I16($values) => $body,
            CudaStorageSlice::I32($values) => $body,
            CudaStorageSlice::I64($values) => $body,
            CudaStorageSlice::BF16($values) => $body,
            CudaStorageSlice::F16($values) => $body,
            CudaStorageSlice::F32($values) => $body,
            CudaStorageSlice::F64($values) => $body,
            CudaStorageSlice::F8E4M3(_) => Err(no_bytes("f8e4m3")),
            CudaStorageSlice::F6E2M3(_) => Err(no_bytes("f6e2m3")),
            CudaStorageSlice::F6E3M2(_) => Err(no_bytes("f6e3m2")),
            CudaStorageSlice::F4(_) => Err(no_bytes("f4")),
            CudaStorageSlice::F8E8M0(_) => Err(no_bytes("f8e8m0")),
        }
    };
}

impl<'a> CudaBytes<'a> {
    /// The elements of a storage that `layout` spans.
    ///
    /// # Errors
    /// `InvalidArgument` if they are not contiguous, of candle's 8, 6 and 4 bit floats, or on a device that was not made by
    /// `Device::new_cuda_with_stream`.
    pub fn of(storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        let dtype = DType::try_from(candle_dtype(storage))?;
        let range = bytes_of(layout, dtype)?;
        let whole = with_slice!(&storage.slice, values => Ok(ffi::bytes(values)))?;
        tracked(whole.stream().context())?;
        Ok(CudaBytes { view: whole.slice(range), dtype, is_marked: false })
    }

    /// As [`CudaBytes::of`], of memory whose last write was by this module, by a collective, or noted by
    /// [`mark_written`]: who reads it does not wait for anything else.
    ///
    /// # Errors
    /// As [`CudaBytes::of`].
    pub fn of_marked(storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        Ok(CudaBytes { is_marked: true, ..Self::of(storage, layout)? })
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.view.len()
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A range of the bytes, whose ends lie between elements.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn range(&self, bytes: Range<usize>) -> CudaBytes<'a> {
        CudaBytes { view: self.view.slice(bytes), dtype: self.dtype, is_marked: self.is_marked }
    }

    /// Lets `stream`, which reads it next, wait for its last write.
    pub(crate) fn precede(&self, stream: &CudaStream) -> Result<()> {
        if self.is_marked {
            return Ok(());
        }
        stream.join(self.view.stream()).map_err(|e| failed("cuStreamWaitEvent", e))
    }

    pub(crate) fn view(&self) -> &CudaView<'a, u8> {
        &self.view
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        self.view.stream().context()
    }
}

impl<'a> CudaBytesMut<'a> {
    /// The elements of a storage that `layout` spans.
    ///
    /// # Errors
    /// As [`CudaBytes::of`].
    pub fn of(storage: &'a mut CudaStorage, layout: &Layout) -> Result<Self> {
        let dtype = DType::try_from(candle_dtype(storage))?;
        let range = bytes_of(layout, dtype)?;
        let whole = with_slice!(&mut storage.slice, values => Ok(ffi::bytes_mut(values)))?;
        tracked(whole.stream().context())?;
        Ok(CudaBytesMut { whole, range, dtype })
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.range.len()
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The same bytes, to be read.
    pub fn to_read(&self) -> CudaBytes<'_> {
        let view = self.whole.slice(self.range.clone());
        CudaBytes { view, dtype: self.dtype, is_marked: false }
    }

    /// A range of the bytes, whose ends lie between elements.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn range_mut(&mut self, bytes: Range<usize>) -> CudaBytesMut<'_> {
        let (start, range) = (self.range.start, 0..bytes.len());
        let whole = self.whole.slice_mut(start + bytes.start..start + bytes.end);
        CudaBytesMut { whole, range, dtype: self.dtype }
    }

    /// Copies other bytes of the same length here, in the order of work on this memory's device.
    ///
    /// # Errors
    /// `InvalidArgument` if lengths differ; `Backend`.
    pub fn copy_from(&mut self, other: &CudaBytes<'_>) -> Result<()> {
        if other.len_bytes() != self.len_bytes() {
            return Err(Error::InvalidArgument {
                op: "copy",
                what: "length in bytes".into(),
                expected: self.len_bytes().to_string(),
                got: other.len_bytes().to_string(),
            });
        }
        let stream = Arc::clone(self.whole.stream());
        other.precede(&stream)?;
        stream.memcpy_dtod(&other.view, &mut self.view_mut()).map_err(|e| failed("cuMemcpyDtoDAsync", e))
    }

    pub(crate) fn view_mut(&mut self) -> CudaViewMut<'_, u8> {
        self.whole.slice_mut(self.range.clone())
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        self.whole.stream().context()
    }
}

/// Notes that all that the storage's own stream was given so far may have written it, so that other streams wait for that
/// and for nothing that comes later.
///
/// # Errors
/// As [`CudaBytes::of`].
pub fn mark_written(storage: &mut CudaStorage) -> Result<()> {
    with_slice!(&mut storage.slice, values => {
        let stream = Arc::clone(values.stream());
        drop(values.device_ptr_mut(&stream));
        Ok(())
    })
}

/// Memory of `numel` elements that holds whatever it held last, for what is about to be overwritten.
///
/// # Errors
/// `InvalidArgument` for a dtype that collectives do not carry; `Backend` if there is no memory.
pub fn uninit(device: &CudaDevice, dtype: DType, numel: usize) -> Result<CudaStorage> {
    let made = match CandleDType::try_from(dtype)? {
        CandleDType::U8 => ffi::uninit::<u8>(device, numel),
        CandleDType::U32 => ffi::uninit::<u32>(device, numel),
        CandleDType::I16 => ffi::uninit::<i16>(device, numel),
        CandleDType::I32 => ffi::uninit::<i32>(device, numel),
        CandleDType::I64 => ffi::uninit::<i64>(device, numel),
        CandleDType::BF16 => ffi::uninit::<half::bf16>(device, numel),
        CandleDType::F16 => ffi::uninit::<half::f16>(device, numel),
        CandleDType::F64 => ffi::uninit::<f64>(device, numel),
        CandleDType::F32 => ffi::uninit::<f32>(device, numel),
        other => return Err(no_bytes(other.as_str())),
    };
    made.map_err(|e| failed("cuMemAllocAsync", e))
}

/// How many CUDA devices this process may use.
///
/// # Errors
/// `Backend` if the driver cannot say.
pub fn device_count() -> Result<usize> {
    let counted = cudarc::driver::result::init().and_then(|()| CudaContext::device_count());
    counted.map(|n| usize::try_from(n).unwrap_or(0)).map_err(|e| failed("cuDeviceGetCount", e))
}

fn candle_dtype(storage: &CudaStorage) -> CandleDType {
    use candle_core::backend::BackendStorage as _;
    storage.dtype()
}

/// The bytes that `layout` spans.
fn bytes_of(layout: &Layout, dtype: DType) -> Result<Range<usize>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(wrong("layout", "contiguous elements", format!("{layout:?}")));
    };
    Ok(start * dtype.size_bytes()..end * dtype.size_bytes())
}

/// Refuses a device on whose memory streams do not wait for each other.
fn tracked(context: &CudaContext) -> Result<()> {
    if context.is_managing_stream_synchronization() {
        return Ok(());
    }
    let got = "one whose memory no events keep in order".to_owned();
    Err(wrong("device", "one made by Device::new_cuda_with_stream", got))
}

fn no_bytes(got: &str) -> Error {
    wrong("dtype", "a dtype that collectives carry", got.to_owned())
}

fn wrong(what: &str, expected: &str, got: String) -> Error {
    Error::InvalidArgument { op: "CUDA memory", what: what.into(), expected: expected.into(), got }
}

/// A call of the CUDA driver that failed.
pub(crate) fn failed(call: &str, cause: impl std::fmt::Display) -> Error {
    Error::Backend { backend: "cuda", call: call.into(), cause: cause.to_string() }
}

/// NCCL's version, as it says it: 23007 is 2.30.7.
///
/// # Errors
/// `Backend` if the library cannot say.
#[cfg(feature = "nccl")]
pub fn nccl_version() -> Result<i32> {
    crate::backend::nccl::version()
}
