//! What one rank process of a cell does: its scenario, under its plan, and then a file that says how it ended.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sconce_mesh::{Error, GroupOptions, ProcessGroup, RankEnv, die_with_parent};
use sconce_testkit::{Faults, strike_collectives};

use crate::{checkpoints, collectives};

const DIR: &str = "SCONCE_FAULT_DIR";
const SCENARIO: &str = "SCONCE_FAULT_SCENARIO";
const PLAN: &str = "SCONCE_FAULT_PLAN";
const TIMEOUT: &str = "SCONCE_FAULT_TIMEOUT_MS";

/// What a rank finds in its environment.
pub(crate) fn vars(dir: &Path, scenario: &str, plan: &str, timeout: Duration) -> [(&'static str, String); 4] {
    [
        (DIR, dir.to_string_lossy().into_owned()),
        (SCENARIO, scenario.to_owned()),
        (PLAN, plan.to_owned()),
        (TIMEOUT, timeout.as_millis().to_string()),
    ]
}

/// The checkpoint of a cell.
pub(crate) fn checkpoint(dir: &Path) -> PathBuf {
    dir.join("checkpoint")
}

/// Written when the fault strikes.
pub(crate) fn mark(dir: &Path) -> PathBuf {
    dir.join("struck")
}

/// How a rank's scenario ended: `ok`, or an error's kind and words.
pub(crate) fn outcome(dir: &Path, rank: usize) -> PathBuf {
    dir.join(format!("outcome-{rank}"))
}

/// The points that a rank came to, `nth operation` a line.
pub(crate) fn points(dir: &Path, rank: usize) -> PathBuf {
    dir.join(format!("points-{rank}"))
}

pub(crate) fn is_rank() -> bool {
    std::env::var_os(DIR).is_some()
}

/// Runs this rank's scenario.
pub(crate) fn run() {
    die_with_parent().unwrap();
    let var = |name: &str| std::env::var(name).unwrap();
    let dir = PathBuf::from(var(DIR));
    let rank = RankEnv::from_env().unwrap().rank.0;
    let plan = Some(var(PLAN)).filter(|plan| !plan.is_empty()).map(|plan| plan.parse().unwrap());
    let faults = Faults::new(rank, plan, mark(&dir));
    strike_collectives(&faults);
    let timeout = Duration::from_millis(var(TIMEOUT).parse().unwrap());
    let world = ProcessGroup::from_env(GroupOptions { timeout }).unwrap();
    let scenario = var(SCENARIO);
    let ended = match collectives::run(&scenario, &world) {
        Some(ended) => ended.map_err(|error| told(&error)),
        None => {
            let ended = checkpoints::run(&scenario, &world, &checkpoint(&dir), &faults);
            ended
                .unwrap_or_else(|| panic!("no scenario {scenario:?}"))
                .map_err(|error| told_of_checkpoint(&error))
        }
    };
    let seen: Vec<String> =
        faults.seen().into_iter().map(|point| format!("{} {}\n", point.nth, point.operation)).collect();
    std::fs::write(points(&dir, rank), seen.concat()).unwrap();
    // By rename, so that who looks for it finds it whole.
    let beside = dir.join(format!(".outcome-{rank}"));
    std::fs::write(&beside, ended.map_or_else(|error| error, |()| "ok".to_owned())).unwrap();
    std::fs::rename(beside, outcome(&dir, rank)).unwrap();
}

/// An error as all ranks must see it: without who reports it and what it was doing.
fn told(error: &Error) -> String {
    match error {
        Error::PeerLost { rank, .. } => format!("lost {rank}"),
        Error::Timeout { missing, .. } => format!("timeout, missing {missing:?}"),
        Error::Aborted { rank, .. } => format!("aborted by {rank}"),
        Error::Backend { backend: "fault", .. } => "injected".to_owned(),
        other => format!("untyped: {other}"),
    }
}

fn told_of_checkpoint(error: &sconce_checkpoint::Error) -> String {
    use sconce_checkpoint::Error;
    match error {
        Error::Mesh(error) => told(error),
        Error::PartlyLoaded { cause, .. } if matches!(**cause, Error::Mesh(_)) => told_of_checkpoint(cause),
        Error::PartlyLoaded { .. } | Error::Ranks { .. } => format!("ranks: {error}"),
        other => format!("one rank's alone: {other}"),
    }
}
