//! NCCL's functions, each behind a call that checks what NCCL does not. Pointers to device memory live here only.
//!
//! cudarc's own `Comm` hides its handle, cannot wait with a deadline and panics when dropped, so that this stands on its
//! `sys` bindings.

use std::ffi::{CStr, c_int, c_void};
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut,
};
use cudarc::nccl::sys;

use crate::backend::splits::{Exchange, Transfer, nccl_dtype, nccl_op};
use crate::cuda::{CudaBytes, failed};
use crate::{DType, Error, ReduceOp, Result};

pub(super) const ID_BYTES: usize = 128;

/// How a caller waits: it fails when there is no more time, or no more hope.
pub(super) type Pause<'p> = dyn FnMut() -> Result<()> + 'p;

/// What the ranks of a new communicator must all be told by the one that made it.
pub(super) fn unique_id() -> Result<[u8; ID_BYTES]> {
    let mut id = sys::ncclUniqueId { internal: [0; ID_BYTES] };
    // SAFETY: `id` is writable and of the type asked for.
    let result = unsafe { sys::ncclGetUniqueId(&mut id) };
    check(result, "ncclGetUniqueId", null_mut())?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// NCCL's version as it says it: 23007 is 2.30.7.
pub(super) fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: `version` is writable and an int.
    let result = unsafe { sys::ncclGetVersion(&mut version) };
    check(result, "ncclGetVersion", null_mut()).map(|()| version)
}

/// One rank's end of a communicator, with a stream of its own.
///
/// Every call only puts work on that stream; [`Communicator::record`] says when it is done. Ranks make the same calls in
/// the same order.
pub(super) struct Communicator {
    comm: sys::ncclComm_t,
    stream: Arc<CudaStream>,
    ranks: usize,
    /// Whether it may still be ended in good order.
    is_well: bool,
}

