//! The NCCL backend: CUDA tensors from device to device, on one host or many.
//!
//! Each group has a communicator of its own, made at its first collective: only then is the device known. Its id goes over
//! the group's backend for host memory, which found the ranks by the store or by MPI. A collective goes like this:
//!
//! ```text
//! host    roll call: same call, same sizes, all there     ─▶  Mismatch, PeerLost, Timeout as for host memory
//! device  wait for the inputs ─▶ NCCL on a stream of its own ─▶ event
//! host    poll the event, NCCL's own errors and the other ranks, until the deadline
//! ```
//!
//! NCCL itself tells nobody that ranks disagree, and waits forever for a rank that is gone: hence the roll call, and the
//! poll. A rank that gives up aborts its communicator and the group in host memory, by which the others learn of it.
//! The roll call costs a barrier in host memory; `SCONCE_NCCL_ROLL_CALL=0` leaves it out.

mod ffi;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::CudaContext;

use self::ffi::{Communicator, ID_BYTES};
use super::device::{DeviceBackend, Parts};
use super::pieces::offsets;
use super::splits::{Exchange, is_even, nccl_dtype, reductions};
use super::{Backend, Call, CallName, Membership};
use crate::cuda::{CudaBytes, CudaBytesMut, failed};
use crate::{DType, Error, GroupRank, ReduceOp, Result};

/// `0` leaves the roll call before each collective out.
const ROLL_CALL: &str = "SCONCE_NCCL_ROLL_CALL";

static CALLS_ROLL: LazyLock<bool> = LazyLock::new(|| std::env::var(ROLL_CALL).as_deref() != Ok("0"));

/// How long after a failure of NCCL the group may take to learn which rank was lost.
const INQUEST: Duration = Duration::from_secs(1);

/// One rank's end of one group.
pub(crate) struct NcclGroup {
    membership: Membership,
    /// Made by the first collective. Held while one runs, so that they take turns.
    communicator: Mutex<Option<Communicator>>,
    /// Of the last collective.
    seq: AtomicU64,
    failure: OnceLock<Error>,
}

/// A collective as the ranks compare it.
struct Agreed<'c> {
    call: Call,
    op: Option<ReduceOp>,
    /// Bytes of each rank, or none if they differ from rank to rank.
    counts: &'c [usize],
}

/// NCCL's version: 23007 is 2.30.7.
///
/// # Errors
/// `Backend` if the library cannot say.
pub(crate) fn version() -> Result<i32> {
    ffi::version()
}

impl NcclGroup {
    pub(crate) fn new(membership: Membership) -> NcclGroup {
        NcclGroup {
            membership,
            communicator: Mutex::default(),
            seq: AtomicU64::new(0),
            failure: OnceLock::new(),
        }
    }

    fn me(&self) -> usize {
        self.membership.group_rank
    }

    fn size(&self) -> usize {
        self.membership.ranks.len()
    }

