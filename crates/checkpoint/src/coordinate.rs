//! Steps that all ranks take together: one rank's failure is the same error on every rank.

use sconce_mesh::{GroupRank, ProcessGroup};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::RankFailure;
use crate::{Error, Result};

/// The ranks that save or load together; `None` is one process by itself.
#[derive(Clone, Copy)]
pub(crate) struct Ranks<'g>(pub(crate) Option<&'g ProcessGroup>);

/// The rank that plans and commits.
const COORDINATOR: GroupRank = GroupRank(0);

impl Ranks<'_> {
    /// Number of ranks.
    pub(crate) fn size(self) -> usize {
        self.0.map_or(1, ProcessGroup::size)
    }

    /// Ends a step that every rank took for itself: its value if all succeeded.
    ///
    /// # Errors
    /// `Ranks` with every failure, the same on every rank; a lone process's own error as it is.
    pub(crate) fn all_ok<T>(self, step: &str, outcome: Result<T>) -> Result<T> {
        let Some(group) = self.0.filter(|group| group.size() > 1) else { return outcome };
        let (mine, value) = split(outcome)?;
        let all = group.all_gather_object(&encode(&mine)?)?;
        let failures = decode_failures(group, &all)?;
        match value {
            Some(value) if failures.is_empty() => Ok(value),
            _ => Err(Error::Ranks { step: step.to_owned(), failures }),
        }
    }

    /// Every rank sends a value to the coordinator, which makes one for every rank of them.
    ///
    /// # Errors
    /// As [`Ranks::all_ok`], whichever side failed.
    ///
    /// # Source
    /// `_DistWrapper.reduce_scatter` of `torch/distributed/checkpoint/utils.py`.
    pub(crate) fn reduce_scatter<L, G>(
        self,
        step: &str,
        local: Result<L>,
        global: impl FnOnce(Vec<L>) -> Result<Vec<G>>,
    ) -> Result<G>
    where
        L: Serialize + DeserializeOwned,
        G: Serialize + DeserializeOwned,
    {
        let Some(group) = self.0.filter(|group| group.size() > 1) else {
            let mut made = global(vec![local?])?;
            return made.pop().ok_or_else(|| protocol("the coordinator made nothing"));
        };
        let (failure, value) = split(local)?;
        let gathered = group.gather_object(&encode(&(failure, value))?, COORDINATOR)?;
        let replies = gathered.map(|all| answer(group, step, &all, global)).transpose()?;
        let reply = group.scatter_object(replies.as_deref(), COORDINATOR)?;
        decode::<Result<G>>(&reply)?
    }
}

/// What the coordinator answers to each rank.
fn answer<L: DeserializeOwned, G: Serialize>(
    group: &ProcessGroup,
    step: &str,
    all: &[Vec<u8>],
    global: impl FnOnce(Vec<L>) -> Result<Vec<G>>,
) -> Result<Vec<Vec<u8>>> {
    let (mut failures, mut values) = (Vec::new(), Vec::new());
    for (rank, bytes) in group.ranks().iter().zip(all) {
        let (failure, value): (Option<Error>, Option<L>) = decode(bytes)?;
        failures.extend(failure.map(|error| RankFailure::new(*rank, error)));
        values.extend(value);
    }
    if failures.is_empty() {
        match global(values) {
            Ok(made) => return made.into_iter().map(|value| encode(&Result::<G>::Ok(value))).collect(),
            Err(error @ Error::Mesh(_)) => return Err(error),
            Err(error) => failures.push(RankFailure::new(group.rank(), error)),
        }
    }
    let error = Error::Ranks { step: step.to_owned(), failures };
    let reply = encode(&Result::<G>::Err(error))?;
    Ok(vec![reply; group.size()])
}

/// A failure that can be told to others, or a value. A broken group is returned at once: nobody can be told.
fn split<T>(outcome: Result<T>) -> Result<(Option<Error>, Option<T>)> {
    match outcome {
        Ok(value) => Ok((None, Some(value))),
        Err(error @ Error::Mesh(_)) => Err(error),
        Err(error) => Ok((Some(error), None)),
    }
}

fn decode_failures(group: &ProcessGroup, all: &[Vec<u8>]) -> Result<Vec<RankFailure>> {
    let mut failures = Vec::new();
    for (rank, bytes) in group.ranks().iter().zip(all) {
        let failure: Option<Error> = decode(bytes)?;
        failures.extend(failure.map(|error| RankFailure::new(*rank, error)));
    }
    Ok(failures)
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| protocol(&error.to_string()))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| protocol(&error.to_string()))
}

/// Ranks of one version understand each other; of several they may not.
fn protocol(cause: &str) -> Error {
    Error::ValueMismatch {
        fqn: "message between ranks".to_owned(),
        expected: "one of this version of sconce-checkpoint".to_owned(),
        got: cause.to_owned(),
    }
}
