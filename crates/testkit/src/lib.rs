//! Fixtures, the multi-rank harness and models for the tests of Sconce.

mod models;
mod ranks;

pub use models::{SimpleModel, SimpleModelUneven};
pub use ranks::run_ranks;
