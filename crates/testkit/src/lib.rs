//! Fixtures, the multi-rank harness and models for the tests of Sconce.
#![allow(clippy::expect_used, clippy::panic, reason = "a harness fails its test by panicking")]

pub mod conformance;
mod fixtures;
mod models;
mod procs;
mod ranks;

pub use fixtures::fixture;
pub use models::{SimpleModel, SimpleModelUneven};
pub use procs::{RankContext, run_procs, run_procs_for_exits, test_path};
pub use ranks::run_ranks;
