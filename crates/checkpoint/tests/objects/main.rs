//! Checkpoints in object stores: in memory, in a directory, over HTTP, in a server that speaks S3; and stores that fail.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

#[path = "../common/mod.rs"]
mod common;
mod failures;
mod faulty;
mod http;
mod s3;
mod saved;
mod stores;
