//! `cargo xtask demo elastic`: a training run that loses a rank, goes on with three, and grows to four again, beside one
//! that nothing happens to. It starts programs, kills one, and checks what they logged.

mod chart;
pub(crate) mod log;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime};

use self::log::Log;
use crate::root;

const USAGE: &str = "usage: cargo xtask demo elastic [--times N] [--seed N]";
/// Where Adam is at rest. From step 480 on it magnifies rounding: uninterrupted runs on 1 and on 4 ranks, 3e-8 of the first
/// loss apart at step 450, are 3e-6 apart at step 500.
const STEPS: u64 = 420;
/// Milliseconds of a step at least: the whole run takes some seconds, so that a slot comes back before its end.
const PACE: u64 = 10;
const COOLDOWN: &str = "1.5";
const LIMIT: Duration = Duration::from_secs(120);
/// How far the final losses may differ, of the first loss. Sums over 3 ranks round otherwise than over 4.
const TOLERANCE: f64 = 1e-6;

/// Runs the demo that `arguments` name.
pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let Some(("elastic", options)) = arguments.split_first().map(|(name, rest)| (name.as_str(), rest)) else {
        return Err(USAGE.to_owned());
    };
    let (mut times, mut seed) = (1, fresh_seed());
    for option in options.chunks(2) {
        let value = option.get(1).and_then(|text| text.parse().ok()).ok_or(USAGE)?;
        match option[0].as_str() {
            "--times" => times = value,
            "--seed" => seed = value,
            _ => return Err(USAGE.to_owned()),
        }
    }
    build()?;
    let calm = train("calm", &["--nproc-per-node", "4"], |_, _| Ok(()))?;
    calm.check_steps(STEPS)?;
    println!("without a fault: loss {:.6} to {:.6}", calm.first_loss(), calm.final_loss());
    for nth in 0..times {
        let seed = seed.wrapping_add(nth);
        elastic(&calm, seed).map_err(|error| format!("seed {seed}: {error}"))?;
    }
    Ok(())
}

/// Builds the launcher and the trainer.
pub(crate) fn build() -> Result<(), String> {
    for arguments in [
        "build -q -p sconce-mesh --no-default-features --features launcher --bin sconce-run",
        "build -q --example train_elastic",
    ] {
        let status = Command::new(env!("CARGO")).args(arguments.split(' ')).current_dir(root()).status();
        match status {
            Ok(status) if status.success() => {}
            other => return Err(format!("cargo {arguments}: {other:?}")),
        }
    }
    Ok(())
}

/// One run with a kill at a random moment, checked and drawn.
fn elastic(calm: &Log, seed: u64) -> Result<(), String> {
    let victim = scramble(seed) % 4;
    let at_step = STEPS / 10 + scramble(seed + 1) % (STEPS / 3);
    let after = Duration::from_micros(scramble(seed + 2) % 20_000);
    let arguments = ["--elastic", "2:4", "--slot-cooldown", COOLDOWN, "--max-restarts", "1"];
    let log = train("elastic", &arguments, |out, launcher| {
        await_step(out, at_step, launcher)?;
        std::thread::sleep(after);
        let pid =
            std::fs::read_to_string(out.join(format!("pid-{victim}"))).map_err(|e| format!("pid: {e}"))?;
        let killed = Command::new("kill").args(["-9", &pid]).status().map_err(|e| format!("kill: {e}"))?;
        if killed.success() {
            Ok(())
        } else {
            Err(format!("rank {victim}, process {pid}, could not be killed"))
        }
    })?;
    log.check_steps(STEPS)?;
    if log.worlds() != [4, 3, 4] {
        return Err(format!("worlds of {:?} ranks, expected 4, 3, 4", log.worlds()));
    }
    let resumes = log.check_resumes()?;
    let (expected, got) = (calm.final_loss(), log.final_loss());
    let difference = (expected - got).abs() / calm.first_loss();
    if difference > TOLERANCE {
        return Err(format!(
            "final loss {got}, without a fault {expected}: over {TOLERANCE} of the first loss apart"
        ));
    }
    let picture = root().join("runs/demo/elastic.svg");
    std::fs::write(&picture, chart::draw(calm, &log, STEPS))
        .map_err(|e| format!("{}: {e}", picture.display()))?;
    println!(
        "seed {seed}: rank {victim} killed after step {at_step}; worlds 4, 3, 4; {resumes} resumes bit-identical; \
         final loss {got:.6}, {difference:.1e} of the first loss apart; runs/demo/elastic.svg"
    );
    Ok(())
}

/// Trains in `runs/demo/NAME`, with `disturb` beside it.
fn train(
    name: &str,
    arguments: &[&str],
    disturb: impl FnOnce(&Path, &mut Child) -> Result<(), String>,
) -> Result<Log, String> {
    let out = root().join("runs/demo").join(name);
    let _none = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    let mut command = Command::new(built("sconce-run"));
    command.args(arguments).arg("--log-dir").arg(&out).arg(built("examples/train_elastic"));
    command.arg("--out").arg(&out).env("RAYON_NUM_THREADS", "1");
    command.args(["--steps", &STEPS.to_string(), "--pace", &PACE.to_string()]);
    let launcher_log = std::fs::File::create(out.join("sconce-run.log")).map_err(|e| e.to_string())?;
    let mut launcher = command.stderr(launcher_log).spawn().map_err(|e| format!("sconce-run: {e}"))?;
    let disturbed = disturb(&out, &mut launcher);
    let ended = disturbed.and_then(|()| await_end(&mut launcher));
    // It has ended already, unless something went wrong.
    let _ended = launcher.kill();
    let _ended = launcher.wait();
    let said = || std::fs::read_to_string(out.join("sconce-run.log")).unwrap_or_default();
    ended.map_err(|error| format!("{name}: {error}\n{}", said()))?;
    Log::read(&out.join("log.txt"))
}

/// Where Cargo puts a program of the profile that [`build`] uses.
pub(crate) fn built(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("debug").join(name)
}

fn await_step(out: &Path, step: u64, launcher: &mut Child) -> Result<(), String> {
    let started = Instant::now();
    let log = out.join("log.txt");
    while Log::read(&log).map_or(0, |log| log.last_step()) < step {
        if started.elapsed() > LIMIT || !matches!(launcher.try_wait(), Ok(None)) {
            return Err(format!("step {step} never came"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn await_end(launcher: &mut Child) -> Result<(), String> {
    let started = Instant::now();
    while started.elapsed() < LIMIT {
        match launcher.try_wait().map_err(|e| e.to_string())? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(status.to_string()),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    Err(format!("still running after {LIMIT:?}"))
}

/// A seed that no other run has; it is printed, so that the run can be made again.
pub(crate) fn fresh_seed() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_nanos() as u64)
}

/// SplitMix64's finalizer.
pub(crate) fn scramble(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}
