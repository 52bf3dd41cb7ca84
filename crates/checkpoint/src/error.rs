//! What can go wrong with a checkpoint. Every error can cross ranks, so that all of them return the same one.

use std::path::{Path, PathBuf};

use sconce_dtensor::DType;
use sconce_mesh::Rank;
use serde::{Deserialize, Serialize};

use crate::metadata::{BLOCK_BYTES, Metadata};
use crate::series::Skipped;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint could not be saved or loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is nothing at the path.
    #[error("{path}: no such checkpoint", path = path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },

    /// There is something at the path of a save that may not be replaced.
    #[error("{path}: exists already{hint}", path = path.display(), hint = if *is_checkpoint {
        "; set `overwrite` to replace the checkpoint"
    } else {
        " and is no checkpoint, so it is not replaced"
    })]
    AlreadyExists {
        /// The path.
        path: PathBuf,
        /// Whether it is a checkpoint that `overwrite` would replace.
        is_checkpoint: bool,
    },

    /// Another process saves to the path, or removes what is there.
    #[error("{path}: in use by another process that writes or removes it", path = path.display())]
    Busy {
        /// The path.
        path: PathBuf,
    },

    /// Another checkpoint took this one's place while the ranks opened it. Nothing was loaded.
    #[error("{path}: was replaced while ranks opened it, so that they see different checkpoints", path = path.display())]
    Replaced {
        /// The path.
        path: PathBuf,
    },

    /// A directory without a manifest: something else, or a save that was never committed.
    #[error("{path}: not a checkpoint: {reason}", path = path.display())]
    NotACheckpoint {
        /// The path.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },

    /// The system refused an operation on a file.
    #[error("{op} {path}: {cause}", path = path.display())]
    Io {
        /// The operation.
        op: String,
        /// The file.
        path: PathBuf,
        /// The system's error number, if it gave one.
        os_error: Option<i32>,
        /// The system's words.
        cause: String,
    },

    /// An object store refused an operation on an object, or could not be reached.
    #[error("{op} {object}: {cause}", object = object.display())]
    ObjectStore {
        /// The operation.
        op: String,
        /// The object's URL.
        object: PathBuf,
        /// What kind of failure it is.
        failure: ObjectFailure,
        /// The store's words.
        cause: String,
    },

    /// Bytes that are not what was saved.
    #[error("{path}: {what} at byte {offset_bytes} is damaged: expected {expected}, got {got}{}", held(fqns), path = path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The block or section.
        what: String,
        /// Where it begins in the file.
        offset_bytes: u64,
        /// Tensors of which a part lies there, if it is a block of data.
        fqns: Vec<String>,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },

    /// A file that is well formed and says what is not read here: a class that is no data, a format of other versions,
    /// names that leave its directory, claims that cannot be true.
    #[error("{path}: refused at byte {offset_bytes}: {what}", path = path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset_bytes: u64,
        /// What was found.
        what: String,
    },

    /// A file is shorter or longer than it was saved.
    #[error("{path}: expected {expected} bytes, got {got}", path = path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length in the manifest, in bytes.
        expected: u64,
        /// Its length now.
        got: u64,
    },

    /// The checkpoint was written by a later version of the format.
    #[error("{path}: format version {got}, this build reads up to {supported}", path = path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// The latest major version that is read.
        supported: u32,
        /// The version found.
        got: u32,
    },

    /// The names of the state and of the checkpoint differ.
    #[error("{path}: missing in the checkpoint {missing:?}, not asked for {unexpected:?}", path = path.display())]
    KeyMismatch {
        /// The checkpoint.
        path: PathBuf,
        /// Names that the state has and the checkpoint lacks.
        missing: Vec<String>,
        /// Names that the checkpoint has and the state lacks.
        unexpected: Vec<String>,
    },

    /// A tensor has another shape in the checkpoint, or on another rank.
    #[error("{fqn}: expected shape {expected:?}, got {got:?}")]
    ShapeMismatch {
        /// The tensor.
        fqn: String,
        /// The shape wanted, or of the first rank.
        expected: Vec<usize>,
        /// The shape found.
        got: Vec<usize>,
    },

    /// A tensor has another dtype in the checkpoint, or on another rank.
    #[error("{fqn}: expected dtype {expected}, got {got}")]
    DTypeMismatch {
        /// The tensor.
        fqn: String,
        /// The dtype wanted, or of the first rank.
        expected: String,
        /// The dtype found.
        got: String,
    },

    /// A value has another kind in the checkpoint, or another value on another rank.
    #[error("{fqn}: expected {expected}, got {got}")]
    ValueMismatch {
        /// The value.
        fqn: String,
        /// What was expected.
        expected: String,
        /// What was found.
        got: String,
    },

    /// Nobody holds a part of a tensor.
    #[error("{fqn}: nobody holds box {missing} of shape {shape:?}")]
    Uncovered {
        /// The tensor.
        fqn: String,
        /// Its global shape.
        shape: Vec<usize>,
        /// The first part that is missing.
        missing: String,
    },

    /// Two ranks hold parts of a tensor that overlap without being equal.
    #[error("{fqn}: boxes {first} and {second} overlap")]
    Overlap {
        /// The tensor.
        fqn: String,
        /// One box.
        first: String,
        /// The other.
        second: String,
    },

    /// A tensor could not be read or written in memory.
    #[error("{fqn}: {cause}")]
    Tensor {
        /// The tensor, or empty for the state as a whole.
        fqn: String,
        /// What its device said.
        cause: String,
    },

    /// A load stopped after it had overwritten a part of the state.
    #[error("{cause}; {} hold new values already: {}", count(overwritten), overwritten.join(", "))]
    PartlyLoaded {
        /// Tensors of any rank of which at least a part was overwritten, with verified bytes, sorted.
        overwritten: Vec<String>,
        /// Why it stopped.
        cause: Box<Error>,
    },

    /// A series has checkpoints, and every one of them is damaged.
    #[error("{path}: no checkpoint is whole: {}", list_skipped(skipped), path = path.display())]
    NoValidCheckpoint {
        /// The directory of the series.
        path: PathBuf,
        /// Each of them, the newest first.
        skipped: Vec<Skipped>,
    },

    /// A step failed on some ranks; every rank returns this.
    #[error("{step} failed on {}", list(failures))]
    Ranks {
        /// The step.
        step: String,
        /// Who failed, and how.
        failures: Vec<RankFailure>,
    },

    /// The ranks cannot talk any more. Only this error differs between ranks.
    #[error(transparent)]
    #[serde(skip)]
    Mesh(#[from] sconce_mesh::Error),
}

