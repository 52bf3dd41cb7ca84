//! What can go wrong with placements, layouts and state dicts.

use sconce_mesh::{DType, Rank};

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a tensor could not be placed, moved or entered in a state dict.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A collective or a mesh operation failed.
    #[error(transparent)]
    Mesh(#[from] sconce_mesh::Error),

    /// Placements that do not fit the mesh or the tensor.
    #[error("placements {placements}: {what}")]
    InvalidPlacement {
        /// The placements as given.
        placements: String,
        /// What is wrong with them, with expected and got.
        what: String,
    },

    /// A tensor's shape is not the one that its place asks for.
    #[error("{what}: expected shape {expected:?}, got {got:?}")]
    ShapeMismatch {
        /// Which tensor, by fqn or role, and on which rank.
        what: String,
        /// The shape that was needed.
        expected: Vec<usize>,
        /// The shape that was found.
        got: Vec<usize>,
    },

    /// A tensor's dtype is not the one that its place asks for.
    #[error("{what}: expected dtype {expected}, got {got}")]
    DTypeMismatch {
        /// Which tensor.
        what: String,
        /// The dtype that was needed.
        expected: DType,
        /// The dtype that was found.
        got: DType,
    },

    /// A rank passed something else than the others; every rank gets this same error.
    #[error("{what}: expected {expected} on rank {rank}, got {got}")]
    RanksDisagree {
        /// What they had to agree on.
        what: String,
        /// The first rank that differs.
        rank: Rank,
        /// What was expected of it.
        expected: String,
        /// What it passed.
        got: String,
    },

    /// A mesh with ranks that the other side cannot reach, or of another world.
    #[error("{what}: expected ranks among {expected:?} of one world, got {got:?}")]
    ForeignMesh {
        /// Which mesh.
        what: String,
        /// The ranks that can be reached.
        expected: Vec<Rank>,
        /// The ranks of the mesh.
        got: Vec<Rank>,
    },

    /// No rank holds a part of a tensor that another rank needs.
    #[error("{what}: no rank holds box {missing} of shape {shape:?}")]
    Uncovered {
        /// Which tensor.
        what: String,
        /// Its global shape.
        shape: Vec<usize>,
        /// The first box that nobody holds.
        missing: String,
    },

    /// Two entries of a state dict flatten to the same name.
    #[error("state dict: two entries flatten to {fqn:?}")]
    DuplicateFqn {
        /// The name.
        fqn: String,
    },

    /// A value that can be saved but not loaded into.
    #[error("{what} is read-only: load into a TensorViewMut or an owned tensor")]
    ReadOnly {
        /// Which tensor.
        what: String,
    },

    /// The bytes of a tensor that lies elsewhere could not be had.
    #[error("{what}: {cause}")]
    Unreadable {
        /// The tensor.
        what: String,
        /// Why.
        cause: String,
    },

    /// candle refused an operation on a tensor.
    #[cfg(feature = "candle")]
    #[error("{what}")]
    Candle {
        /// What was being done, to which tensor.
        what: String,
        /// candle's answer.
        source: Box<candle_core::Error>,
    },
}

#[cfg(feature = "candle")]
pub(crate) trait CandleContext<T> {
    /// Names what was being done when candle failed.
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

#[cfg(feature = "candle")]
impl<T> CandleContext<T> for candle_core::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Candle { what: what(), source: Box::new(source) })
    }
}