// SAFETY: NCCL ties a communicator to a device, not to a thread: any thread may call it, one at a time. `&self` methods
// are not called at once, since the type is not `Sync` and its owner keeps it in a mutex; each binds the device's context
// to the calling thread.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Joins the `ranks` ranks that were told the same `id`, as rank `me`, on the context's device.
    ///
    /// # Errors
    /// `Backend`; what `pause` returns.
    pub(super) fn join(
        context: &Arc<CudaContext>,
        id: [u8; ID_BYTES],
        (me, ranks): (usize, usize),
        pause: &mut Pause<'_>,
    ) -> Result<Communicator> {
        let stream = context.new_stream().map_err(|e| failed("cuStreamCreate", e))?;
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as _) };
        let (mut config, mut comm) = (config(), null_mut());
        let (n, rank) = (count_of(ranks)?, count_of(me)?);
        bind(context)?;
        // SAFETY: `comm` and `config` are writable and live through the call; `id` is a value that `ncclGetUniqueId` made;
        // `rank` is below `n`, since a group's rank is one of its ranks; the device's context is bound to this thread.
        let result = unsafe { sys::ncclCommInitRankConfig(&mut comm, n, id, rank, &mut config) };
        let joining = Communicator { comm, stream, ranks, is_well: false };
        check(result, "ncclCommInitRankConfig", comm)?;
        joining.settle(pause)?;
        Ok(joining.well())
    }

    fn well(mut self) -> Communicator {
        self.is_well = true;
        self
    }

    /// The context of its device.
    pub(super) fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }

    /// Whether what was called is on the stream by now, or an error that came meanwhile.
    pub(super) fn poll(&self) -> Result<bool> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives until it is dropped or aborted, both of which consume it; `state` is writable.
        let result = unsafe { sys::ncclCommGetAsyncError(self.comm, &mut state) };
        check(result, "ncclCommGetAsyncError", self.comm)?;
        check(state, "a call under way", self.comm)?;
        Ok(state != sys::ncclResult_t::ncclInProgress)
    }

    fn settle(&self, pause: &mut Pause<'_>) -> Result<()> {
        while !self.poll()? {
            pause()?;
        }
        Ok(())
    }

    /// What comes to pass once all work so far is done.
    pub(super) fn record(&self) -> Result<CudaEvent> {
        self.stream.record_event(None).map_err(|e| failed("cuEventRecord", e))
    }

    /// Lets the stream of this communicator wait for what wrote `input`.
    pub(super) fn follow(&self, input: &CudaBytes<'_>) -> Result<()> {
        input.precede(&self.stream)
    }

    /// Memory on the stream of this communicator, which holds whatever it held last.
    pub(super) fn scratch(&self, len_bytes: usize) -> Result<CudaSlice<u8>> {
        // SAFETY: every pattern of bits is a u8; callers write all of it before it is read.
        let made = unsafe { self.stream.alloc::<u8>(len_bytes) };
        made.map_err(|e| failed("cuMemAllocAsync", e))
    }

    /// Copies on the stream of this communicator; both are of equal length.
    pub(super) fn copy(&self, from: &CudaView<'_, u8>, to: &mut CudaViewMut<'_, u8>) -> Result<()> {
        equal("copy", to.len(), from.len())?;
        self.stream.memcpy_dtod(from, to).map_err(|e| failed("cuMemcpyDtoDAsync", e))
    }

    /// Zeroes memory on the stream of this communicator.
    pub(super) fn zero(&self, to: &mut CudaViewMut<'_, u8>) -> Result<()> {
        self.stream.memset_zeros(to).map_err(|e| failed("cuMemsetD8Async", e))
    }

    /// Copies the buffer of rank `root` over every other rank's.
    pub(super) fn broadcast(
        &self,
        buffer: &mut CudaViewMut<'_, u8>,
        root: usize,
        pause: &mut Pause<'_>,
    ) -> Result<()> {
        let (len, root) = (buffer.len(), self.rank(root)?);
        bind(self.context())?;
        let (at, _written) = buffer.device_ptr_mut(&self.stream);
        let (at, comm, stream) = (at as *mut c_void, self.comm, self.cuda_stream());
        // SAFETY: `at` points to `len` bytes of this device that nobody else touches until `_written` is recorded after the
        // call; in place, send and receive buffers may be equal; `root` is a rank; `comm` lives, and its context is bound.
        let result = unsafe { sys::ncclBroadcast(at, at, len, BYTES, root, comm, stream) };
        self.called(result, "ncclBroadcast", pause)
    }

    /// Replaces every rank's buffer by the reduction of all.
    pub(super) fn all_reduce(
        &self,
        buffer: &mut CudaViewMut<'_, u8>,
        (dtype, op): (DType, ReduceOp),
        pause: &mut Pause<'_>,
    ) -> Result<()> {
        let (count, dtype, op) = (buffer.len() / dtype.size_bytes(), number_of(dtype)?, operation(op));
        bind(self.context())?;
        let (at, _written) = buffer.device_ptr_mut(&self.stream);
        let (at, comm, stream) = (at as *mut c_void, self.comm, self.cuda_stream());
        // SAFETY: `at` points to `count` elements of `dtype` of this device that nobody else touches until `_written` is
        // recorded after the call; in place, both buffers are equal; `comm` lives, and its context is bound.
        let result = unsafe { sys::ncclAllReduce(at, at, count, dtype, op, comm, stream) };
        self.called(result, "ncclAllReduce", pause)
    }

    /// Gathers equally long inputs.
    pub(super) fn all_gather(
        &self,
        input: &CudaView<'_, u8>,
        output: &mut CudaViewMut<'_, u8>,
        pause: &mut Pause<'_>,
    ) -> Result<()> {
        equal("ncclAllGather", input.len() * self.ranks, output.len())?;
        bind(self.context())?;
        let len = input.len();
        let (from, _read) = input.device_ptr(&self.stream);
        let (to, _written) = output.device_ptr_mut(&self.stream);
        let (from, to, comm) = (from as *const c_void, to as *mut c_void, self.comm);
        // SAFETY: `from` points to `len` bytes, `to` to `len` bytes a rank (checked above), both on this device and kept by
        // `_read` and `_written` until after the call; they do not overlap, one being lent to write; `comm` lives.
        let result = unsafe { sys::ncclAllGather(from, to, len, BYTES, comm, self.cuda_stream()) };
        self.called(result, "ncclAllGather", pause)
    }

    /// Reduces the inputs and leaves each rank an equally long part.
    pub(super) fn reduce_scatter(
        &self,
        input: &CudaView<'_, u8>,
        output: &mut CudaViewMut<'_, u8>,
        (dtype, op): (DType, ReduceOp),
        pause: &mut Pause<'_>,
    ) -> Result<()> {
        equal("ncclReduceScatter", output.len() * self.ranks, input.len())?;
        bind(self.context())?;
        let (count, dtype, op) = (output.len() / dtype.size_bytes(), number_of(dtype)?, operation(op));
        let (from, _read) = input.device_ptr(&self.stream);
        let (to, _written) = output.device_ptr_mut(&self.stream);
        let (from, to, comm, stream) =
            (from as *const c_void, to as *mut c_void, self.comm, self.cuda_stream());
        // SAFETY: `to` points to `count` elements, `from` to `count` a rank (checked above), both on this device and kept by
        // `_read` and `_written` until after the call; they do not overlap, one being lent to write; `comm` lives.
        let result = unsafe { sys::ncclReduceScatter(from, to, count, dtype, op, comm, stream) };
        self.called(result, "ncclReduceScatter", pause)
    }

    /// Reduces each part of the inputs to the rank that it names; `output` is this rank's own part.
    pub(super) fn reduce_parts(
        &self,
        input: &CudaView<'_, u8>,
        parts: &[Transfer],
        output: &mut CudaViewMut<'_, u8>,
        (dtype, op): (DType, ReduceOp),
        pause: &mut Pause<'_>,
    ) -> Result<()> {
        inside("ncclReduce", parts, input.len())?;
        bind(self.context())?;
        let (size, dtype, op, len) = (dtype.size_bytes(), number_of(dtype)?, operation(op), output.len());
        let (from, _read) = input.device_ptr(&self.stream);
        let (to, _written) = output.device_ptr_mut(&self.stream);
        let group = GroupCall::begin()?;
        for (root, part) in parts {
            let (root, from, count) = (self.rank(*root)?, address(from, part), part.len() / size);
            let (to, comm, stream) = (
                if part.len() == len { to as *mut c_void } else { null_mut() },
                self.comm,
                self.cuda_stream(),
            );
            // SAFETY: `from` points to `count` elements inside the input (checked above); NCCL writes to `to` on the root only,
            // whose own part is as long as `output`; both lie on this device and are kept by `_read` and `_written` until the
            // group is issued below; `comm` lives, and its context is bound.
            let result = unsafe { sys::ncclReduce(from, to, count, dtype, op, root, comm, stream) };
            check(result, "ncclReduce", self.comm)?;
        }
        self.called(group.end(), "ncclGroupEnd", pause)
    }

    /// Sends and receives parts, all at once.
    pub(super) fn exchange(
        &self,
        input: &CudaView<'_, u8>,
        plan: &Exchange,
        output: &mut CudaViewMut<'_, u8>,
        pause: &mut Pause<'_>,
    ) -> Result<()> {
        inside("ncclSend", &plan.sends, input.len())?;
        inside("ncclRecv", &plan.receives, output.len())?;
        let (from, to) = plan.own.clone();
        if !from.is_empty() {
            self.copy(&input.slice(from), &mut output.slice_mut(to))?;
        }
        bind(self.context())?;
        let (from, _read) = input.device_ptr(&self.stream);
        let (to, _written) = output.device_ptr_mut(&self.stream);
        let group = GroupCall::begin()?;
        for (peer, part) in &plan.sends {
            let (peer, from, comm) = (self.rank(*peer)?, address(from, part), self.comm);
            // SAFETY: `from` points to the part's bytes inside the input (checked above), on this device and kept by `_read`
            // until the group is issued below; `peer` is a rank; `comm` lives, and its context is bound.
            let result = unsafe { sys::ncclSend(from, part.len(), BYTES, peer, comm, self.cuda_stream()) };
            check(result, "ncclSend", self.comm)?;
        }
        for (peer, part) in &plan.receives {
            let (peer, to, comm) = (self.rank(*peer)?, address(to, part).cast_mut(), self.comm);
            // SAFETY: `to` points to the part's bytes inside the output (checked above), which is lent to write and whose
            // parts are disjoint, kept by `_written` until the group is issued below; `peer` is a rank; `comm` lives.
            let result = unsafe { sys::ncclRecv(to, part.len(), BYTES, peer, comm, self.cuda_stream()) };
            check(result, "ncclRecv", self.comm)?;
        }
        self.called(group.end(), "ncclGroupEnd", pause)
    }

    /// Waits until a call is on the stream. The caller's guards of device memory are recorded after it.
    fn called(&self, result: sys::ncclResult_t, what: &'static str, pause: &mut Pause<'_>) -> Result<()> {
        check(result, what, self.comm)?;
        self.settle(pause)
    }

    fn rank(&self, rank: usize) -> Result<c_int> {
        equal("rank in group", rank.min(self.ranks - 1), rank)?;
        count_of(rank)
    }

    fn cuda_stream(&self) -> sys::cudaStream_t {
        self.stream.cu_stream().cast()
    }

    /// Ends it without the other ranks: what is on the stream ends too, its results undefined.
    pub(super) fn abort(mut self) {
        self.is_well = false;
    }
}

