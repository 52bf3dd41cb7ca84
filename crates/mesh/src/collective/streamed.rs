//! Collectives whose data are made and taken piece by piece, for layouts that would else be packed into buffers first.
//!
//! Units are bytes here, as a piece may hold elements of several tensors.

use std::cell::RefCell;

use super::call;
use super::check::{len_is, n_counts, total};
use crate::backend::CallName;
use crate::{Error, GroupRank, ProcessGroup, Result};

impl ProcessGroup {
    /// Gathers inputs of different lengths and hands them to `drain` in pieces: whose bytes, where they begin in its
    /// input, the bytes. Each rank's pieces come in order, this rank's own among them.
    ///
    /// # Errors
    /// `InvalidArgument` if there is not one count a rank, or the input does not fit them; the first error of `drain`,
    /// upon which the group is aborted for all ranks.
    pub fn all_gather_streamed<E: From<Error>>(
        &self,
        input: &[u8],
        counts: &[usize],
        mut drain: impl FnMut(GroupRank, usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        const OP: &str = "all_gather_streamed";
        n_counts(OP, "number of counts", self.size(), counts.len())?;
        len_is(OP, "length of input", Some(counts[self.group_rank().0]), input.len())?;
        let first = FirstError::new(self);
        let result = self.backend()?.all_gather_streamed(
            call::<u8>(CallName::AllGather),
            input,
            counts,
            &mut |g, offset, bytes| first.of(drain(GroupRank(g), offset, bytes)),
        );
        first.outcome(result)
    }

    /// Sends `send_counts[g]` bytes to group rank g, which `fill` makes in pieces, and receives `receive_counts[g]`
    /// from it, which `drain` takes in pieces: whose bytes, where they begin in its part, the bytes. Each rank's
    /// pieces are asked for and come in order. What a rank keeps is its own affair: its own counts are 0.
    ///
    /// # Errors
    /// `InvalidArgument` if there is not one count a rank or a rank sends to itself; `Mismatch` on all ranks if one
    /// expects another count than is sent to it; the first error of `fill` or `drain`, upon which the group is aborted
    /// for all ranks.
    pub fn all_to_all_streamed<E: From<Error>>(
        &self,
        send_counts: &[usize],
        receive_counts: &[usize],
        mut fill: impl FnMut(GroupRank, usize, &mut [u8]) -> Result<(), E>,
        mut drain: impl FnMut(GroupRank, usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        const OP: &str = "all_to_all_streamed";
        n_counts(OP, "number of send counts", self.size(), send_counts.len())?;
        n_counts(OP, "number of receive counts", self.size(), receive_counts.len())?;
        let me = self.group_rank().0;
        let own = total(&[send_counts[me], receive_counts[me]]).unwrap_or(usize::MAX);
        len_is(OP, "count this rank sends to itself", Some(0), own)?;
        let first = FirstError::new(self);
        let result = self.backend()?.all_to_all_streamed(
            call::<u8>(CallName::AllToAllUneven),
            send_counts,
            receive_counts,
            &mut |g, offset, bytes| first.of(fill(GroupRank(g), offset, bytes)),
            &mut |g, offset, bytes| first.of(drain(GroupRank(g), offset, bytes)),
        );
        first.outcome(result)
    }
}

/// The first error of the caller's functions, which ends the collective for all ranks.
struct FirstError<'g, E> {
    group: &'g ProcessGroup,
    error: RefCell<Option<E>>,
}

impl<'g, E: From<Error>> FirstError<'g, E> {
    fn new(group: &'g ProcessGroup) -> Self {
        Self { group, error: RefCell::new(None) }
    }

    /// What the backend is told.
    fn of(&self, result: Result<(), E>) -> Result<()> {
        result.map_err(|error| {
            self.error.replace(Some(error));
            Error::Aborted { group: self.group.name().into(), rank: self.group.rank() }
        })
    }

    fn outcome(self, result: Result<()>) -> Result<(), E> {
        match self.error.into_inner() {
            None => Ok(result?),
            Some(error) => {
                self.group.abort();
                Err(error)
            }
        }
    }
}
