//! sconce-run: starts the ranks of one node, shows what they print, and ends with them.
//!
//! ```text
//! sconce-run --nproc-per-node 4 -- target/release/train --epochs 3
//! ```
//!
//! It sets torchrun's variables, so a program that reads those runs under either.

mod args;
mod monitor;
mod signals;

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser as _;
use sconce_mesh::{Error, RankEnv, RankExit, RankOutput, RankProcesses, Result, die_with_parent};

use self::args::Args;
use self::monitor::Monitor;
use self::signals::Forwarder;

/// Marks this program as a rank to be: it ties its life to the launcher's and becomes the rank's program.
const BECOME: &str = "SCONCE_RUN_BECOME";

/// How long other ranks may go on once one has failed.
const GRACE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    if std::env::var_os(BECOME).is_some() {
        return become_rank();
    }
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sconce-run: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The request to die with the parent outlives `exec`, so any program can be a rank.
fn become_rank() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let error = match (die_with_parent(), words.next()) {
        (Ok(()), Some(program)) => {
            let cause = Command::new(&program).args(words).env_remove(BECOME).exec();
            format!("{}: {cause}", program.to_string_lossy())
        }
        (Err(error), _) => error.to_string(),
        (Ok(()), None) => "no program".to_owned(),
    };
    eprintln!("sconce-run: {error}");
    // The shell's code for a program that cannot be run.
    ExitCode::from(127)
}

fn run(args: &Args) -> Result<ExitCode> {
    let forwarder = Forwarder::start()?;
    let output = match &args.log_dir {
        Some(dir) => RankOutput::Files(dir.clone()),
        None => RankOutput::Prefixed,
    };
    for restarts_left in (0..=args.max_restarts).rev() {
        let mut ranks = start(args, &output)?;
        forwarder.forward_to(&ranks)?;
        let monitor = args.monitor.map(|every| Monitor::start(&ranks, every));
        let exits = ranks.exits(None, GRACE)?;
        drop(monitor);
        let first = ranks.first_failure();
        let Some(failed) = exits.into_iter().find(|exit| Some(exit.rank) == first) else {
            return Ok(ExitCode::SUCCESS);
        };
        report(&failed);
        if restarts_left == 0 || forwarder.was_asked_to_end() {
            return Ok(exit_code(&failed));
        }
        eprintln!("sconce-run: starting all ranks again, {restarts_left} restarts left");
    }
    unreachable!("the last round returns")
}

fn start(args: &Args, output: &RankOutput) -> Result<RankProcesses> {
    let this = std::env::current_exe().map_err(|e| Error::Backend {
        backend: "launcher",
        call: "current_exe".into(),
        cause: e.to_string(),
    })?;
    let command = |_: &RankEnv| {
        let mut command = Command::new(&this);
        // A group of its own, so that what a rank starts can be ended with it.
        command.args(&args.program).env(BECOME, "1").process_group(0);
        command
    };
    match args.node()? {
        None => RankProcesses::spawn(args.n_ranks(), output.clone(), command),
        Some(node) => RankProcesses::spawn_node(&node, output.clone(), command),
    }
}

fn report(failed: &RankExit) {
    eprintln!("sconce-run: rank {} {}", failed.rank, failed.outcome());
    if !failed.last_lines.is_empty() {
        eprintln!("sconce-run: its last lines:\n{}", failed.last_lines);
    }
}

/// The rank's own code; the shell's for one that died of a signal.
fn exit_code(failed: &RankExit) -> ExitCode {
    let code = failed.status.code().or_else(|| failed.status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
