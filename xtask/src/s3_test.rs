//! `cargo xtask s3-test`: checkpoints in a server that speaks S3, a program of others from crates.io. It fails where it
//! cannot run them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::root;

/// The server, its version, and what makes it a program.
const SERVER: [&str; 5] = ["s3s-fs", "--version", "=0.14.1", "--features", "binary"];

/// The tests that need the server.
const N_TESTS: usize = 2;

/// Installs the server, if it is not there yet, and runs the tests that need it.
pub(crate) fn run() -> Result<(), String> {
    run_with(&installed()?)
}

/// Where the server is, once it is there.
pub(crate) fn installed() -> Result<PathBuf, String> {
    let peers = root().join("target/peers");
    let mut install = Command::new(env!("CARGO"));
    // Unoptimized: it serves a few MiB, once.
    install
        .args(["install", "--quiet", "--locked", "--debug", "--root"])
        .arg(&peers)
        .args(SERVER)
        .current_dir(root());
    let status = install.status().map_err(|e| format!("cargo install s3s-fs: {e}"))?;
    if !status.success() {
        return Err(format!("cargo install s3s-fs: {status}"));
    }
    std::fs::canonicalize(peers.join("bin/s3s-fs")).map_err(|e| format!("s3s-fs: {e}"))
}

/// Runs the tests with a server.
pub(crate) fn run_with(server: &Path) -> Result<(), String> {
    let test = "test -p sconce-checkpoint --no-default-features --features object-store --test objects";
    let mut command = Command::new(env!("CARGO"));
    command.args(test.split(' ')).args(["--", "--ignored", "s3::"]).env("SCONCE_S3_SERVER", server);
    let output = command.current_dir(root()).output().map_err(|e| format!("cargo test: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let passed = format!("ok. {N_TESTS} passed");
    if output.status.success() && text.contains(&passed) {
        return Ok(());
    }
    Err(format!("{}; expected {N_TESTS} tests to pass", output.status))
}