/// Why an object of an object store could not be read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ObjectFailure {
    /// There is no such object.
    NotFound,
    /// The store does not let these credentials do that, or does not know them.
    Denied,
    /// No answer within the time that one operation may take, retries included.
    Timeout,
    /// The store cannot do that, or there can be no object of that name.
    Unsupported,
    /// Something broke on the way, each time it was tried.
    Broken,
}

/// The failure of one rank in a step of all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankFailure {
    /// The rank.
    pub rank: usize,
    /// Its error.
    pub error: Error,
}

impl RankFailure {
    pub(crate) fn new(rank: Rank, error: Error) -> Self {
        Self { rank: rank.0, error }
    }
}

impl Error {
    pub(crate) fn io(op: &str, path: &Path, cause: &std::io::Error) -> Self {
        let (op, path) = (op.to_owned(), path.to_owned());
        Error::Io { op, path, os_error: cause.raw_os_error(), cause: cause.to_string() }
    }

    /// Whether it says that a checkpoint is damaged or gone, so that an earlier one may serve.
    pub(crate) fn is_damage(&self) -> bool {
        let unreadable = [rustix::io::Errno::NOENT, rustix::io::Errno::IO].map(|errno| errno.raw_os_error());
        match self {
            Error::Missing { .. }
            | Error::NotACheckpoint { .. }
            | Error::Corrupt { .. }
            | Error::Length { .. } => true,
            Error::ObjectStore { failure, .. } => *failure == ObjectFailure::NotFound,
            Error::Io { os_error, .. } => os_error.is_some_and(|code| unreadable.contains(&code)),
            Error::PartlyLoaded { cause, .. } => cause.is_damage(),
            Error::Ranks { failures, .. } => failures.iter().all(|failure| failure.error.is_damage()),
            _ => false,
        }
    }

