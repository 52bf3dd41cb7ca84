//! Benchmarks, each beside its peers and beside the machine's own limit. It runs programs and prints tables; it measures
//! nothing itself. Here: the dispatch, and what several of them share.

mod checkpoint;
mod cli;
mod collectives;
mod fsdp;
mod plan;
mod redistribute;

use std::process::Command;

use crate::root;

const USAGE: &str = "usage: cargo xtask bench checkpoint [--torch PYTHON] | cli | collectives [--torch PYTHON] [--ferrotorch] \
                     | fsdp [--torch PYTHON] | plan [--torch PYTHON] | redistribute [--torch PYTHON] | overlap | store \
                     | kernels";

/// Runs the benchmark that `arguments` name.
pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let Some((name, rest)) = arguments.split_first() else { return Err(USAGE.to_owned()) };
    match (name.as_str(), rest) {
        ("checkpoint", rest) => checkpoint::run(rest),
        ("cli", rest) => cli::run(rest),
        ("collectives", rest) => collectives::run(rest),
        ("fsdp", rest) => fsdp::run(rest),
        ("plan", rest) => plan::run(rest),
        ("redistribute", rest) => redistribute::run(rest),
        ("overlap" | "store", []) => shown(mesh_bench(name)),
        ("kernels", []) => shown(kernels()),
        _ => Err(USAGE.to_owned()),
    }
}

fn mesh_bench(name: &str) -> Command {
    let mut command = Command::new(env!("CARGO"));
    let arguments = "bench -q -p sconce-mesh --no-default-features --features tcp-store --bench";
    command.args(arguments.split(' ')).arg(name);
    command
}

/// The reduction kernels are private: one of their own tests measures them.
fn kernels() -> Command {
    let mut command = Command::new(env!("CARGO"));
    let arguments = "test -q --release -p sconce-mesh --no-default-features --lib -- --ignored --nocapture";
    command.args(arguments.split(' ')).arg("speed_of_the_kernels");
    command
}

/// Runs a program that prints its own table.
fn shown(mut command: Command) -> Result<(), String> {
    let status = command.current_dir(root()).status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}")) }
}