impl Drop for Communicator {
    /// In good order only if it never failed and the last calls end soon: then other ranks may still need this one.
    fn drop(&mut self) {
        if self.comm.is_null() || bind(self.context()).is_err() {
            return;
        }
        if self.is_well {
            // SAFETY: the communicator lives and is not used after this but to wait for it and to destroy it.
            let result = unsafe { sys::ncclCommFinalize(self.comm) };
            let mut looks = 0;
            let mut pause = || {
                looks += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
                if looks < FAREWELL_MILLIS {
                    Ok(())
                } else {
                    Err(nccl("ncclCommFinalize", "it takes too long"))
                }
            };
            if self.called(result, "ncclCommFinalize", &mut pause).is_ok() {
                // SAFETY: it was finalized, and its handle is not used again.
                unsafe { sys::ncclCommDestroy(self.comm) };
                return;
            }
        }
        // SAFETY: the handle is not used again.
        unsafe { sys::ncclCommAbort(self.comm) };
    }
}

/// How long the end in good order may take. All collectives have returned by then.
const FAREWELL_MILLIS: u32 = 5_000;

const BYTES: sys::ncclDataType_t = sys::ncclDataType_t::ncclUint8;

/// Calls that are issued together; they are given up if this is dropped before its end.
struct GroupCall(bool);

