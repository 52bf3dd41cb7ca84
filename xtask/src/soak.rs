//! `cargo xtask soak`: legs of one training run, one after the other, for as long as asked: each on a world of random size,
//! or of the one that is asked for, and of random layout under a memory limit, ended by itself, by SIGTERM, or by killing a rank at a random moment.
//!
//! After each leg: the state that it resumed has the digest that was saved, no commit is lost, no process is left, and
//! nothing in shared memory. In legs that nothing disturbs, memory and descriptors of the ranks are compared early and
//! late.

mod process;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use self::process::Sample;
use crate::demo::log::Log;
use crate::demo::{build, built, fresh_seed, scramble};
use crate::root;

const USAGE: &str = "usage: cargo xtask soak [--minutes N] [--ranks N] [--seed N]";
/// Kilobytes of address space of each rank (`ulimit -v`).
const LIMIT_KB: &str = "1500000";
/// Milliseconds of a step at least.
const PACE: u64 = 2;
/// Longest leg.
const LIMIT: Duration = Duration::from_secs(120);
/// How much more memory a rank may hold late in a leg than early: caches of the allocator settle meanwhile.
const GROWTH_KIB: u64 = 4 << 10;

/// What is asked for.
struct Options {
    minutes: f64,
    /// The world size of every leg; drawn for each where it is left open.
    ranks: Option<u64>,
    seed: u64,
}

/// How a leg ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    ByItself,
    Terminated,
    Killed { rank: u64 },
}

struct Leg {
    world: u64,
    replicas: u64,
    steps: u64,
    end: End,
    after: Duration,
}

#[derive(Debug, Default)]
struct Totals {
    legs: usize,
    kills: usize,
    terminations: usize,
    undisturbed: usize,
    most_kib: u64,
    most_growth_kib: i64,
    most_descriptors: usize,
}

/// Runs legs until the time is over.
pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let Options { minutes, ranks, seed } = Options::parse(arguments)?;
    build()?;
    let out = root().join("runs/soak");
    let _none = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    let worlds = ranks.map_or("1 to 4 ranks".to_owned(), |n| format!("{n} ranks"));
    println!("seed {seed}, {minutes} minutes, legs of {worlds}");
    let (started, mut totals) = (Instant::now(), Totals::default());
    while started.elapsed().as_secs_f64() < minutes * 60.0 {
        let leg = Leg::draw(seed, totals.legs as u64, ranks);
        leg.run(&out, &mut totals).map_err(|e| format!("seed {seed}, leg {}: {e}", totals.legs))?;
        totals.legs += 1;
    }
    report(&out, &totals, started.elapsed())
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Options, String> {
        let mut options = Options { minutes: 60.0, ranks: None, seed: fresh_seed() };
        for option in arguments.chunks(2) {
            let value = option.get(1).ok_or(USAGE)?;
            match option[0].as_str() {
                "--minutes" => options.minutes = value.parse().map_err(|_| USAGE)?,
                "--ranks" => options.ranks = Some(value.parse().ok().filter(|n| *n > 0).ok_or(USAGE)?),
                "--seed" => options.seed = value.parse().map_err(|_| USAGE)?,
                _ => return Err(USAGE.to_owned()),
            }
        }
        Ok(options)
    }
}

impl Leg {
    fn draw(seed: u64, nth: u64, ranks: Option<u64>) -> Leg {
        let draw = |salt: u64| scramble(scramble(seed ^ (nth << 8)) ^ salt);
        let world = ranks.unwrap_or(1 + draw(1) % 4);
        let replicas = if world.is_multiple_of(2) { 1 + draw(2) % 2 } else { 1 };
        let end = match draw(3) % 4 {
            0 => End::ByItself,
            1 => End::Terminated,
            _ => End::Killed { rank: draw(4) % world },
        };
        let after = Duration::from_millis(100 + draw(5) % 1500);
        Leg { world, replicas, steps: 300 + draw(6) % 300, end, after }
    }

    fn run(&self, out: &Path, totals: &mut Totals) -> Result<(), String> {
        let before = Log::read(&out.join("log.txt")).unwrap_or_default();
        let first = before.last_commit();
        for rank in 0..self.world {
            // What the ranks of this leg write must not be taken from those of the last.
            let _none = std::fs::remove_file(pid_file(out, rank));
        }
        let mut launcher = self.start(out, before.last_step() + self.steps)?;
        let ended = self.see_through(out, &mut launcher, first, totals);
        let _ended = launcher.kill();
        let _ended = launcher.wait();
        ended?;
        let log = Log::read(&out.join("log.txt"))?;
        log.check_resumes()?;
        if log.last_commit() < first || (log.steps.len() > before.steps.len() && log.last_resumed() < first) {
            return Err(format!("step {first} was committed, and step {} resumed", log.last_resumed()));
        }
        for rank in 0..self.world {
            if let Some(pid) = pid(out, rank).filter(|pid| process::lives(*pid)) {
                return Err(format!("process {pid} of rank {rank} is left"));
            }
        }
        process::no_shared_memory_left()
    }

