//! MpiGroup: one rank's end of a group whose ranks may be on several hosts. Here: what every collective begins with, and
//! how each failure becomes the same error on all ranks. What the collectives move is in `turn.rs`.
//!
//! ```text
//! host a      ranks ──shared memory──▶ leader ┐          ┌ leader ──shared memory──▶ ranks      host b
//!                                             └── MPI ───┘
//! ```
//!
//! Every collective first carries all ranks' fingerprints over this path, so that every rank can compare all of them. A
//! group whose ranks share a host is in shared memory alone.
//!
//! A rank that fails tells all others by a notice, which ends their waits: in MPI at once, in shared memory within
//! 20 ms. Deadlines are staggered so that who is waited for is named by those who know best: ranks wait for their
//! host's ranks until the deadline, leaders for other leaders a little longer, and ranks for their leader longest.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::notice::Cause;
use super::placement::Placement;
use super::turn::Turn;
use super::wire::{Tags, Wire};
use crate::backend::fingerprint::Fingerprint;
use crate::backend::local::Endpoint;
use crate::backend::{Backend, Call, CallName, Membership};
use crate::{Error, GroupRank, Rank, ReduceOp, Result};

pub(crate) struct MpiGroup {
    pub(super) membership: Membership,
    pub(super) placement: Placement,
    /// The ranks of this host; absent where this rank is alone.
    pub(super) inner: Option<Endpoint>,
    pub(super) wire: Arc<Wire>,
    pub(super) key: u64,
    pub(super) tags: Tags,
    seq: Mutex<u64>,
    failure: OnceLock<Error>,
}

/// Why a collective cannot go on.
pub(super) enum Trouble {
    /// Because of a rank; the others may have to be told.
    Cause(Cause),
    /// Something that every rank finds by itself, or that concerns this rank alone.
    Error(Error),
}

impl MpiGroup {
    pub(super) fn new(
        membership: Membership,
        placement: Placement,
        inner: Option<Endpoint>,
        wire: Arc<Wire>,
        (key, tags): (u64, Tags),
    ) -> MpiGroup {
        if let Some(inner) = &inner {
            let wire = Arc::clone(&wire);
            inner.stop_when(move || wire.cause(key).is_some());
        }
        let (seq, failure) = (Mutex::new(0), OnceLock::new());
        MpiGroup { membership, placement, inner, wire, key, tags, seq, failure }
    }

    fn timeout(&self) -> Duration {
        self.membership.timeout
    }

    /// How long notices and messages under way may take after the deadline.
    fn grace(&self) -> Duration {
        (self.timeout() / 4).clamp(Duration::from_millis(200), Duration::from_secs(2))
    }

    /// How long ranks wait for the ranks of their host.
    pub(super) fn patience_on_host(&self) -> Duration {
        self.timeout()
    }

    /// How long leaders wait for leaders.
    pub(super) fn patience_across(&self) -> Duration {
        self.timeout().saturating_add(self.grace())
    }

    /// How long ranks wait for their leader.
    pub(super) fn patience_for_leader(&self) -> Duration {
        self.patience_across().saturating_add(self.grace())
    }

    /// Carries out one collective; `fingerprint` gets its sequence number.
    fn run(
        &self,
        fingerprint: impl FnOnce(u64) -> Fingerprint,
        body: impl FnOnce(&Turn<'_>) -> Result<(), Trouble>,
    ) -> Result<()> {
        let mut seq = self.seq.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = self.failure() {
            return Err(error);
        }
        *seq += 1;
        let call = fingerprint(*seq);
        let known = self.wire.cause(self.key).map_or(Ok(()), |cause| Err(Trouble::Cause(cause)));
        let done = known.and_then(|()| body(&Turn { group: self, call: &call }));
        done.map_err(|trouble| self.fail(trouble, &call))
    }

    /// Fails the group here and on all ranks.
    fn fail(&self, trouble: Trouble, call: &Fingerprint) -> Error {
        let error = match trouble {
            Trouble::Cause(cause) => {
                self.wire.announce(&self.membership.ranks, self.key, &cause);
                // Another may have been first.
                self.error(self.wire.cause(self.key).unwrap_or(cause), call)
            }
            Trouble::Error(error) => {
                if !matches!(error, Error::Mismatch { .. }) {
                    let cause = Cause::Aborted(self.wire.rank());
                    self.wire.announce(&self.membership.ranks, self.key, &cause);
                }
                error
            }
        };
        self.failure.get_or_init(|| error).clone()
    }

    fn error(&self, cause: Cause, call: &Fingerprint) -> Error {
        let group = self.membership.group.clone();
        let (op, seq) = (call.describe(), call.seq());
        match cause {
            Cause::Lost(rank) | Cause::Left(rank) => {
                Error::PeerLost { group, rank, reporter: self.wire.rank(), op, seq }
            }
            Cause::Aborted(rank) => Error::Aborted { group, rank },
            Cause::Timeout(missing) => {
                let ranks = self.membership.ranks.iter().copied();
                let arrived = ranks.filter(|rank| !missing.contains(rank)).collect();
                Error::Timeout { group, op, seq, timeout: self.timeout(), arrived, missing }
            }
        }
    }

    /// What went wrong on this host, in terms of the group.
    pub(super) fn trouble_on_host(&self, error: Error) -> Trouble {
        if let Some(cause) = self.wire.cause(self.key) {
            return Trouble::Cause(cause);
        }
        let group = self.membership.group.clone();
        match error {
            Error::PeerLost { rank, .. } => Trouble::Cause(Cause::Left(self.of_host(rank))),
            Error::Aborted { rank, .. } => Trouble::Cause(Cause::Aborted(self.of_host(rank))),
            Error::Timeout { missing, .. } => {
                Trouble::Cause(Cause::Timeout(missing.into_iter().map(|rank| self.of_host(rank)).collect()))
            }
            Error::Mismatch { seq, expected_rank, expected, got_rank, got, .. } => {
                let (expected_rank, got_rank) = (self.of_host(expected_rank), self.of_host(got_rank));
                Trouble::Error(Error::Mismatch { group, seq, expected_rank, expected, got_rank, got })
            }
            other => Trouble::Error(other),
        }
    }

    /// World rank of a rank as this host counts.
    fn of_host(&self, rank: Rank) -> Rank {
        self.wire.host().and_then(|(_, ranks)| ranks.get(rank.0).copied()).unwrap_or(rank)
    }
}

impl Backend for MpiGroup {
    fn barrier(&self) -> Result<()> {
        self.run(Fingerprint::barrier, |turn| match turn.on_one_host() {
            Some(inner) => turn.done_on_host(inner.barrier()),
            None => turn.agree(),
        })
    }

