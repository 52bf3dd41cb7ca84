//! The programs of the guide as doc tests: what `docs/guide` shows compiles and runs.

#[doc = include_str!("../../../docs/guide/first-steps.md")]
pub mod first_steps {}

#[doc = include_str!("../../../docs/guide/checkpoints.md")]
pub mod checkpoints {}

#[doc = include_str!("../../../README.md")]
pub mod readme {}
