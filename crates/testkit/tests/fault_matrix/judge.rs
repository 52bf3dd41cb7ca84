//! Starts the ranks of a cell, waits for what they say, and judges it.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime};

use sconce_mesh::{Rank, RankOutput, RankProcesses};
use sconce_testkit::{Fault, FaultPlan, Point};

use crate::{RANKS, TEST, checkpoints, rank};

/// Deadline of a collective where a rank stops, and every survivor must wait for it.
const SHORT: Duration = Duration::from_millis(1500);
/// The deadline elsewhere: nothing may need it.
const LONG: Duration = Duration::from_secs(20);
/// How far past what is due a survivor may be on a machine that runs several worlds at a time.
const SLACK: Duration = Duration::from_secs(4);

/// One scenario under one plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) scenario: String,
    pub(crate) plan: FaultPlan,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.scenario, self.plan)
    }
}

impl FromStr for Cell {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scenario, plan) = text.split_once(':').ok_or("expected scenario:plan")?;
        Ok(Cell { scenario: scenario.to_owned(), plan: plan.parse()? })
    }
}

/// What came of a cell.
#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) cell: Cell,
    /// What survivors said; `ok` and one error at most.
    pub(crate) told: BTreeSet<String>,
    /// From the strike to the last survivor's word.
    pub(crate) latency: Duration,
    pub(crate) wrong: Vec<String>,
}

impl Judged {
    pub(crate) fn complaint(&self) -> Option<String> {
        let what = self.wrong.join("; ");
        (!self.wrong.is_empty())
            .then(|| format!("SCONCE_FAULT_CELL='{}': {what}; {:?}", self.cell, self.told))
    }
}

/// Where each rank comes by without any fault.
pub(crate) fn points(scenario: &str) -> Vec<Vec<Point>> {
    let dir = tempfile::tempdir().unwrap();
    let mut ranks = start(dir.path(), scenario, "", LONG);
    ranks.wait(Some(LONG), LONG).unwrap();
    let read = |g| {
        let outcome = std::fs::read_to_string(rank::outcome(dir.path(), g)).unwrap();
        assert_eq!(outcome, "ok", "{scenario} without faults, rank {g}");
        let text = std::fs::read_to_string(rank::points(dir.path(), g)).unwrap();
        let point = |line: &str| {
            let (nth, operation) = line.split_once(' ').unwrap();
            Point { operation: operation.to_owned(), nth: nth.parse().unwrap() }
        };
        text.lines().map(point).collect()
    };
    (0..RANKS).map(read).collect()
}

fn start(dir: &Path, scenario: &str, plan: &str, timeout: Duration) -> RankProcesses {
    checkpoints::commit_old(&rank::checkpoint(dir));
    let binary = std::env::current_exe().unwrap();
    let command = |_: &_| {
        let mut command = Command::new(&binary);
        command.args([TEST, "--exact", "--nocapture", "--test-threads=1"]);
        command.envs(rank::vars(dir, scenario, plan, timeout));
        command
    };
    RankProcesses::spawn(RANKS, RankOutput::Captured, command).unwrap()
}