    fn start(&self, out: &Path, steps: u64) -> Result<Child, String> {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -v {LIMIT_KB}; exec \"$0\" \"$@\"")]).arg(built("sconce-run"));
        command.args(["--nproc-per-node", &self.world.to_string(), "--log-dir"]).arg(out);
        command.arg(built("examples/train_elastic")).arg("--out").arg(out).env("RAYON_NUM_THREADS", "1");
        command.args(["--steps", &steps.to_string(), "--pace", &PACE.to_string()]);
        command.args(["--replicas", &self.replicas.to_string()]);
        let log = std::fs::File::create(out.join("sconce-run.log")).map_err(|e| e.to_string())?;
        command.stderr(log).spawn().map_err(|e| format!("sconce-run: {e}"))
    }

    /// Waits until the leg ends as it is to end.
    fn see_through(
        &self,
        out: &Path,
        launcher: &mut Child,
        first: u64,
        totals: &mut Totals,
    ) -> Result<(), String> {
        let said = || std::fs::read_to_string(out.join("sconce-run.log")).unwrap_or_default();
        let target = match self.end {
            End::ByItself => {
                totals.undisturbed += 1;
                self.compare(out, launcher, first, totals)?;
                None
            }
            End::Terminated => {
                std::thread::sleep(self.after);
                totals.terminations += 1;
                Some((launcher.id(), "-TERM"))
            }
            End::Killed { rank } => {
                std::thread::sleep(self.after);
                totals.kills += 1;
                pid(out, rank).map(|pid| (pid, "-KILL"))
            }
        };
        if let Some((pid, signal)) = target {
            // It may have ended just now.
            let _ended = Command::new("kill").args([signal, &pid.to_string()]).stderr(Stdio::null()).status();
        }
        let status = process::wait(launcher, LIMIT)?;
        let may_fail = self.end != End::ByItself;
        if status.success() || may_fail { Ok(()) } else { Err(format!("{status}\n{}", said())) }
    }

    /// Samples the ranks some steps after the beginning, and as late as can be.
    fn compare(
        &self,
        out: &Path,
        launcher: &mut Child,
        first: u64,
        totals: &mut Totals,
    ) -> Result<(), String> {
        let mut early: Option<Vec<Sample>> = None;
        let mut late = Vec::new();
        let started = Instant::now();
        while matches!(launcher.try_wait(), Ok(None)) && started.elapsed() < LIMIT {
            let step = Log::read(&out.join("log.txt")).map_or(0, |log| log.last_step());
            let samples: Option<Vec<Sample>> =
                (0..self.world).map(|rank| Sample::of(pid(out, rank)?)).collect();
            if let Some(samples) = samples {
                match early {
                    None if step > first + 60 => early = Some(samples),
                    None => {}
                    Some(_) => late = samples,
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for (rank, (early, late)) in early.unwrap_or_default().iter().zip(&late).enumerate() {
            let growth = late.resident_kib as i64 - early.resident_kib as i64;
            totals.most_kib = totals.most_kib.max(late.resident_kib);
            totals.most_growth_kib = totals.most_growth_kib.max(growth);
            totals.most_descriptors = totals.most_descriptors.max(late.descriptors);
            // A save that runs at one of the moments has some files open.
            if growth > GROWTH_KIB as i64 || late.descriptors > early.descriptors + 8 {
                return Err(format!("rank {rank} grew from {early:?} to {late:?}"));
            }
        }
        Ok(())
    }
}

fn pid_file(out: &Path, rank: u64) -> PathBuf {
    out.join(format!("pid-{rank}"))
}

fn pid(out: &Path, rank: u64) -> Option<u32> {
    std::fs::read_to_string(pid_file(out, rank)).ok()?.parse().ok()
}

fn report(out: &Path, totals: &Totals, took: Duration) -> Result<(), String> {
    let log = Log::read(&out.join("log.txt"))?;
    let resumes = log.check_resumes()?;
    let kept: Vec<_> = std::fs::read_dir(out.join("checkpoints")).map_err(|e| e.to_string())?.collect();
    println!(
        "{:.0} s: {} legs ({} undisturbed, {} terminated, {} killed), {} steps, {resumes} resumes bit-identical, \
         no commit lost",
        took.as_secs_f64(),
        totals.legs,
        totals.undisturbed,
        totals.terminations,
        totals.kills,
        log.steps.len()
    );
    println!(
        "ranks: at most {} KiB, growth within a leg at most {} KiB, at most {} descriptors; {} entries in the series; \
         no process and no shared memory left",
        totals.most_kib,
        totals.most_growth_kib,
        totals.most_descriptors,
        kept.len()
    );
    Ok(())
}
