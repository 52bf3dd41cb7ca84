//! Repository tasks: `cargo xtask check` is what CI runs. Here is the dispatch only.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a task talks to the person who started it")]

mod check;
mod surface;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask check | tidy | surface";

fn main() -> ExitCode {
    let task = std::env::args().nth(1).unwrap_or_default();
    let outcome = match task.as_str() {
        "check" => check::run(),
        "tidy" => tidy::run(),
        "surface" => surface::run(),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("xtask {task}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the repository.
fn root() -> std::path::PathBuf {
    std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}