    /// Carries out one collective; `issue` puts it on the communicator's stream.
    fn run(
        &self,
        host: &dyn Backend,
        agreed: Agreed<'_>,
        context: &Arc<CudaContext>,
        issue: impl FnOnce(&Communicator, &mut ffi::Pause<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut made = self.lock();
        self.failure.get().map_or(Ok(()), |error| Err(error.clone()))?;
        if let Some(communicator) = &*made {
            same_device(agreed.call, communicator.context(), context)?;
        }
        let seq = self.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let mut watch = Watch::new(self, host, &agreed, seq);
        let done = self.roll_call(host, &agreed).and_then(|()| {
            let communicator = self.communicator(&mut made, host, context, &mut watch)?;
            issue(communicator, &mut || watch.pause())?;
            let done = communicator.record()?;
            while !done.try_is_complete().map_err(|e| failed("cuEventQuery", e))? {
                watch.pause()?;
                communicator.poll()?;
            }
            Ok(())
        });
        done.map_err(|error| self.fail(error, &mut made, host, &watch))
    }

    /// Every rank is there and calls the same.
    fn roll_call(&self, host: &dyn Backend, agreed: &Agreed<'_>) -> Result<()> {
        match *CALLS_ROLL {
            true => host.roll_call(agreed.call, agreed.op, agreed.counts),
            false => host.watch(),
        }
    }

    /// The communicator, made if this is the first collective.
    fn communicator<'s>(
        &self,
        made: &'s mut Option<Communicator>,
        host: &dyn Backend,
        context: &Arc<CudaContext>,
        watch: &mut Watch<'_>,
    ) -> Result<&'s Communicator> {
        if made.is_none() {
            let mut id = if self.me() == 0 { ffi::unique_id()? } else { [0; ID_BYTES] };
            let call = Call::rooted(CallName::BroadcastObject, DType::U8, GroupRank(0));
            host.broadcast(call, &mut id, GroupRank(0))?;
            let place = (self.me(), self.size());
            *made = Some(Communicator::join(context, id, place, &mut || watch.pause())?);
        }
        made.as_ref().map_or_else(|| unreachable!("it was made above"), Ok)
    }

    /// Gives the group up on all ranks, for the reason that tells most.
    fn fail(
        &self,
        error: Error,
        made: &mut Option<Communicator>,
        host: &dyn Backend,
        watch: &Watch<'_>,
    ) -> Error {
        if let Some(communicator) = made.take() {
            communicator.abort();
        }
        let error = match error {
            // NCCL says that something is wrong with a rank; the group may know which.
            Error::Backend { backend: "nccl", .. } => lost_within(INQUEST, host).unwrap_or(error),
            error => error,
        };
        let error = self.failure.get_or_init(|| watch.named(error)).clone();
        if host.failure().is_none() {
            host.abort();
        }
        error
    }

    fn lock(&self) -> MutexGuard<'_, Option<Communicator>> {
        self.communicator.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why the group failed in host memory, if it does within `limit`.
