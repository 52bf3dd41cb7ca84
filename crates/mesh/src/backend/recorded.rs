//! Recorded: any backend with its calls in a flight recorder, which it dumps when the group fails.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Backend, Call};
use crate::flight_recorder::{CollectiveState, Described, FlightRecorder};
use crate::{Error, GroupRank, ReduceOp, Result};

/// Directory for the records of groups that fail.
const DUMP_DIR: &str = "SCONCE_FLIGHT_DIR";

pub(crate) struct Recorded {
    inner: Box<dyn Backend>,
    recorder: Arc<FlightRecorder>,
    dumped: AtomicBool,
}

impl Recorded {
    pub(crate) fn new(inner: Box<dyn Backend>, recorder: Arc<FlightRecorder>) -> Self {
        Recorded { inner, recorder, dumped: AtomicBool::new(false) }
    }

    fn record(&self, call: Described, run: impl FnOnce(&dyn Backend) -> Result<()>) -> Result<()> {
        let seq = self.recorder.begin(call);
        let result = run(&*self.inner);
        let state = if result.is_ok() { CollectiveState::Completed } else { CollectiveState::Failed };
        self.recorder.end(seq, state);
        if let Err(error) = &result {
            self.dump(error);
        }
        result
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
        let _unwritable = std::fs::write(path, format!("{error}\n\n{record}"));
    }
}

fn described(call: Call, op: Option<ReduceOp>, bytes: usize) -> Described {
    Described { call: Some(call), op, bytes }
}

impl Backend for Recorded {
    fn barrier(&self) -> Result<()> {
        self.record(Described { call: None, op: None, bytes: 0 }, |inner| inner.barrier())
    }

    fn broadcast(&self, call: Call, buffer: &mut [u8], root: GroupRank) -> Result<()> {
        self.record(described(call, None, buffer.len()), |inner| inner.broadcast(call, buffer, root))
    }

    fn all_reduce(&self, call: Call, buffer: &mut [u8], op: ReduceOp) -> Result<()> {
        self.record(described(call, Some(op), buffer.len()), |inner| inner.all_reduce(call, buffer, op))
    }

    fn all_gather(&self, call: Call, input: &[u8], counts: &[usize], output: &mut [&mut [u8]]) -> Result<()> {
        let call_with_sizes = described(call, None, counts.iter().sum());
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
        let call_with_sizes = described(call, Some(op), counts.iter().sum());
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
        let call_with_sizes = described(call, None, input.len().max(output.len()));
        self.record(call_with_sizes, |inner| inner.all_to_all(call, input, send, output, receive))
    }

    fn abort(&self) {
        self.inner.abort();
    }

    fn failure(&self) -> Option<Error> {
        self.inner.failure()
    }
}
