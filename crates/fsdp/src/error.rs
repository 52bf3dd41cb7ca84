//! What can go wrong when a model is sharded, run, stepped, saved or loaded.

use sconce_mesh::Rank;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a sharded model or optimizer could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A collective or a mesh operation failed; a lost peer is here.
    #[error(transparent)]
    Mesh(#[from] sconce_mesh::Error),

    /// A placement or an exchange failed.
    #[error(transparent)]
    DTensor(#[from] sconce_dtensor::Error),

    /// The sharding strategy asks for another mesh.
    #[error("{strategy} needs a mesh of {expected}, got shape {got:?}")]
    MeshShape {
        /// The strategy.
        strategy: &'static str,
        /// The mesh it needs.
        expected: &'static str,
        /// Shape of the mesh.
        got: Vec<usize>,
    },

    /// A unit's prefix matches no parameter, or a wrapped module's prefix is no unit.
    #[error("unit {unit:?} {what}; units are {units:?}")]
    UnknownUnit {
        /// The prefix.
        unit: String,
        /// What is wrong with it.
        what: &'static str,
        /// All prefixes of the configuration.
        units: Vec<String>,
    },

    /// A model without any parameter was sharded.
    #[error("the model asked the var builder for no parameter")]
    NoParameters,

    /// A dtype other than the model's.
    #[error("{fqn}: dtype {got} is none that parameters are gathered and reduced in here")]
    UnsupportedDType {
        /// The parameter.
        fqn: String,
        /// Its dtype.
        got: String,
    },

    /// One name was asked for with two shapes.
    #[error("parameter {fqn}: first shape {expected:?}, now {got:?}")]
    ShapeConflict {
        /// The parameter.
        fqn: String,
        /// The shape of the first request.
        expected: Vec<usize>,
        /// The shape of this one.
        got: Vec<usize>,
    },

    /// Ranks built different models.
    #[error("rank {rank} built another model than rank {reference}: expected {expected:?}, got {got:?}")]
    LayoutMismatch {
        /// The rank that is compared with.
        reference: Rank,
        /// The first rank that differs.
        rank: Rank,
        /// What differs first: the reference's parameter with its shape, its module, strategy, dtypes or seed.
        expected: Option<String>,
        /// The other rank's.
        got: Option<String>,
    },

    /// A parameter or unit was used before [`FsdpBuilder::build`](crate::FsdpBuilder::build).
    #[error("{unit:?}: its model is not built yet")]
    NotBuilt {
        /// The unit or parameter.
        unit: String,
    },

    /// An optimizer was made for another model.
    #[error("the optimizer was made for another model than the one it shall step")]
    OtherModel,

    /// The model's handle is gone, but its parameters were used.
    #[error("unit {unit:?}: its Fsdp was dropped while its parameters were still in use")]
    Dropped {
        /// The unit.
        unit: String,
    },

    /// A state dict does not have the names that it needs.
    #[error("state dict: missing {missing:?}, unexpected {unexpected:?}")]
    KeyMismatch {
        /// Names that the model has and the state dict lacks.
        missing: Vec<String>,
        /// Names that the state dict has and the model lacks.
        unexpected: Vec<String>,
    },

    /// A value of a state dict has another shape than its parameter, or is none that can be loaded.
    #[error("state dict: {fqn}: expected {expected}, got {got}")]
    ValueMismatch {
        /// The name.
        fqn: String,
        /// What was needed.
        expected: String,
        /// What was found.
        got: String,
    },

    /// Other ranks refused their part of a state dict; nothing was changed on any rank.
    #[error("ranks {ranks:?} refused their state dict: see their errors")]
    RefusedElsewhere {
        /// The ranks that refused.
        ranks: Vec<Rank>,
    },

    /// candle refused an operation.
    #[error("{what}")]
    Candle {
        /// What was being done.
        what: String,
        /// candle's answer.
        source: Box<candle_core::Error>,
    },
}

pub(crate) trait CandleContext<T> {
    /// Names what was being done when candle failed.
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> CandleContext<T> for candle_core::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Candle { what: what(), source: Box::new(source) })
    }
}
