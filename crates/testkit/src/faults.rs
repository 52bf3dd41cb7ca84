//! FaultPlan: at the n-th time that a rank comes to an operation, fail, wait, stop, die or corrupt.
//!
//! A plan is one line of text, which a failing test prints and anyone can give it again. What operations there are is
//! found by running once with an empty plan: [`Faults::seen`].

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The operation fails with an error.
    Error,
    /// The rank comes late by [`DELAY`].
    Delay,
    /// The process dies of SIGKILL.
    Kill,
    /// The process is stopped by SIGSTOP.
    Stop,
    /// One bit of what passes here is not what it was.
    Corrupt,
}

/// How late a delayed rank is: longer than any operation of a test takes, far shorter than its deadline.
pub const DELAY: Duration = Duration::from_millis(100);

impl Fault {
    /// Every kind.
    pub const ALL: [Fault; 5] = [Fault::Error, Fault::Delay, Fault::Kill, Fault::Stop, Fault::Corrupt];

    /// Its name in a plan.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Error => "error",
            Fault::Delay => "delay",
            Fault::Kill => "kill",
            Fault::Stop => "stop",
            Fault::Corrupt => "corrupt",
        }
    }
}

/// The `nth` time, from 0, that a rank comes to `operation`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    /// The operation, as whoever calls [`Faults::at`] names it.
    pub operation: String,
    /// How often the rank has been there before.
    pub nth: usize,
}

/// Which rank is struck where, and by what; `rank@operation#nth=fault`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultPlan {
    /// The rank.
    pub rank: usize,
    /// The place.
    pub point: Point,
    /// What happens there.
    pub fault: Fault,
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Point { operation, nth } = &self.point;
        write!(f, "{}@{operation}#{nth}={}", self.rank, self.fault.name())
    }
}

impl FromStr for FaultPlan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = || {
            let (rank, rest) = text.split_once('@')?;
            let (point, fault) = rest.rsplit_once('=')?;
            let (operation, nth) = point.rsplit_once('#')?;
            let point = Point { operation: operation.to_owned(), nth: nth.parse().ok()? };
            let fault = Fault::ALL.into_iter().find(|kind| kind.name() == fault)?;
            Some(FaultPlan { rank: rank.parse().ok()?, point, fault })
        };
        parsed().ok_or_else(|| format!("expected rank@operation#nth=fault, got {text:?}"))
    }
}

/// What whoever came to a point must do. Waiting, stopping and dying have happened, if they were due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "an injected error must become one"]
pub enum Verdict {
    /// Nothing.
    GoOn,
    /// Fail with an error of its own kind.
    Fail,
    /// Flip a bit.
    Corrupt,
}

thread_local! {
    static LOOKING_ON: Cell<bool> = const { Cell::new(false) };
}

/// One rank's faults: it counts the operations and strikes. Clones are the same.
#[derive(Debug, Clone)]
pub struct Faults {
    plan: Option<FaultPlan>,
    /// Written at the moment of the strike.
    mark: PathBuf,
    counts: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Faults {
    /// Those of `rank` under `plan`; `mark` is a file whose time of change will be the strike's.
    pub fn new(rank: usize, plan: Option<FaultPlan>, mark: impl Into<PathBuf>) -> Faults {
        let plan = plan.filter(|plan| plan.rank == rank);
        Faults { plan, mark: mark.into(), counts: Arc::default() }
    }

    /// This rank has come to `operation`. While this thread looks on ([`Faults::looking_on`]) it has not.
    pub fn at(&self, operation: &str) -> Verdict {
        if LOOKING_ON.get() {
            return Verdict::GoOn;
        }
        let nth = {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(operation.to_owned()).or_default();
            *count += 1;
            *count - 1
        };
        let is_due = |plan: &&FaultPlan| plan.point.operation == operation && plan.point.nth == nth;
        self.plan.as_ref().filter(is_due).map_or(Verdict::GoOn, |plan| self.strike(plan.fault))
    }

    /// Runs `look`, what a test does to see what came of its operations: nothing that this thread comes to meanwhile is a
    /// point of a plan.
    pub fn looking_on<R>(look: impl FnOnce() -> R) -> R {
        let before = LOOKING_ON.replace(true);
        let seen = look();
        LOOKING_ON.set(before);
        seen
    }

    fn strike(&self, fault: Fault) -> Verdict {
        std::fs::write(&self.mark, "").expect("the mark can be written");
        let signal = |signal| {
            kill_process(getpid(), signal).expect("a process may signal itself");
            // Another thread may be the one that takes it; this one must not go on meanwhile.
            std::thread::sleep(DELAY);
        };
        match fault {
            Fault::Error => return Verdict::Fail,
            Fault::Corrupt => return Verdict::Corrupt,
            Fault::Delay => std::thread::sleep(DELAY),
            Fault::Kill => signal(Signal::KILL),
            Fault::Stop => signal(Signal::STOP),
        }
        Verdict::GoOn
    }

    /// Every point that this rank has come to.
    pub fn seen(&self) -> Vec<Point> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let points = |(operation, count): (&String, &usize)| {
            let operation = operation.clone();
            (0..*count).map(move |nth| Point { operation: operation.clone(), nth }).collect::<Vec<_>>()
        };
        counts.iter().flat_map(points).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> FaultPlan {
        text.parse().unwrap()
    }

    #[test]
    fn a_plan_is_its_text() {
        for text in ["0@write#0=error", "3@after all_reduce#12=stop", "1@a=b#c#2=corrupt"] {
            assert_eq!(plan(text).to_string(), text);
        }
        for text in ["", "x@write#0=kill", "0@write=kill", "0@write#0=hug"] {
            assert!(text.parse::<FaultPlan>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_the_planned_rank_is_struck_and_only_the_nth_time() {
        let dir = tempfile::tempdir().unwrap();
        let faults = |rank| Faults::new(rank, Some(plan("1@write#1=error")), dir.path().join("mark"));
        let (other, struck) = (faults(0), faults(1));
        let verdicts =
            |faults: &Faults| ["write", "read", "write", "write"].map(|operation| faults.at(operation));
        assert_eq!(verdicts(&other), [Verdict::GoOn; 4]);
        assert!(!dir.path().join("mark").exists());
        assert_eq!(verdicts(&struck), [Verdict::GoOn, Verdict::GoOn, Verdict::Fail, Verdict::GoOn]);
        assert!(dir.path().join("mark").exists());
        let seen: Vec<_> = struck.seen().into_iter().map(|p| (p.operation, p.nth)).collect();
        let expected = [("read", 0), ("write", 0), ("write", 1), ("write", 2)];
        assert_eq!(seen, expected.map(|(operation, nth)| (operation.to_owned(), nth)));
    }

    #[test]
    fn what_a_test_looks_at_is_no_point() {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::new(0, Some(plan("0@read#1=error")), dir.path().join("mark"));
        assert_eq!(faults.at("read"), Verdict::GoOn);
        assert_eq!(Faults::looking_on(|| faults.at("read")), Verdict::GoOn);
        assert_eq!(faults.at("read"), Verdict::Fail);
    }

    #[test]
    fn a_delay_is_as_long_as_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::new(0, Some(plan("0@x#0=delay")), dir.path().join("mark"));
        let started = std::time::Instant::now();
        assert_eq!(faults.at("x"), Verdict::GoOn);
        assert!(started.elapsed() >= DELAY);
    }
}
