//! Faulted: any backend with a hook before and after each of its calls, where tests make a rank fail, wait, stop or die.
//!
//! Feature `test-faults` compiles it; no build for users has it.

use std::sync::OnceLock;

use super::{Backend, Call, Drain, Fill};
use crate::{Error, GroupRank, Rank, ReduceOp, Result};

/// A place in a collective at which a test may strike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultSite {
    /// The rank that is there.
    pub rank: Rank,
    /// The group's name.
    pub group: String,
    /// What the group's user called.
    pub op: &'static str,
    /// Before the call, or after it.
    pub is_before: bool,
}

/// What tests do there. An error becomes the call's, and the group's failure on this rank.
pub type FaultHook = dyn Fn(&FaultSite) -> Result<()> + Send + Sync;

static HOOK: OnceLock<Box<FaultHook>> = OnceLock::new();

/// Calls `hook` around every collective of this process from now on; false if there is one already, which stays.
pub fn set_fault_hook(hook: Box<FaultHook>) -> bool {
    HOOK.set(hook).is_ok()
}

pub(crate) struct Faulted {
    inner: Box<dyn Backend>,
    group: String,
    rank: Rank,
    failure: OnceLock<Error>,
}

impl Faulted {
    pub(crate) fn new(inner: Box<dyn Backend>, group: &str, rank: Rank) -> Self {
        Faulted { inner, group: group.to_owned(), rank, failure: OnceLock::new() }
    }

    fn around(&self, op: &'static str, run: impl FnOnce(&dyn Backend) -> Result<()>) -> Result<()> {
        if let Some(error) = self.failure.get() {
            return Err(error.clone());
        }
        self.strike(op, true)?;
        run(&*self.inner)?;
        self.strike(op, false)
    }

    fn strike(&self, op: &'static str, is_before: bool) -> Result<()> {
        let Some(hook) = HOOK.get() else { return Ok(()) };
        let site = FaultSite { rank: self.rank, group: self.group.clone(), op, is_before };
        hook(&site).map_err(|error| self.failure.get_or_init(|| error).clone())
    }
}

impl Backend for Faulted {
    fn barrier(&self) -> Result<()> {
        self.around("barrier", |inner| inner.barrier())
    }

    fn broadcast(&self, call: Call, buffer: &mut [u8], root: GroupRank) -> Result<()> {
        self.around(call.name.name(), |inner| inner.broadcast(call, buffer, root))
    }

    fn all_reduce(&self, call: Call, buffer: &mut [u8], op: ReduceOp) -> Result<()> {
        self.around(call.name.name(), |inner| inner.all_reduce(call, buffer, op))
    }

    fn all_gather(&self, call: Call, input: &[u8], counts: &[usize], output: &mut [&mut [u8]]) -> Result<()> {
        self.around(call.name.name(), |inner| inner.all_gather(call, input, counts, output))
    }

    fn reduce_scatter(
        &self,
        call: Call,
        op: ReduceOp,
        input: &[&[u8]],
        counts: &[usize],
        output: &mut [u8],
    ) -> Result<()> {
        self.around(call.name.name(), |inner| inner.reduce_scatter(call, op, input, counts, output))
    }

    fn all_to_all(
        &self,
        call: Call,
        input: &[u8],
        send: &[usize],
        output: &mut [u8],
        receive: &[usize],
    ) -> Result<()> {
        self.around(call.name.name(), |inner| inner.all_to_all(call, input, send, output, receive))
    }

    fn all_gather_streamed(
        &self,
        call: Call,
        input: &[u8],
        counts: &[usize],
        drain: &mut Drain<'_>,
    ) -> Result<()> {
        self.around(call.name.name(), |inner| inner.all_gather_streamed(call, input, counts, drain))
    }

    fn all_to_all_streamed(
        &self,
        call: Call,
        send: &[usize],
        receive: &[usize],
        fill: &mut Fill<'_>,
        drain: &mut Drain<'_>,
    ) -> Result<()> {
        self.around(call.name.name(), |inner| inner.all_to_all_streamed(call, send, receive, fill, drain))
    }

    #[cfg(feature = "nccl")]
    fn roll_call(&self, call: Call, op: Option<ReduceOp>, counts: &[usize]) -> Result<()> {
        self.around(call.name.name(), |inner| inner.roll_call(call, op, counts))
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
