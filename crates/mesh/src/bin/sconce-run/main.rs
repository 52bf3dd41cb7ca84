//! sconce-run: starts the ranks of one node, shows what they print, and ends with them.
//!
//! ```text
//! sconce-run --nproc-per-node 4 -- target/release/train --epochs 3
//! ```
//!
//! It sets torchrun's variables, so a program that reads who it is from those runs under either. At `MASTER_PORT` is
//! Sconce's store, which is this program's: `torch.distributed` cannot open one of its own there.

mod args;
mod monitor;
mod signals;
mod slots;

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser as _;
use rustix::process::{Signal, pidfd_send_signal};
use sconce_mesh::{
    Error, Rank, RankEnv, RankExit, RankOutput, RankProcesses, Result, die_with_parent, forget_parent,
};

use self::args::Args;
use self::monitor::Monitor;
use self::signals::Forwarder;
use self::slots::Slots;

/// Marks this program as a rank to be: it ties its life to the launcher's and becomes the rank's program.
const BECOME: &str = "SCONCE_RUN_BECOME";

/// How long other ranks may go on once one has failed.
const GRACE: Duration = Duration::from_secs(5);

/// How long ranks may take to save and end when a slot is back.
const TIME_TO_SAVE: Duration = Duration::from_secs(60);

/// torchrun's names for how often the ranks were started again, and how often they may be.
const RESTARTS: [&str; 2] = ["TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"];

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
            let mut command = Command::new(&program);
            command.args(words).env_remove(BECOME);
            // Done here: a program behind a shell would take the shell for an impostor.
            forget_parent(&mut command);
            let cause = command.exec();
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
    let (mut slots, mut restarts) = (args.slots(), 0);
    while let Some(n_ranks) = wait_for_slots(&slots, &forwarder) {
        let mut ranks = start(args, &output, n_ranks, restarts)?;
        forwarder.forward_to(&ranks)?;
        let monitor = args.monitor.map(|every| Monitor::start(&ranks, every));
        let is_to_grow = outlast(&mut ranks, &slots)?;
        let exits = ranks.exits(is_to_grow.then_some(TIME_TO_SAVE), GRACE)?;
        drop(monitor);
        if is_to_grow && !forwarder.was_asked_to_end() {
            eprintln!("sconce-run: a slot is back: starting again with {} ranks", slots.free(Instant::now()));
            continue;
        }
        let first = ranks.first_failure();
        let Some(failed) = exits.iter().find(|exit| Some(exit.rank) == first) else {
            return Ok(ExitCode::SUCCESS);
        };
        report(failed);
        if restarts == args.max_restarts || forwarder.was_asked_to_end() {
            return Ok(exit_code(failed));
        }
        restarts += 1;
        slots.lose(n_lost(&exits, failed.rank), Instant::now());
        let left = args.max_restarts - restarts;
        eprintln!("sconce-run: starting all ranks again, {left} restarts left");
    }
    Ok(ExitCode::FAILURE)
}

/// Waits until there are enough slots, and says how many; `None` if this program is asked to end first.
fn wait_for_slots(slots: &Slots, forwarder: &Forwarder) -> Option<usize> {
    while let Some(n_ranks) = (!forwarder.was_asked_to_end()).then(|| slots.free(Instant::now())) {
        if n_ranks >= slots.least() {
            return Some(n_ranks);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    None
}

/// Waits for the ranks until another slot is free, and then asks them to end; true if it was so.
fn outlast(ranks: &mut RankProcesses, slots: &Slots) -> Result<bool> {
    let Some(next) = slots.next(Instant::now()) else { return Ok(false) };
    if !ranks.outlast(next)? {
        return Ok(false);
    }
    for rank in ranks.pidfds()? {
        // One that has ended meanwhile needs no signal.
        let _ended = pidfd_send_signal(rank, Signal::TERM);
    }
    Ok(true)
}

/// Ranks whose slots are not used for a while: the one that failed first, and what was killed beside it. The others
/// ended because they had lost a peer.
fn n_lost(exits: &[RankExit], first: Rank) -> usize {
    let is_killed = |exit: &RankExit| exit.by_itself && exit.status.signal() == Some(Signal::KILL.as_raw());
    exits.iter().filter(|exit| exit.rank == first || is_killed(exit)).count()
}

fn start(args: &Args, output: &RankOutput, n_ranks: usize, restarts: usize) -> Result<RankProcesses> {
    let this = std::env::current_exe().map_err(|e| Error::Backend {
        backend: "launcher",
        call: "current_exe".into(),
        cause: e.to_string(),
    })?;
    let command = |_: &RankEnv| {
        let mut command = Command::new(&this);
        // A group of its own, so that what a rank starts can be ended with it.
        command.args(&args.program).env(BECOME, "1").process_group(0);
        command.envs(RESTARTS.into_iter().zip([restarts, args.max_restarts].map(|n| n.to_string())));
        command
    };
    match args.node(n_ranks)? {
        None => RankProcesses::spawn(n_ranks, output.clone(), command),
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
