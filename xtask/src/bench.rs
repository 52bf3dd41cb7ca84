//! Benchmarks, each beside its peers and beside the machine's own limit. It runs programs and prints tables; it measures
//! nothing itself. Here: the dispatch, and what several of them share.

mod checkpoint;
mod cli;
mod collectives;
mod fsdp;
mod plan;
mod redistribute;
mod report;
mod single;
mod table;

use std::process::Command;

use crate::root;
use table::Table;

const USAGE: &str = "usage: cargo xtask bench checkpoint | cli | collectives | fsdp | gpu | kernels | overlap | plan | redistribute | \
                     report | store [--torch PYTHON] [--ferrotorch] [--json]";

/// What the command line chose.
#[derive(Debug, Default)]
pub(super) struct Options {
    /// A Python that has torch, to be measured in the same run.
    torch: Option<String>,
    /// Measure the Rust peer of that name as well.
    ferrotorch: bool,
    /// JSON lines instead of a table.
    json: bool,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--torch" => options.torch = Some(rest.next().ok_or(USAGE)?.clone()),
                "--ferrotorch" => options.ferrotorch = true,
                "--json" => options.json = true,
                _ => return Err(USAGE.to_owned()),
            }
        }
        Ok(options)
    }

    /// The peer in `xtask/peers` that runs on torch, if torch is there.
    fn torch_peer(&self, script: &str) -> Option<Command> {
        let mut command = Command::new(self.torch.as_ref()?);
        command.arg(format!("xtask/peers/{script}"));
        Some(command)
    }
}

/// Runs the benchmark that `arguments` name.
pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let Some((name, rest)) = arguments.split_first() else { return Err(USAGE.to_owned()) };
    let options = Options::parse(rest)?;
    match name.as_str() {
        "report" => return report::run(&options),
        "gpu" => return gpu(&options),
        "kernels" => return single::kernels(),
        _ => {}
    }
    let table = measure(name, &options)?;
    print!("{}", if options.json { table.json_lines(name) } else { table.text() });
    Ok(())
}

fn measure(name: &str, options: &Options) -> Result<Table, String> {
    match name {
        "checkpoint" => checkpoint::measure(options),
        "cli" => cli::measure(),
        "collectives" => collectives::measure(options),
        "fsdp" => fsdp::measure(options),
        "overlap" => single::overlap(),
        "plan" => plan::measure(options),
        "redistribute" => redistribute::measure(options),
        "store" => single::store(),
        _ => Err(USAGE.to_owned()),
    }
}

fn cargo_bench(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(["bench", "-q"]).args(arguments.split(' '));
    command
}

/// The tables that a program of rank processes prints: it takes a CUDA device for each rank, and what building with feature
/// `nccl` takes. Then the step of torch, if it is asked for.
fn gpu(options: &Options) -> Result<(), String> {
    let ours = cargo_bench("-p sconce-testkit --features nccl --bench gpu");
    for mut command in [Some(ours), options.torch_peer("gpu.py")].into_iter().flatten() {
        let status = command.current_dir(root()).status().map_err(|e| format!("{command:?}: {e}"))?;
        if !status.success() {
            return Err(format!("{command:?}: {status}"));
        }
    }
    Ok(())
}

/// What a program printed on standard output.
fn output(mut command: Command) -> Result<String, String> {
    let what = format!("{command:?}");
    let output = command.current_dir(root()).output().map_err(|e| format!("{what}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{what}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
