//! The main job: a small character-level transformer trains under HSDP on 4 local rank processes, saves, and goes on
//! as FSDP on 3 ranks and as one process, from the same checkpoint, with the same bits.

#![allow(clippy::print_stdout, reason = "an example talks to the person who started it")]

mod args;
mod corpus;
mod model;
mod train;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use clap::Parser;
use sconce_mesh::{RankEnv, RankOutput, RankProcesses};

use args::{Args, Phase};
use train::Report;

type AnyResult<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// How long ranks may still talk after one of them failed.
const GRACE: Duration = Duration::from_secs(5);

fn main() -> AnyResult<()> {
    let args = Args::parse();
    match args.phase {
        Some(phase) => train::run_rank(&args, phase),
        None => run_all(&args),
    }
}

/// Starts the ranks of each phase and compares what they report.
fn run_all(args: &Args) -> AnyResult<()> {
    std::fs::create_dir_all(&args.out)?;
    let (replicas, shards) = args.mesh;
    println!("training on {} rank processes, HSDP {replicas}x{shards} (replicate x shard)", args.ranks);
    spawn_ranks(args.ranks, Phase::Train)?;
    println!("\nloading {} as FSDP on 3 ranks", args.last_checkpoint().display());
    spawn_ranks(3, Phase::Fsdp)?;
    println!("\nloading {} in one process", args.last_checkpoint().display());
    spawn_ranks(1, Phase::Single)?;

    let reports = [Phase::Train, Phase::Fsdp, Phase::Single].map(|phase| Report::read(&args.out, phase));
    let [saved, fsdp, single] = reports;
    compare(&saved?, &[("FSDP, 3 ranks", fsdp?), ("one process", single?)])
}

/// This program again, once a rank.
fn spawn_ranks(n: usize, phase: Phase) -> AnyResult<()> {
    let program = std::env::current_exe()?;
    let command = |_: &RankEnv| -> Command {
        let mut command = Command::new(&program);
        // Ranks share the cores; a thread pool each would only make them wait for one another.
        command.args(std::env::args_os().skip(1)).arg(phase.flag()).env("RAYON_NUM_THREADS", "1");
        command
    };
    Ok(RankProcesses::spawn(n, RankOutput::Inherited, command)?.wait(None, GRACE)?)
}

fn compare(saved: &Report, loaded: &[(&str, Report)]) -> AnyResult<()> {
    println!("\n{:<16} weights {}  loss on the fixed batch {:.6}", "saved by HSDP", saved.digest, saved.loss);
    for (layout, report) in loaded {
        println!("{layout:<16} weights {}  loss on the fixed batch {:.6}", report.digest, report.loss);
    }
    for (layout, report) in loaded {
        if report.digest != saved.digest {
            return Err(format!("{layout}: weights differ from the saved ones").into());
        }
        if (report.loss - saved.loss).abs() > 1e-5 {
            return Err(format!("{layout}: loss {} differs from {}", report.loss, saved.loss).into());
        }
    }
    println!("weights are bit-identical in every layout; losses agree within 1e-5");
    Ok(())
}

/// Where a checkpoint of that step lies.
fn checkpoint_dir(out: &Path, step: usize) -> std::path::PathBuf {
    out.join(format!("step-{step:06}"))
}
