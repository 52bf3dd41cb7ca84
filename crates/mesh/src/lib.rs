//! Process groups, collectives and device meshes: how the ranks of a world find each other and talk.

mod dtype;
mod error;
mod rank;
mod reduce_op;
mod store;

pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use rank::{GroupRank, Rank};
pub use reduce_op::ReduceOp;
pub use store::Store;