    fn broadcast(&self, call: Call, buffer: &mut [u8], root: GroupRank) -> Result<()> {
        let bytes = buffer.len();
        self.run(
            |seq| Fingerprint::new(seq, call, bytes),
            |turn| match turn.on_one_host() {
                Some(inner) => turn.done_on_host(inner.broadcast(call, buffer, root)),
                None => turn.agree().and_then(|()| turn.broadcast(buffer, root.0)),
            },
        )
    }

    fn all_reduce(&self, call: Call, buffer: &mut [u8], op: ReduceOp) -> Result<()> {
        let bytes = buffer.len();
        self.run(
            |seq| Fingerprint::new(seq, call, bytes).with_op(op),
            |turn| match turn.on_one_host() {
                Some(inner) => turn.done_on_host(inner.all_reduce(call, buffer, op)),
                None => turn.agree().and_then(|()| turn.all_reduce(buffer, call.dtype, op)),
            },
        )
    }

    fn all_gather(&self, call: Call, input: &[u8], counts: &[usize], output: &mut [&mut [u8]]) -> Result<()> {
        self.run(
            |seq| Fingerprint::counted(seq, call, counts),
            |turn| match turn.on_one_host() {
                Some(inner) => turn.done_on_host(inner.all_gather(call, input, counts, output)),
                None => turn.agree().and_then(|()| turn.all_gather(input, counts, output)),
            },
        )
    }

    fn reduce_scatter(
        &self,
        call: Call,
        op: ReduceOp,
        input: &[&[u8]],
        counts: &[usize],
        output: &mut [u8],
    ) -> Result<()> {
        self.run(
            |seq| Fingerprint::counted(seq, call, counts).with_op(op),
            |turn| match turn.on_one_host() {
                Some(inner) => turn.done_on_host(inner.reduce_scatter(call, op, input, counts, output)),
                None => {
                    turn.agree().and_then(|()| turn.reduce_scatter((call.dtype, op), input, counts, output))
                }
            },
        )
    }

    fn all_to_all(
        &self,
        call: Call,
        input: &[u8],
        send: &[usize],
        output: &mut [u8],
        receive: &[usize],
    ) -> Result<()> {
        let even = call.name == CallName::AllToAll;
        let bytes = if even { send[self.membership.group_rank] } else { 0 };
        self.run(
            |seq| Fingerprint::new(seq, call, bytes),
            |turn| match turn.on_one_host() {
                Some(inner) => turn.done_on_host(inner.all_to_all(call, input, send, output, receive)),
                None => {
                    turn.agree()?;
                    let longest = if even { bytes } else { turn.agree_on_counts(send, receive)? };
                    turn.all_to_all(input, send, output, receive, longest)
                }
            },
        )
    }

    #[cfg(feature = "nccl")]
    fn roll_call(&self, call: Call, op: Option<ReduceOp>, counts: &[usize]) -> Result<()> {
        let fingerprint = |seq| {
            let fingerprint = Fingerprint::counted(seq, call, counts).on_device();
            op.map_or(fingerprint, |op| fingerprint.with_op(op))
        };
        self.run(fingerprint, |turn| match turn.on_one_host() {
            Some(inner) => turn.done_on_host(inner.roll_call(call, op, counts)),
            None => turn.agree(),
        })
    }

    #[cfg(feature = "nccl")]
    fn watch(&self) -> Result<()> {
        let known = self.failure().or_else(|| {
            let cause = self.wire.cause(self.key)?;
            Some(self.failure.get_or_init(|| self.error(cause, &Fingerprint::barrier(0))).clone())
        });
        known.map_or(Ok(()), Err)
    }

    fn abort(&self) {
        let cause = Cause::Aborted(self.wire.rank());
        self.wire.announce(&self.membership.ranks, self.key, &cause);
        if let Some(inner) = &self.inner {
            inner.abort();
        }
        let cause = self.wire.cause(self.key).unwrap_or(cause);
        self.failure.get_or_init(|| self.error(cause, &Fingerprint::barrier(0)));
    }

    fn failure(&self) -> Option<Error> {
        self.failure.get().cloned()
    }
}
