//! The backend of a group of one: every collective is a copy, with no shared state and no system call.

use std::sync::OnceLock;

use super::pieces::Source;
use super::{Backend, Call};
use crate::{Error, GroupRank, Rank, ReduceOp, Result};

/// A group of one rank.
pub(crate) struct Solo {
    group: String,
    rank: Rank,
    failure: OnceLock<Error>,
}

impl Solo {
    pub(crate) fn new(group: String, rank: Rank) -> Self {
        Solo { group, rank, failure: OnceLock::new() }
    }

    fn check(&self) -> Result<()> {
        self.failure().map_or(Ok(()), Err)
    }
}

impl Backend for Solo {
    fn barrier(&self) -> Result<()> {
        self.check()
    }

    fn broadcast(&self, _call: Call, _buffer: &mut [u8], _root: GroupRank) -> Result<()> {
        self.check()
    }

    fn all_reduce(&self, _call: Call, _buffer: &mut [u8], _op: ReduceOp) -> Result<()> {
        self.check()
    }

    fn all_gather(
        &self,
        _call: Call,
        input: &[u8],
        _counts: &[usize],
        output: &mut [&mut [u8]],
    ) -> Result<()> {
        self.check()?;
        super::pieces::Sink::new(output).write(0, input);
        Ok(())
    }

    fn reduce_scatter(
        &self,
        _call: Call,
        _op: ReduceOp,
        input: &[&[u8]],
        _counts: &[usize],
        output: &mut [u8],
    ) -> Result<()> {
        self.check()?;
        Source::new(input).read(0, output);
        Ok(())
    }

    fn all_to_all(
        &self,
        _call: Call,
        input: &[u8],
        _send: &[usize],
        output: &mut [u8],
        _receive: &[usize],
    ) -> Result<()> {
        self.check()?;
        output.copy_from_slice(input);
        Ok(())
    }

    #[cfg(feature = "nccl")]
    fn roll_call(&self, _call: Call, _op: Option<ReduceOp>, _counts: &[usize]) -> Result<()> {
        self.check()
    }

    fn abort(&self) {
        self.failure.get_or_init(|| Error::Aborted { group: self.group.clone(), rank: self.rank });
    }

    fn failure(&self) -> Option<Error> {
        self.failure.get().cloned()
    }
}
