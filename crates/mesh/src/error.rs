//! What can go wrong between ranks. One variant is one cause that a caller can act on.

use std::time::Duration;

use crate::Rank;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a process group, store or device mesh operation failed.
///
/// It is `Clone`: a group that failed answers every later call with the same cause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The ranks of a group issued different collectives; every rank gets this same error.
    #[error(
        "group {group}: ranks disagree at collective {seq}: rank {expected_rank} called {expected}, \
         rank {got_rank} called {got}"
    )]
    Mismatch {
        /// Name of the group.
        group: String,
        /// Sequence number of the collective, as the rank that reports it counts.
        seq: u64,
        /// The group's first rank, whose call is the reference.
        expected_rank: Rank,
        /// What that rank called, with dtype and sizes.
        expected: String,
        /// The first rank that differs.
        got_rank: Rank,
        /// What it called.
        got: String,
    },

    /// A rank's process died, or it left the group while others still needed it.
    #[error("group {group}: rank {rank} was lost during {op} (collective {seq} of rank {reporter})")]
    PeerLost {
        /// Name of the group.
        group: String,
        /// The rank that is gone.
        rank: Rank,
        /// The rank that reports it.
        reporter: Rank,
        /// What the reporter was doing.
        op: String,
        /// The reporter's sequence number.
        seq: u64,
    },

    /// The deadline passed before all ranks arrived.
    #[error(
        "group {group}: {op} (collective {seq}) timed out after {timeout:?}: \
         arrived {arrived:?}, missing {missing:?}"
    )]
    Timeout {
        /// Name of the group.
        group: String,
        /// What was waited for.
        op: String,
        /// Sequence number of the collective.
        seq: u64,
        /// The deadline that passed.
        timeout: Duration,
        /// Ranks that arrived.
        arrived: Vec<Rank>,
        /// Ranks that did not.
        missing: Vec<Rank>,
    },

    /// A rank gave the group up: it called `abort`, or a panic cut one of its collectives short.
    #[error("group {group}: rank {rank} aborted the group")]
    Aborted {
        /// Name of the group.
        group: String,
        /// The rank that gave up.
        rank: Rank,
    },

    /// An argument that cannot be right, found before anything was sent.
    #[error("{op}: {what}: expected {expected}, got {got}")]
    InvalidArgument {
        /// The operation that was called.
        op: &'static str,
        /// The argument, and the rank or group it concerns where that helps.
        what: String,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        got: String,
    },

    /// The environment describes no valid rank.
    #[error("environment variable {name}: expected {expected}, got {got:?}")]
    Environment {
        /// The variable.
        name: String,
        /// What would have been accepted.
        expected: &'static str,
        /// What it holds, if it is set.
        got: Option<String>,
    },

    /// The rendezvous store failed or answered too late.
    #[error("store: {op} {key:?}: {cause}")]
    Store {
        /// The operation.
        op: &'static str,
        /// The key it concerned; the address for a connection.
        key: String,
        /// What happened.
        cause: String,
    },

    /// A rank process that a launcher started failed, or was still running at the deadline.
    #[error("rank {rank} {outcome}{}", if last_lines.is_empty() { String::new() } else { format!("; its last lines:\n{last_lines}") })]
    RankFailed {
        /// The first rank that failed.
        rank: Rank,
        /// Its exit code or signal.
        outcome: String,
        /// The end of what it printed, if that was captured.
        last_lines: String,
    },

    /// A system call under a backend failed.
    #[error("backend {backend}: {call} failed: {cause}")]
    Backend {
        /// The backend.
        backend: &'static str,
        /// The call.
        call: String,
        /// The system's answer.
        cause: String,
    },

    /// The feature that would answer this call is not part of this build.
    #[error("{what} needs feature `{feature}` of sconce-mesh, which this build leaves out")]
    NotCompiled {
        /// What was asked for.
        what: &'static str,
        /// The feature to turn on.
        feature: &'static str,
    },
}

impl Error {
    pub(crate) fn store(op: &'static str, key: &str, cause: String) -> Self {
        Error::Store { op, key: key.to_owned(), cause }
    }
}
