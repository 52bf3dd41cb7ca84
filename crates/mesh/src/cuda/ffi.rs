//! The unsafe side of CUDA memory: bytes of typed slices, memory that nobody has written yet, and pinned host memory that a
//! device copies from and to while this process goes on.

use std::sync::Arc;

use candle_core::cuda_backend::CudaDType;
use candle_core::{CudaDevice, CudaStorage};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
    DriverError, HostSlice, PinnedHostSlice, result,
};

use super::{CudaBytes, CudaBytesMut};

/// The bytes of all elements.
pub(super) fn bytes<T: DeviceRepr>(values: &CudaSlice<T>) -> CudaView<'_, u8> {
    // SAFETY: every byte of a number is a valid u8.
    let view = unsafe { values.transmute::<u8>(values.num_bytes()) };
    view.unwrap_or_else(|| unreachable!("a slice is as long as itself"))
}

/// The bytes of all elements, to be written.
pub(super) fn bytes_mut<T: DeviceRepr>(values: &mut CudaSlice<T>) -> CudaViewMut<'_, u8> {
    let len = values.num_bytes();
    // SAFETY: every byte of a number is a valid u8, and every pattern of bytes a number of each of candle's types.
    let view = unsafe { values.transmute_mut::<u8>(len) };
    view.unwrap_or_else(|| unreachable!("a slice is as long as itself"))
}

/// `numel` elements of whatever the memory held last.
pub(super) fn uninit<T: DeviceRepr + CudaDType>(
    device: &CudaDevice,
    numel: usize,
) -> candle_core::Result<CudaStorage> {
    // SAFETY: the callee's condition is that unset memory is not taken for something it may not be. Every pattern of bits is
    // a number of each of candle's types, and host code sees device memory by copies that the driver writes.
    let mut slice = unsafe { device.alloc::<T>(numel)? };
    // Other streams wait for what was written last: let that be the allocation, which is work on a stream itself.
    let stream = device.cuda_stream();
    drop(slice.device_ptr_mut(&stream));
    Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
}

/// Page-locked host memory. A copy between it and a device runs beside this process; whoever looks at it waits for that
/// copy first, as does dropping it.
pub(super) struct PinnedBuffer(PinnedHostSlice<u8>);

impl PinnedBuffer {
    /// `len` zeros.
    pub(super) fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self, DriverError> {
        // SAFETY: the memory is unset and nobody sees it before it is zeroed below. No flags: the default memory, which this
        // process reads at full speed.
        let mut host = unsafe { context.alloc_pinned_with_flags::<u8>(len, 0)? };
        let start = host.as_mut_ptr()?;
        // SAFETY: the allocation holds `len` bytes from `start` on, is aligned for bytes, and `host` is owned here alone.
        unsafe { start.write_bytes(0, len) };
        Ok(Self(host))
    }

    /// The bytes, once no copy is under way.
    pub(super) fn wait(&mut self) -> Result<&mut [u8], DriverError> {
        self.0.as_mut_slice()
    }

    /// Begins to copy device memory to the start of the buffer, after what writes that memory now.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub(super) fn begin_fetch(
        &mut self,
        from: &CudaBytes<'_>,
        stream: &CudaStream,
    ) -> Result<(), DriverError> {
        stream.context().bind_to_thread()?;
        let (device, _read) = from.view().device_ptr(stream);
        // SAFETY: the slice is used by a copy on `stream` only, as the callee asks; when `_recorded` is dropped the buffer's
        // event follows that copy, and `wait` and the buffer's own drop wait for the event.
        let (host, _recorded) = unsafe { self.0.stream_synced_mut_slice(stream) };
        let host = &mut host[..from.len_bytes()];
        // SAFETY: `device` points to `len_bytes` bytes that stay until `_read` was recorded after this copy on its stream:
        // a slice that is dropped is freed after its events. The host side is pinned, as long, and touched by nobody until
        // `wait` (above). The context is bound to this thread.
        unsafe { result::memcpy_dtoh_async(host, device, stream.cu_stream()) }
    }

    /// Begins to copy the start of the buffer to device memory, after what uses that memory now.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub(super) fn begin_put(
        &mut self,
        to: &mut CudaBytesMut<'_>,
        stream: &CudaStream,
    ) -> Result<(), DriverError> {
        stream.context().bind_to_thread()?;
        let len = to.len_bytes();
        let mut view = to.view_mut();
        let (device, _written) = view.device_ptr_mut(stream);
        // SAFETY: as in `begin_fetch`: used on `stream` only, with the buffer's event behind it.
        let (host, _recorded) = unsafe { self.0.stream_synced_slice(stream) };
        // SAFETY: `device` points to `len` bytes, of which `to` is the only writer, and which stay until `_written` was
        // recorded after this copy; the host side is pinned, at least as long, and unchanged until `wait`.
        unsafe { result::memcpy_htod_async(device, &host[..len], stream.cu_stream()) }
    }
}
