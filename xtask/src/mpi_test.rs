//! `cargo xtask mpi-test`: MPI jobs of four ranks that run the MPI cases, on one host, on hosts by name, and, as root, on two
//! hosts made of network namespaces. It fails where it cannot run them.

mod hosts;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::root;
use hosts::TwoHosts;

const RANKS: usize = 4;
/// Of one job. They take 20 seconds.
const LIMIT: Duration = Duration::from_secs(240);

/// Cases after which a job cannot end in good order; each has one of its own.
const STOPPED: &str = "a_stopped_rank_is_a_timeout_that_names_it";
const KILLED: &str = "a_killed_rank_is_lost_to_the_survivors";

const CASE_ARGUMENTS: [&str; 4] = ["--include-ignored", "--test-threads=1", "--nocapture", "--color=never"];

/// What a job must do.
enum Expected {
    /// End well, every rank having passed at least this many cases.
    Passed(usize),
    /// Print this many lines that begin with this word, however it ends.
    Lines(usize, &'static str),
    /// End badly, and soon, by the launcher's doing.
    Ended,
}

/// Whether programs can be built for an MPI here.
pub(crate) fn has_mpi() -> bool {
    let quiet = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet(Command::new("mpicc").arg("--version")).is_ok_and(|status| status.success())
}

/// Builds the cases and runs all jobs.
pub(crate) fn run() -> Result<(), String> {
    let mpirun = Mpirun::find()?;
    let cases = "test --workspace --features sconce-testkit/mpi --test mpi --no-run";
    let cases = built(&cases.split(' ').collect::<Vec<_>>())?;
    let build = "build -p sconce-mesh --no-default-features --features mpi,tcp-store --example ranks";
    let example = built(&build.split(' ').collect::<Vec<_>>())?;

    let apart = ["a", "b", "c", "d"];
    let mixed = ["a", "b", "a", "b"];
    let rest = ["--skip", STOPPED, "--skip", KILLED];
    let well = || Expected::Passed(6);
    mpirun.job("one host", &cases, &rest, &["a"; RANKS], well())?;
    mpirun.job("no two ranks in shared memory", &cases, &rest, &apart, well())?;
    mpirun.job("two ranks each in shared memory, in turns", &cases, &rest, &mixed, well())?;
    let survivors = || Expected::Lines(RANKS - 1, "survivor");
    mpirun.job("a rank stops", &cases, &[STOPPED], &["a", "a", "b", "b"], survivors())?;
    mpirun.job("a rank without mates stops", &cases, &[STOPPED], &apart, survivors())?;
    let killed = if mpirun.ulfm { survivors() } else { Expected::Ended };
    mpirun.job("a rank is killed", &cases, &[KILLED], &apart, killed)?;
    let sums = Expected::Lines(RANKS, "rank");
    mpirun.run("the example `ranks`", mpirun.plain(&example)?, sums)?;
    on_two_hosts(&mpirun, &cases, &rest, well())
}

fn on_two_hosts(mpirun: &Mpirun, cases: &Path, rest: &[&str], expected: Expected) -> Result<(), String> {
    if !hosts::may_be_made() {
        println!(
            "\n!!! LEFT OUT: 2 + 2 ranks on two hosts of network namespaces, which this user may not make"
        );
        return Ok(());
    }
    let hosts = TwoHosts::make()?;
    let command = hosts.command(RANKS / 2, cases, &[&CASE_ARGUMENTS[..], rest].concat())?;
    mpirun.run("2 + 2 ranks on two hosts", command, expected)
}

/// Open MPI's launcher.
struct Mpirun {
    /// Whether it lets survivors live.
    ulfm: bool,
}

impl Mpirun {
    fn find() -> Result<Mpirun, String> {
        let output = Command::new("mpirun").arg("--version").output();
        let output = output.map_err(|e| format!("mpirun: {e}; install an Open MPI and libclang"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.lines().next().and_then(|line| line.strip_prefix("mpirun (Open MPI) "));
        let version = version.ok_or_else(|| format!("mpirun: expected Open MPI's, got {text:?}"))?;
        let major: u32 = version.split('.').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        println!("==> Open MPI {version}");
        Ok(Mpirun { ulfm: major >= 5 })
    }

    fn command(&self) -> Command {
        let mut command = Command::new("mpirun");
        command.args(OPTIONS);
        if hosts::is_root() {
            command.arg("--allow-run-as-root");
        }
        if self.ulfm {
            command.args(["--with-ft", "ulfm"]);
        }
        command
    }

    fn plain(&self, program: &Path) -> Result<Command, String> {
        let mut command = self.command();
        command.args(["-n", &RANKS.to_string()]).arg(logged()?).arg(program);
        Ok(command)
    }

    /// Runs cases with one rank on each of the hosts that are only names: ranks of one name share memory.
    fn job(
        &self,
        what: &str,
        cases: &Path,
        arguments: &[&str],
        hosts: &[&str],
        expected: Expected,
    ) -> Result<(), String> {
        let mut command = self.command();
        let logged = logged()?;
        for (nth, host) in hosts.iter().enumerate() {
            command
                .args((nth > 0).then_some(":"))
                .args(["-n", "1", "-x"])
                .arg(format!("SCONCE_HOST_ID={host}"));
            command.arg(&logged).arg(cases).args(CASE_ARGUMENTS).args(arguments);
        }
        self.run(what, command, expected)
    }

    fn run(&self, what: &str, mut command: Command, expected: Expected) -> Result<(), String> {
        println!("\n==> mpi-test: {what}");
        let started = Instant::now();
        for rank in 0..RANKS {
            let log = rank_log(rank)?;
            std::fs::write(&log, "").map_err(|e| format!("{}: {e}", log.display()))?;
        }
        let child = command.current_dir(root()).stdin(Stdio::null());
        let mut child = child.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        let status = loop {
            match child.try_wait().map_err(|e| format!("mpirun: {e}"))? {
                Some(status) => break Some(status),
                None if started.elapsed() > LIMIT => break None,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        if status.is_none() {
            // What it has started ends with it. It may have ended by itself meanwhile.
            let _ended = child.kill().and_then(|()| child.wait());
        }
        let mut outputs = Vec::with_capacity(RANKS);
        for rank in 0..RANKS {
            let log = rank_log(rank)?;
            outputs.push(std::fs::read_to_string(&log).map_err(|e| format!("{}: {e}", log.display()))?);
        }
        let complaint = match status {
            None => Some(format!("still ran after {LIMIT:?}")),
            Some(status) => expected.complaint(status.success(), &outputs),
        };
        if let Some(complaint) = complaint {
            for (rank, output) in outputs.iter().enumerate() {
                println!("--- rank {rank}\n{output}");
            }
            return Err(format!("{what}: {complaint}"));
        }
        println!("==> {:.0} s", started.elapsed().as_secs_f64());
        Ok(())
    }
}

/// Ranks outnumber cores here, and containers forbid processes to read each other's memory.
const OPTIONS: [&str; 7] = [
    "--oversubscribe",
    "--mca",
    "mpi_yield_when_idle",
    "1",
    "--mca",
    "btl_vader_single_copy_mechanism",
    "none",
];

impl Expected {
    /// What is wrong with a job that ended like this, its ranks having printed these texts.
    fn complaint(&self, success: bool, outputs: &[String]) -> Option<String> {
        match self {
            Expected::Ended if success => Some("ended well, though a rank was killed".to_owned()),
            Expected::Ended => None,
            Expected::Lines(n, word) => {
                let word = format!("{word} ");
                let of_the_word =
                    |output: &String| output.lines().filter(|line| line.contains(&word)).count();
                let lines: usize = outputs.iter().map(of_the_word).sum();
                (lines < *n).then(|| format!("expected {n} lines of a {word}, got {lines}"))
            }
            Expected::Passed(n) => {
                let passed: Vec<_> = outputs.iter().map(|output| passed(output)).collect();
                let right = success && passed.iter().all(|passed| passed.is_some_and(|passed| passed >= *n));
                (!right).then(|| format!("expected {n} cases on each rank, got {passed:?}"))
            }
        }
    }
}

/// How many cases a rank passed, if it passed all that it ran.
fn passed(output: &str) -> Option<usize> {
    let (before, _) = output.split_once(" passed; 0 failed")?;
    before.rsplit_once("test result: ok. ")?.1.parse().ok()
}

/// Runs a build of Cargo and returns the executable that it made last.
fn built(arguments: &[&str]) -> Result<PathBuf, String> {
    println!("\n==> cargo {}", arguments.join(" "));
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).arg("--message-format=json-render-diagnostics").current_dir(root());
    let output = command.stderr(Stdio::inherit()).output().map_err(|e| format!("cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!(
            "cargo {}: {}; it needs an MPI and libclang",
            arguments.join(" "),
            output.status
        ));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let after = text.rsplit("\"executable\":\"").next().filter(|_| text.contains("\"executable\":\""));
    let path = after.and_then(|rest| rest.split('"').next());
    path.map(PathBuf::from).ok_or_else(|| format!("cargo {} made no executable", arguments.join(" ")))
}

/// A program that runs the one it is given, with what that one prints in the file of its rank: the launcher would mix the
/// ranks' lines.
fn logged() -> Result<PathBuf, String> {
    let path = work_dir()?.join("logged.sh");
    let text = "#!/bin/sh\nexec \"$@\" >\"${0%/*}/rank-$OMPI_COMM_WORLD_RANK.log\" 2>&1\n";
    let write = || {
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
    };
    write().map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

fn rank_log(rank: usize) -> Result<PathBuf, String> {
    Ok(work_dir()?.join(format!("rank-{rank}.log")))
}

fn work_dir() -> Result<PathBuf, String> {
    let dir = root().join("target/mpi-test");
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    dir.canonicalize().map_err(|e| format!("{}: {e}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_ran_nothing_or_on_fewer_ranks_has_not_passed() {
        let line = "test result: ok. 6 passed; 0 failed; 0 ignored\n".to_owned();
        let all = vec![line.clone(); RANKS];
        let passed = Expected::Passed(6);
        assert_eq!(passed.complaint(true, &all), None);
        assert!(passed.complaint(false, &all).is_some());
        let but_one = |text: String| [vec![line.clone(); RANKS - 1], vec![text]].concat();
        assert!(passed.complaint(true, &but_one(String::new())).is_some());
        assert!(passed.complaint(true, &but_one(line.replace('6', "0"))).is_some());
        assert!(passed.complaint(true, &but_one(line.replace("ok.", "FAILED."))).is_some());
        let survivors = Expected::Lines(2, "survivor");
        let two = ["survivor 1: x\n", "test y ... survivor 0: x\n", ""].map(str::to_owned);
        assert_eq!(survivors.complaint(false, &two), None);
        assert!(survivors.complaint(true, &two[..1]).is_some());
        assert!(Expected::Ended.complaint(true, &all).is_some());
    }
}