fn lost_within(limit: Duration, host: &dyn Backend) -> Option<Error> {
    let started = Instant::now();
    while started.elapsed() < limit {
        if let Err(error) = host.watch() {
            return Some(error);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// One wait for NCCL: until when, and whether the other ranks are still there.
struct Watch<'w> {
    group: &'w NcclGroup,
    host: &'w dyn Backend,
    op: String,
    seq: u64,
    started: Instant,
    looks: u32,
}

impl<'w> Watch<'w> {
    /// Looks before the first sleep: longer than a short collective on one node takes.
    const SPINS: u32 = 2_000;
    /// Between two looks, and how many of them lie between two looks at the other ranks.
    const SLEEP: Duration = Duration::from_micros(50);
    const SLEEPS: u32 = 100;

    fn new(group: &'w NcclGroup, host: &'w dyn Backend, agreed: &Agreed<'_>, seq: u64) -> Watch<'w> {
        let op = agreed.op.map_or(String::new(), |op| format!("{op}, "));
        let op = format!("nccl {}({op}{})", agreed.call.name.name(), agreed.call.dtype);
        Watch { group, host, op, seq, started: Instant::now(), looks: 0 }
    }

    /// Waits a little.
    ///
    /// # Errors
    /// `Timeout` after the group's deadline; why the group failed in host memory.
    fn pause(&mut self) -> Result<()> {
        self.looks = self.looks.saturating_add(1);
        if self.looks < Self::SPINS {
            std::hint::spin_loop();
            return Ok(());
        }
        std::thread::sleep(Self::SLEEP);
        if !self.looks.is_multiple_of(Self::SLEEPS) {
            return Ok(());
        }
        self.host.watch()?;
        let Membership { group, ranks, timeout, .. } = &self.group.membership;
        if self.started.elapsed() < *timeout {
            return Ok(());
        }
        // All have called it, or there was no roll call and nobody knows.
        let all = || ranks.to_vec();
        let (arrived, missing) = if *CALLS_ROLL { (all(), Vec::new()) } else { (Vec::new(), all()) };
        let (group, op, seq) = (group.clone(), self.op.clone(), self.seq);
        Err(Error::Timeout { group, op, seq, timeout: *timeout, arrived, missing })
    }

    /// The error with the collective in it that this rank was in.
    fn named(&self, error: Error) -> Error {
        match error {
            Error::PeerLost { group, rank, reporter, .. } => {
                Error::PeerLost { group, rank, reporter, op: self.op.clone(), seq: self.seq }
            }
            other => other,
        }
    }
}

impl DeviceBackend for NcclGroup {
    fn broadcast(
        &self,
        host: &dyn Backend,
        call: Call,
        buffer: &mut CudaBytesMut<'_>,
        root: GroupRank,
    ) -> Result<()> {
        let (context, counts) = (Arc::clone(buffer.context()), vec![buffer.len_bytes(); self.size()]);
        let agreed = Agreed { call, op: None, counts: &counts };
        self.run(host, agreed, &context, |nccl, pause| nccl.broadcast(&mut buffer.view_mut(), root.0, pause))
    }

    fn all_reduce(
        &self,
        host: &dyn Backend,
        call: Call,
        buffer: &mut CudaBytesMut<'_>,
        op: ReduceOp,
    ) -> Result<()> {
        reducible(call)?;
        let (context, counts) = (Arc::clone(buffer.context()), vec![buffer.len_bytes(); self.size()]);
        let agreed = Agreed { call, op: Some(op), counts: &counts };
        self.run(host, agreed, &context, |nccl, pause| {
            nccl.all_reduce(&mut buffer.view_mut(), (call.dtype, op), pause)
        })
    }

    fn all_gather(
        &self,
        host: &dyn Backend,
        call: Call,
        input: &CudaBytes<'_>,
        counts: &[usize],
        output: &mut [CudaBytesMut<'_>],
    ) -> Result<()> {
        let agreed = Agreed { call, op: None, counts };
        self.run(host, agreed, input.context(), |nccl, pause| {
            nccl.follow(input)?;
            let whole: usize = counts.iter().sum();
            let mut gather = |to: &mut cudarc::driver::CudaViewMut<'_, u8>| match is_even(counts) {
                true => nccl.all_gather(input.view(), to, pause),
                false => nccl.exchange(input.view(), &Exchange::of_gather(self.me(), counts), to, pause),
            };
            if let [output] = output
                && output.len_bytes() == whole
            {
                return gather(&mut output.view_mut());
            }
            // NCCL writes one piece of memory; copies on the device are an order faster than any link.
            let mut scratch = nccl.scratch(whole)?;
            gather(&mut scratch.as_view_mut())?;
            let starts = offsets(&output.iter().map(CudaBytesMut::len_bytes).collect::<Vec<_>>());
            for (piece, start) in output.iter_mut().zip(starts) {
                let part = scratch.slice(start..start + piece.len_bytes());
                nccl.copy(&part, &mut piece.view_mut())?;
            }
            Ok(())
        })
    }

    fn reduce_scatter(
        &self,
        host: &dyn Backend,
        (call, op): (Call, ReduceOp),
        input: &[CudaBytes<'_>],
        counts: &[usize],
        output: &mut CudaBytesMut<'_>,
    ) -> Result<()> {
        reducible(call)?;
        let (agreed, context) = (Agreed { call, op: Some(op), counts }, Arc::clone(output.context()));
        self.run(host, agreed, &context, |nccl, pause| {
            input.iter().try_for_each(|piece| nccl.follow(piece))?;
            let whole: usize = counts.iter().sum();
            let how = (call.dtype, op);
            let mut reduce = |from: &cudarc::driver::CudaView<'_, u8>| match is_even(counts) {
                true => nccl.reduce_scatter(from, &mut output.view_mut(), how, pause),
                false => nccl.reduce_parts(from, &reductions(counts), &mut output.view_mut(), how, pause),
            };
            if let [input] = input
                && input.len_bytes() == whole
            {
                return reduce(input.view());
            }
            let mut scratch = nccl.scratch(whole)?;
            let mut start = 0;
            for piece in input {
                let end = start + piece.len_bytes();
                nccl.copy(piece.view(), &mut scratch.slice_mut(start..end))?;
                start = end;
            }
            // What is missing at the end is padding.
            nccl.zero(&mut scratch.slice_mut(start..whole))?;
            reduce(&scratch.as_view())
        })
    }

    fn all_to_all(&self, host: &dyn Backend, call: Call, parts: Parts<'_, '_, '_>) -> Result<()> {
        let Parts { input, send, output, receive } = parts;
        let even = vec![send[self.me()]; self.size()];
        let counts = if call.name == CallName::AllToAll { &even[..] } else { &[] };
        let agreed = Agreed { call, op: None, counts };
        self.run(host, agreed, input.context(), |nccl, pause| {
            if call.name == CallName::AllToAllUneven && *CALLS_ROLL {
                self.compare_counts(host, call, send, receive)?;
            }
            nccl.follow(input)?;
            let plan = Exchange::of_parts(self.me(), send, receive);
            nccl.exchange(input.view(), &plan, &mut output.view_mut(), pause)
        })
    }
}

impl NcclGroup {
    /// Refuses, on every rank, an exchange in which a rank expects another count than is sent to it.
    fn compare_counts(
        &self,
        host: &dyn Backend,
        call: Call,
        send: &[usize],
        receive: &[usize],
    ) -> Result<()> {
        let n = self.size();
        let mine: Vec<u64> = send.iter().chain(receive).map(|count| *count as u64).collect();
        let mut all = vec![0u64; 2 * n * n];
        let lens = vec![size_of_val(&mine[..]); n];
        let output = bytemuck::cast_slice_mut(&mut all);
        host.all_gather(call, bytemuck::cast_slice(&mine), &lens, &mut [output])?;
        let (sent, expected) = (
            |from: usize, to: usize| all[2 * n * from + to],
            |from: usize, to: usize| all[2 * n * to + n + from],
        );
        let pairs = (0..n).flat_map(|from| (0..n).map(move |to| (from, to)));
        let Some((from, to)) = pairs.into_iter().find(|(from, to)| sent(*from, *to) != expected(*from, *to))
        else {
            return Ok(());
        };
        let Membership { group, ranks, .. } = &self.membership;
        Err(Error::Mismatch {
            group: group.clone(),
            seq: self.seq.load(Ordering::Relaxed),
            expected_rank: ranks[to],
            expected: format!(
                "{} of {} bytes from rank {}",
                call.name.name(),
                expected(from, to),
                ranks[from]
            ),
            got_rank: ranks[from],
            got: format!("{} of {} bytes to rank {}", call.name.name(), sent(from, to), ranks[to]),
        })
    }
}

fn same_device(call: Call, own: &Arc<CudaContext>, other: &Arc<CudaContext>) -> Result<()> {
    if own == other {
        return Ok(());
    }
    Err(Error::InvalidArgument {
        op: call.name.name(),
        what: "device".into(),
        expected: format!("CUDA device {}, which the group began with", own.ordinal()),
        got: format!("CUDA device {}", other.ordinal()),
    })
}

/// Refuses what NCCL does not reduce.
fn reducible(call: Call) -> Result<()> {
    if nccl_dtype(call.dtype).is_some() {
        return Ok(());
    }
    Err(Error::InvalidArgument {
        op: call.name.name(),
        what: "dtype".into(),
        expected: "one that NCCL reduces".into(),
        got: call.dtype.to_string(),
    })
}