    /// A damaged block with the names of the tensors in it; any other error as it is.
    pub(crate) fn naming_tensors(mut self, metadata: &Metadata) -> Self {
        // Of a file whose blocks have checksums nothing but blocks is compared.
        if let Error::Corrupt { path, offset_bytes, fqns, .. } = &mut self
            && let Some(file) = metadata.files.iter().position(|file| path.ends_with(&file.name))
            && metadata.files[file].block_crcs.is_some()
        {
            *fqns = metadata.names_within(file, *offset_bytes..offset_bytes.saturating_add(BLOCK_BYTES));
        }
        self
    }

    pub(crate) fn refused(path: &Path, offset_bytes: u64, what: impl Into<String>) -> Self {
        Error::Refused { path: path.to_owned(), offset_bytes, what: what.into() }
    }

    pub(crate) fn tensor(fqn: &str, cause: &sconce_dtensor::Error) -> Self {
        let cause = match cause {
            // Its name is told already.
            sconce_dtensor::Error::Unreadable { what, cause } if what == fqn => cause.clone(),
            other => other.to_string(),
        };
        Error::Tensor { fqn: fqn.to_owned(), cause }
    }

    pub(crate) fn dtypes(fqn: &str, expected: DType, got: DType) -> Self {
        let (expected, got) = (expected.to_string(), got.to_string());
        Error::DTypeMismatch { fqn: fqn.to_owned(), expected, got }
    }
}

/// The tensors of a damaged block, as far as a line can name them.
fn held(fqns: &[String]) -> String {
    const NAMED: usize = 8;
    let more = fqns.len().saturating_sub(NAMED);
    match (fqns, more) {
        ([], _) => String::new(),
        (all, 0) => format!("; it holds {}", all.join(", ")),
        (all, more) => format!("; it holds {} and {more} more", all[..NAMED].join(", ")),
    }
}

fn count(names: &[String]) -> String {
    if names.len() == 1 { "1 tensor".to_owned() } else { format!("{} tensors", names.len()) }
}

fn list(failures: &[RankFailure]) -> String {
    let each: Vec<String> = failures.iter().map(|f| format!("rank {}: {}", f.rank, f.error)).collect();
    each.join("; ")
}

fn list_skipped(skipped: &[Skipped]) -> String {
    let each: Vec<String> = skipped.iter().map(|s| format!("step {}: {}", s.step, s.error)).collect();
    each.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_block_names_what_it_holds_but_not_without_end() {
        let error = |n: usize| Error::Corrupt {
            path: "a/b".into(),
            what: "block 1".into(),
            offset_bytes: 1 << 20,
            fqns: (0..n).map(|nth| format!("t{nth}")).collect(),
            expected: "x".into(),
            got: "y".into(),
        };
        let told = "a/b: block 1 at byte 1048576 is damaged: expected x, got y";
        assert_eq!(error(0).to_string(), told);
        assert_eq!(error(2).to_string(), format!("{told}; it holds t0, t1"));
        let named = "t0, t1, t2, t3, t4, t5, t6, t7";
        assert_eq!(error(10).to_string(), format!("{told}; it holds {named} and 2 more"));
    }

    #[test]
    fn an_error_is_the_same_on_the_other_side() {
        let inner = Error::Length { path: "a/b".into(), expected: 3, got: 2 };
        let failures = vec![RankFailure { rank: 1, error: inner }];
        let error = Error::Ranks { step: "verify".into(), failures };
        let wire = serde_json::to_vec(&error).unwrap();
        assert_eq!(serde_json::from_slice::<Error>(&wire).unwrap(), error);
        assert_eq!(error.to_string(), "verify failed on rank 1: a/b: expected 3 bytes, got 2");
    }
}
