//! Fixtures, the multi-rank harness and models for the tests of Sconce.
#![allow(clippy::expect_used, clippy::panic, reason = "a harness fails its test by panicking")]

mod alloc;
pub mod conformance;
mod faults;
mod faulty_group;
mod faulty_storage;
mod fixtures;
#[cfg(doctest)]
mod guide;
mod models;
pub mod oracle;
mod place;
mod procs;
mod ranks;
pub mod strategies;

pub use alloc::{CountingAllocator, live_bytes, peak_bytes};
pub use faults::{DELAY, Fault, FaultPlan, Faults, Point, Verdict};
pub use faulty_group::{FaultyStore, strike_collectives};
pub use faulty_storage::{FaultyReader, FaultyTensor, FaultyWriter};
pub use fixtures::fixture;
pub use models::{SimpleModel, SimpleModelUneven};
pub use place::{Place, gpu_ranks};
pub use procs::{RankContext, run_procs, run_procs_for_exits, test_path};
pub use ranks::run_ranks;
