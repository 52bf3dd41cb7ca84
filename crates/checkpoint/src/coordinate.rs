//! Steps that all ranks take together: one rank's failure is the same error on every rank.

use sconce_mesh::{GroupRank, ProcessGroup};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::RankFailure;
use crate::threads::share_of_cores;
use crate::{Error, Result};

/// The ranks that save or load together; `None` is one process by itself.
#[derive(Clone, Copy)]
pub(crate) struct Ranks<'g>(pub(crate) Option<&'g ProcessGroup>);

/// The rank that plans and commits.
const COORDINATOR: GroupRank = GroupRank(0);

/// What ranks tell each other. JSON, unless that is too long.
pub(crate) trait Message: Sized {
    fn encode(&self) -> Result<Vec<u8>>;
    fn decode(bytes: &[u8]) -> Result<Self>;
}

impl<T: Serialize + DeserializeOwned> Message for T {
    fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| protocol(&error.to_string()))
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|error| protocol(&error.to_string()))
    }
}

impl<'g> Ranks<'g> {
    /// Number of ranks.
    pub(crate) fn size(self) -> usize {
        self.0.map_or(1, ProcessGroup::size)
    }

    /// This rank's position among them.
    pub(crate) fn position(self) -> usize {
        self.0.map_or(0, |group| group.group_rank().0)
    }

    /// How many threads this rank may keep busy: its share of the cores, as if all ranks were on this host.
    pub(crate) fn threads(self) -> usize {
        share_of_cores(self.size())
    }

    /// The group, if there is somebody to talk to.
    pub(crate) fn others(self) -> Option<&'g ProcessGroup> {
        self.0.filter(|group| group.size() > 1)
    }

    /// Ends a step that every rank took for itself: its value if all succeeded.
    ///
    /// # Errors
    /// `Ranks` with every failure, the same on every rank; a lone process's own error as it is.
    pub(crate) fn all_ok<T>(self, step: &str, outcome: Result<T>) -> Result<T> {
        let (value, noted) = match outcome {
            Ok(value) => (Some(value), Ok(())),
            Err(error) => (None, Err(error)),
        };
        self.gather_all(step, noted)?;
        match value {
            Some(value) => Ok(value),
            None => unreachable!("the failure of this rank is one that `gather_all` returns"),
        }
    }

    /// Ends a step that every rank took for itself: every rank's value, by group rank, if all succeeded.
    ///
    /// # Errors
    /// As [`Ranks::all_ok`].
    pub(crate) fn gather_all<T: Message>(self, step: &str, outcome: Result<T>) -> Result<Vec<T>> {
        let Some(group) = self.others() else { return Ok(vec![outcome?]) };
        let all = group.all_gather_object(&pack(outcome)?)?;
        let all = all.iter().map(|bytes| unpack(bytes));
        let outcomes = all.collect::<Result<Vec<Result<T>>>>()?;
        all_of(group, step, outcomes)
    }

    /// Every rank sends a value to the coordinator, which makes one for every rank of them.
    ///
    /// # Errors
    /// As [`Ranks::all_ok`], whichever side failed.
    ///
    /// # Source
    /// `_DistWrapper.reduce_scatter` of `torch/distributed/checkpoint/utils.py`.
    pub(crate) fn reduce_scatter<L: Message, G: Message>(
        self,
        step: &str,
        local: Result<L>,
        global: impl FnOnce(Vec<L>) -> Result<Vec<G>>,
    ) -> Result<G> {
        let Some(group) = self.others() else {
            let mut made = global(vec![local?])?;
            return made.pop().ok_or_else(|| protocol("the coordinator made nothing"));
        };
        let gathered = group.gather_object(&pack(local)?, COORDINATOR)?;
        let replies = gathered.map(|all| answer(group, step, all, global)).transpose()?;
        let reply = group.scatter_object(replies.as_deref(), COORDINATOR)?;
        unpack(&reply)?
    }
}

/// What the coordinator answers to each rank.
fn answer<L: Message, G: Message>(
    group: &ProcessGroup,
    step: &str,
    all: Vec<Vec<u8>>,
    global: impl FnOnce(Vec<L>) -> Result<Vec<G>>,
) -> Result<Vec<Vec<u8>>> {
    let outcomes = all.into_iter().map(|bytes| unpack(&bytes)).collect::<Result<Vec<Result<L>>>>()?;
    let made = all_of(group, step, outcomes).and_then(|values| {
        global(values).map_err(|error| match error {
            error @ Error::Mesh(_) => error,
            error => failed(step, vec![RankFailure::new(group.rank(), error)]),
        })
    });
    match made {
        Ok(made) => made.into_iter().map(|value| pack(Ok(value))).collect(),
        Err(error) => {
            let reply = pack::<G>(Err(error))?;
            Ok(vec![reply; group.size()])
        }
    }
}

/// The values of all ranks, or the failures of those that failed.
fn all_of<T>(group: &ProcessGroup, step: &str, outcomes: Vec<Result<T>>) -> Result<Vec<T>> {
    let (mut failures, mut values) = (Vec::new(), Vec::new());
    for (rank, outcome) in group.ranks().iter().zip(outcomes) {
        match outcome {
            Ok(value) => values.push(value),
            Err(error) => failures.push(RankFailure::new(*rank, error)),
        }
    }
    if failures.is_empty() { Ok(values) } else { Err(failed(step, failures)) }
}

fn failed(step: &str, failures: Vec<RankFailure>) -> Error {
    Error::Ranks { step: step.to_owned(), failures }
}

const OK: u8 = 0;
const FAILED: u8 = 1;

/// An outcome as bytes. A broken group is returned at once: nobody can be told.
fn pack<T: Message>(outcome: Result<T>) -> Result<Vec<u8>> {
    let (kind, body) = match outcome {
        Ok(value) => (OK, value.encode()?),
        Err(error @ Error::Mesh(_)) => return Err(error),
        Err(error) => (FAILED, error.encode()?),
    };
    let mut bytes = body;
    bytes.push(kind);
    Ok(bytes)
}

fn unpack<T: Message>(bytes: &[u8]) -> Result<Result<T>> {
    match bytes.split_last() {
        Some((&OK, body)) => T::decode(body).map(Ok),
        Some((&FAILED, body)) => Error::decode(body).map(Err),
        _ => Err(protocol("bytes of another kind")),
    }
}

/// Ranks of one version understand each other; of several they may not.
pub(crate) fn protocol(cause: &str) -> Error {
    Error::ValueMismatch {
        fqn: "message between ranks".to_owned(),
        expected: "one of this version of sconce-checkpoint".to_owned(),
        got: cause.to_owned(),
    }
}