/// Runs one cell.
pub(crate) fn run(cell: &Cell) -> Judged {
    let dir = tempfile::tempdir().unwrap();
    let FaultPlan { rank: struck, fault, .. } = cell.plan;
    let timeout = if fault == Fault::Stop { SHORT } else { LONG };
    let mut ranks = start(dir.path(), &cell.scenario, &cell.plan.to_string(), timeout);
    let speaks = |g: &usize| *g != struck || !matches!(fault, Fault::Kill | Fault::Stop);
    let speakers: Vec<usize> = (0..RANKS).filter(speaks).collect();
    let started = Instant::now();
    let all_spoke = || speakers.iter().all(|g| rank::outcome(dir.path(), *g).exists());
    // The others may be done before a slow rank comes to where it is struck.
    let is_over = || all_spoke() && rank::mark(dir.path()).exists();
    while !is_over() && started.elapsed() < LONG + SLACK {
        std::thread::sleep(Duration::from_millis(3));
    }
    if fault == Fault::Stop {
        ranks.kill(Rank(struck)).unwrap();
    }
    let exits = ranks.exits(Some(SLACK), SLACK).unwrap();
    let mut judged =
        Judged { cell: cell.clone(), told: BTreeSet::new(), latency: Duration::ZERO, wrong: vec![] };
    for g in speakers {
        match std::fs::read_to_string(rank::outcome(dir.path(), g)) {
            Ok(outcome) => judged.hear(g, &outcome),
            Err(_) => judged.wrong.push(format!("rank {g} said nothing: {}", exits[g].last_lines)),
        }
    }
    judged.time(dir.path(), timeout);
    judged.look_at_commit(dir.path());
    judged
}

fn is_typed(outcome: &str) -> bool {
    ["lost ", "timeout, missing "].iter().any(|kind| outcome.starts_with(kind))
}

impl Judged {
    fn hear(&mut self, rank: usize, outcome: &str) {
        let FaultPlan { rank: struck, fault, .. } = self.cell.plan;
        let is_about_struck = match outcome {
            "ok" => true,
            "injected" => rank == struck && fault == Fault::Error,
            _ => {
                let named = [format!("lost {struck}"), format!("timeout, missing [Rank({struck})]")];
                let of_all = outcome.starts_with("ranks: ") && outcome.contains(&format!("rank {struck}: "));
                let through_another = self.is_between_two() && is_typed(outcome);
                named.iter().any(|name| name == outcome) || of_all || through_another
            }
        };
        if !is_about_struck {
            self.wrong.push(format!("rank {rank} does not name rank {struck}"));
        }
        // Who was struck may say so in its own words; the others must agree.
        if rank != struck || outcome.starts_with("ranks: ") {
            self.told.insert(outcome.to_owned());
        }
    }

    fn time(&mut self, dir: &Path, timeout: Duration) {
        let modified = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified()).ok();
        let Some(struck) = modified(&rank::mark(dir)) else {
            return self.wrong.push("the fault did not strike".to_owned());
        };
        let survivors = (0..RANKS).filter(|g| *g != self.cell.plan.rank);
        let last =
            survivors.filter_map(|g| modified(&rank::outcome(dir, g))).max().unwrap_or(SystemTime::now());
        self.latency = last.duration_since(struck).unwrap_or_default();
        let due = if self.cell.plan.fault == Fault::Stop { timeout } else { Duration::ZERO };
        if self.latency > due + SLACK {
            self.wrong.push(format!("a survivor ended {:?} after the strike", self.latency));
        }
    }

    /// Whether only the two ends of each call take part. A third rank, which waits for one that failed because of the
    /// struck one, can name no other than that one, or be done before.
    fn is_between_two(&self) -> bool {
        self.cell.scenario == "send_recv"
    }

    fn look_at_commit(&mut self, dir: &Path) {
        if self.told.len() > 1 && !self.is_between_two() {
            self.wrong.push("survivors differ".to_owned());
        }
        let is_ok = self.told.contains("ok");
        if self.cell.plan.fault == Fault::Delay && !is_ok {
            self.wrong.push("a delay is no failure".to_owned());
        }
        let must_be_new = self.cell.scenario.contains("save") && is_ok;
        match checkpoints::committed(&self.cell.scenario, &rank::checkpoint(dir)) {
            Err(error) => self.wrong.push(format!("the last commit does not load: {error}")),
            Ok(checkpoints::NEW) if !self.cell.scenario.contains("save") => {
                self.wrong.push("a save that never was is committed".to_owned());
            }
            Ok(checkpoints::OLD) if must_be_new => {
                self.wrong.push("a save that succeeded is not there".to_owned())
            }
            Ok(_) => {}
        }
    }
}
