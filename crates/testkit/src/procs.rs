//! run_procs: one process a rank, each the test binary run again. For what threads cannot show: signals, exits, files
//! and memory shared between processes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sconce_mesh::{
    GroupOptions, ProcessGroup, RankEnv, RankExit, RankOutput, RankProcesses, die_with_parent,
};

/// The test whose ranks this process is one of.
const TEST: &str = "SCONCE_TESTKIT_TEST";
/// The directory that the ranks share.
const DIR: &str = "SCONCE_TESTKIT_DIR";
/// How long the other ranks may take to fail by themselves, once one has.
const GRACE: Duration = Duration::from_secs(10);

/// What a rank of a test has.
pub struct RankContext {
    /// The world of the test's ranks.
    pub world: ProcessGroup,
    /// A directory that all ranks share, removed when the test ends.
    pub dir: PathBuf,
}

/// Runs `body` on `n` ranks, each a process of its own, and fails with the output of those that fail.
///
/// `test` is the test's path inside its binary (`module::name`); `rank_tests!` gives it. `deadline` is that of the
/// whole test.
///
/// # Panics
/// If a rank fails, hangs, or does not run `body`.
pub fn run_procs(test: &str, n: usize, deadline: Duration, body: impl FnOnce(RankContext)) {
    let Some(exits) = run_procs_for_exits(test, n, deadline, body) else { return };
    let report = |exit: &RankExit| {
        let why = if exit.by_itself { "failed" } else { "did not end in time" };
        format!("rank {} {why} ({}):\n{}\n", exit.rank, exit.status, exit.last_lines)
    };
    let reports: Vec<String> = exits.iter().filter(|exit| !exit.status.success()).map(report).collect();
    assert!(reports.is_empty(), "{} of {n} ranks failed\n{}", reports.len(), reports.join("\n"));
}

/// As [`run_procs`], for tests in which ranks are meant to fail: returns how each ended in the process that judges, and
/// `None` in the ranks themselves.
///
/// # Panics
/// If a rank did not run `body`.
pub fn run_procs_for_exits(
    test: &str,
    n: usize,
    deadline: Duration,
    body: impl FnOnce(RankContext),
) -> Option<Vec<RankExit>> {
    if std::env::var(TEST).as_deref() == Ok(test) {
        run_rank(deadline, body);
        return None;
    }
    let dir = tempfile::tempdir().expect("a directory for the ranks");
    let exits = start(test, n, dir.path()).exits(Some(deadline), GRACE).expect("ranks can be waited for");
    for exit in &exits {
        assert!(
            entered(dir.path(), exit.rank.0).exists(),
            "rank {} of test {test:?} did not run it; is that its name?\n{}",
            exit.rank,
            exit.last_lines
        );
    }
    Some(exits)
}

fn run_rank(deadline: Duration, body: impl FnOnce(RankContext)) {
    die_with_parent().expect("the test that started this rank still runs");
    let dir = PathBuf::from(std::env::var_os(DIR).expect("the parent gives the directory"));
    let rank = RankEnv::from_env().expect("the parent gives the rank").rank;
    std::fs::write(entered(&dir, rank.0), "").expect("the directory can be written");
    let world = ProcessGroup::from_env(GroupOptions { timeout: deadline }).expect("the ranks meet");
    body(RankContext { world, dir });
}

/// The test binary again, once a rank.
fn start(test: &str, n: usize, dir: &Path) -> RankProcesses {
    let binary = std::env::current_exe().expect("the test binary has a path");
    let command = |_: &RankEnv| {
        let mut command = Command::new(&binary);
        command.args([test, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"]);
        command.env(TEST, test).env(DIR, dir).env("RAYON_NUM_THREADS", "1");
        command
    };
    RankProcesses::spawn(n, RankOutput::Captured, command).expect("rank processes start")
}

/// The mark that a rank reached its body.
fn entered(dir: &Path, rank: usize) -> PathBuf {
    dir.join(format!(".entered-{rank}"))
}

/// The path of a test inside its binary: without the crate's name, which `module_path!` begins with.
pub fn test_path(path: &'static str) -> &'static str {
    path.split_once("::").map_or(path, |(_, inside)| inside)
}

/// Declares cases that run on rank processes, each as a test of its own, named `group::case`.
///
/// ```text
/// rank_tests! {
///     ranks: 4, deadline: Duration::from_secs(60);
///     mod hsdp_checkpoint {
///         even => |rank| hsdp_checkpoint(&rank.world, Kind::Even);
///         #[ignore = "needs 4 CUDA devices"]
///         cuda_even => |rank| …;
///     }
/// }
/// ```
#[macro_export]
macro_rules! rank_tests {
    (ranks: $ranks:expr, deadline: $deadline:expr; $(
        mod $group:ident { $( $(#[$attribute:meta])* $case:ident => $body:expr; )+ }
    )+) => {$(
        mod $group {
            use super::*;
            $(
                $(#[$attribute])*
                #[test]
                fn $case() {
                    let test = $crate::test_path(concat!(module_path!(), "::", stringify!($case)));
                    $crate::run_procs(test, $ranks, $deadline, $body);
                }
            )+
        }
    )+};
}
