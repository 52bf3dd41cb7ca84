//! Recorded: any backend with its calls in a flight recorder, which it dumps when the group fails.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::{Backend, Call, Drain, Fill};
use crate::flight_recorder::{CollectiveState, Described, FlightRecorder};
use crate::{Error, GroupRank, ReduceOp, Result};

/// Directory for the records of groups that fail.
const DUMP_DIR: &str = "SCONCE_FLIGHT_DIR";

pub(crate) struct Recorded {
    inner: Box<dyn Backend>,
    recorder: Arc<FlightRecorder>,
    /// This rank in the group.
    me: usize,
    dumped: AtomicBool,
    /// Of a collective that the inner backend did not carry out itself.
    failure: OnceLock<Error>,
}

impl Recorded {
    pub(crate) fn new(inner: Box<dyn Backend>, recorder: Arc<FlightRecorder>) -> Self {
        let me = recorder.group_rank();
        Recorded { inner, recorder, me, dumped: AtomicBool::new(false), failure: OnceLock::new() }
    }

    fn record(&self, call: Described, run: impl FnOnce(&dyn Backend) -> Result<()>) -> Result<()> {
        if let Some(error) = self.failure.get() {
            return Err(error.clone());
        }
        let seq = self.recorder.begin(call);
        let result = self.recorder.in_span(seq, &call, || run(&*self.inner));
        let state = if result.is_ok() { CollectiveState::Completed } else { CollectiveState::Failed };
        self.recorder.end(seq, state);
        if let Err(error) = &result {
            self.dump(error);
        }
        result
    }

    /// Records a collective of device memory, which `run` carries out with the help of the inner backend. Its failure is the
    /// group's.
    #[cfg(feature = "cuda")]
    pub(crate) fn device(
        &self,
        (call, op): (Call, Option<ReduceOp>),
        (bytes, received): (usize, usize),
        run: impl FnOnce(&dyn Backend) -> Result<()>,
    ) -> Result<()> {
        let done = self.record(described(call, op, bytes, received), run);
        done.inspect_err(|error| {
            if !matches!(error, Error::InvalidArgument { .. }) {
                self.failure.get_or_init(|| error.clone());
                // The others may wait for this rank.
                if self.inner.failure().is_none() {
                    self.inner.abort();
                }
            }
        })
    }

    /// Writes the record of the first failure, if a directory is set. What cannot be written must not hide the failure.
    fn dump(&self, error: &Error) {
        let Some(dir) = std::env::var_os(DUMP_DIR) else { return };
        if self.dumped.swap(true, Ordering::Relaxed) {
            return;
        }
        let record = self.recorder.snapshot();
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let group: String = record.group.chars().map(plain).collect();
        let path = Path::new(&dir).join(format!("rank-{}-{}.txt", record.rank, group.trim_end_matches('-')));
        let _unwritable =
            std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(path, format!("{error}\n\n{record}")));
    }
}

fn described(call: Call, op: Option<ReduceOp>, bytes: usize, received: usize) -> Described {
    Described { call: Some(call), op, bytes, received }
}

/// What the others hold of `counts`, one a rank.
fn of_others(counts: &[usize], me: usize) -> usize {
    counts.iter().enumerate().filter(|(g, _)| *g != me).map(|(_, count)| count).sum()
}

/// The part of an all_reduce of `bytes` that rank `me` of `n` reduces, in the others' terms, and the parts that they
/// reduce.
fn all_reduce_received(bytes: usize, n: usize, me: usize) -> usize {
    let own = bytes * (me + 1) / n - bytes * me / n;
    (n - 1) * own + bytes - own
}

impl Backend for Recorded {
    fn barrier(&self) -> Result<()> {
        self.record(Described { call: None, op: None, bytes: 0, received: 0 }, |inner| inner.barrier())
    }

    fn broadcast(&self, call: Call, buffer: &mut [u8], root: GroupRank) -> Result<()> {
        let received = if self.me == root.0 { 0 } else { buffer.len() };
        self.record(described(call, None, buffer.len(), received), |inner| {
            inner.broadcast(call, buffer, root)
        })
    }

    fn all_reduce(&self, call: Call, buffer: &mut [u8], op: ReduceOp) -> Result<()> {
        let received = all_reduce_received(buffer.len(), self.recorder.n_ranks(), self.me);
        let call_with_sizes = described(call, Some(op), buffer.len(), received);
        self.record(call_with_sizes, |inner| inner.all_reduce(call, buffer, op))
    }

    fn all_gather(&self, call: Call, input: &[u8], counts: &[usize], output: &mut [&mut [u8]]) -> Result<()> {
        let call_with_sizes = described(call, None, counts.iter().sum(), of_others(counts, self.me));
        self.record(call_with_sizes, |inner| inner.all_gather(call, input, counts, output))
    }

    fn reduce_scatter(
        &self,
        call: Call,
        op: ReduceOp,
        input: &[&[u8]],
        counts: &[usize],
        output: &mut [u8],
    ) -> Result<()> {
        let received = (self.recorder.n_ranks() - 1) * output.len();
        let call_with_sizes = described(call, Some(op), counts.iter().sum(), received);
        self.record(call_with_sizes, |inner| inner.reduce_scatter(call, op, input, counts, output))
    }

    fn all_to_all(
        &self,
        call: Call,
        input: &[u8],
        send: &[usize],
        output: &mut [u8],
        receive: &[usize],
    ) -> Result<()> {
        let bytes = input.len().max(output.len());
        let call_with_sizes = described(call, None, bytes, of_others(receive, self.me));
        self.record(call_with_sizes, |inner| inner.all_to_all(call, input, send, output, receive))
    }

    fn all_gather_streamed(
        &self,
        call: Call,
        input: &[u8],
        counts: &[usize],
        drain: &mut Drain<'_>,
    ) -> Result<()> {
        let call_with_sizes = described(call, None, counts.iter().sum(), of_others(counts, self.me));
        self.record(call_with_sizes, |inner| inner.all_gather_streamed(call, input, counts, drain))
    }

    fn all_to_all_streamed(
        &self,
        call: Call,
        send: &[usize],
        receive: &[usize],
        fill: &mut Fill<'_>,
        drain: &mut Drain<'_>,
    ) -> Result<()> {
        let bytes = send.iter().sum::<usize>().max(receive.iter().sum());
        let call_with_sizes = described(call, None, bytes, of_others(receive, self.me));
        self.record(call_with_sizes, |inner| inner.all_to_all_streamed(call, send, receive, fill, drain))
    }

    #[cfg(feature = "nccl")]
    fn roll_call(&self, call: Call, op: Option<ReduceOp>, counts: &[usize]) -> Result<()> {
        self.record(described(call, op, 0, 0), |inner| inner.roll_call(call, op, counts))
    }

    #[cfg(feature = "nccl")]
    fn watch(&self) -> Result<()> {
        self.failure.get().map_or_else(|| self.inner.watch(), |error| Err(error.clone()))
    }

    fn abort(&self) {
        self.inner.abort();
    }

    fn failure(&self) -> Option<Error> {
        self.failure.get().cloned().or_else(|| self.inner.failure())
    }
}