impl GroupCall {
    fn begin() -> Result<GroupCall> {
        // SAFETY: it takes nothing; the matching end is made by `end` or by `drop`, on this thread.
        let result = unsafe { sys::ncclGroupStart() };
        check(result, "ncclGroupStart", null_mut()).map(|()| GroupCall(true))
    }

    fn end(mut self) -> sys::ncclResult_t {
        self.0 = false;
        // SAFETY: a group was begun on this thread, in `begin`.
        unsafe { sys::ncclGroupEnd() }
    }
}

impl Drop for GroupCall {
    fn drop(&mut self) {
        if self.0 {
            // SAFETY: a group was begun on this thread, in `begin`, and not ended.
            unsafe { sys::ncclGroupEnd() };
        }
    }
}

/// `NCCL_CONFIG_INITIALIZER` with non-blocking calls. Its version is one at which the library takes what this struct lacks
/// for its default; an older library reads as much of the struct as it knows.
fn config() -> sys::ncclConfig_t {
    const DEFAULT: c_int = c_int::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 23_000,
        blocking: 0,
        cgaClusterSize: DEFAULT,
        minCTAs: DEFAULT,
        maxCTAs: DEFAULT,
        netName: std::ptr::null(),
        splitShare: DEFAULT,
        trafficClass: DEFAULT,
        commName: std::ptr::null(),
        collnetEnable: DEFAULT,
        CTAPolicy: DEFAULT,
        shrinkShare: DEFAULT,
        nvlsCTAs: DEFAULT,
        nChannelsPerNetPeer: DEFAULT,
        nvlinkCentricSched: DEFAULT,
        graphUsageMode: DEFAULT,
        numRmaCtx: DEFAULT,
        maxP2pPeers: DEFAULT,
    }
}

fn number_of(dtype: DType) -> Result<sys::ncclDataType_t> {
    use sys::ncclDataType_t as T;
    const ALL: [T; 9] = [
        T::ncclInt8,
        T::ncclUint8,
        T::ncclInt32,
        T::ncclUint32,
        T::ncclInt64,
        T::ncclFloat16,
        T::ncclFloat32,
        T::ncclFloat64,
        T::ncclBfloat16,
    ];
    let number = nccl_dtype(dtype);
    let found = ALL.into_iter().find(|known| number == Some(*known as u32));
    found.ok_or_else(|| nccl("a reduction", &format!("no reduction of {dtype}")))
}

fn operation(op: ReduceOp) -> sys::ncclRedOp_t {
    use sys::ncclRedOp_t as Op;
    let number = nccl_op(op);
    let found = [Op::ncclSum, Op::ncclProd, Op::ncclMax, Op::ncclMin]
        .into_iter()
        .find(|known| *known as u32 == number);
    found.unwrap_or(Op::ncclAvg)
}

fn address(start: u64, part: &Range<usize>) -> *const c_void {
    (start + part.start as u64) as *const c_void
}

fn bind(context: &Arc<CudaContext>) -> Result<()> {
    context.bind_to_thread().map_err(|e| failed("cuCtxSetCurrent", e))
}

fn count_of(n: usize) -> Result<c_int> {
    c_int::try_from(n).map_err(|e| nccl("a rank", &e.to_string()))
}

/// A broken invariant of this module's callers, before NCCL sees it.
fn equal(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(nccl(what, &format!("expected {expected}, got {got}"))) }
}

fn inside(what: &'static str, parts: &[Transfer], len: usize) -> Result<()> {
    let end = parts.iter().map(|(_, part)| part.end).max().unwrap_or(0);
    equal(what, end.min(len), end)
}

fn nccl(call: &str, cause: &str) -> Error {
    Error::Backend { backend: "nccl", call: call.into(), cause: cause.into() }
}

fn check(result: sys::ncclResult_t, what: &str, comm: sys::ncclComm_t) -> Result<()> {
    if matches!(result, sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress) {
        return Ok(());
    }
    // SAFETY: any code may be asked for; the text is static.
    let text = text_of(unsafe { sys::ncclGetErrorString(result) });
    // SAFETY: `comm` is null or lives; the text lives until the next call of NCCL on this thread.
    let last = text_of(unsafe { sys::ncclGetLastError(comm) });
    Err(nccl(what, &format!("{text}: {last}")))
}

fn text_of(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, and NCCL's texts end with a zero and live long enough to be copied here.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
