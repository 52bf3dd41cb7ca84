//! Repository tasks: `cargo xtask check` is what CI runs. Here is the dispatch only.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a task talks to the person who started it")]

mod bench;
mod check;
mod cuda_check;
mod demo;
mod faults;
mod fixtures;
mod gpu_test;
mod interop;
mod mpi_test;
mod s3_test;
mod soak;
mod surface;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask check | cuda-check | tidy | surface | mpi-test | gpu-test | s3-test | fixtures | interop | bench | demo | faults | soak";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let task = arguments.first().cloned().unwrap_or_default();
    let outcome = match task.as_str() {
        "bench" => bench::run(&arguments[1..]),
        "check" => check::run(),
        "cuda-check" => cuda_check::run(),
        "demo" => demo::run(&arguments[1..]),
        "faults" => faults::run(&arguments[1..]),
        "gpu-test" => gpu_test::run(&arguments[1..]),
        "interop" => interop::run(&arguments[1..]),
        "fixtures" => fixtures::run(&arguments[1..]),
        "mpi-test" => mpi_test::run(),
        "s3-test" => s3_test::run(),
        "tidy" => tidy::run(),
        "soak" => soak::run(&arguments[1..]),
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
