//! What the traced processes do, and what must be true whenever one of them is gone.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use sconce_checkpoint::{Error, Retention, SaveOptions, Series, SeriesOptions, load_new, save_with};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value};
use sconce_mesh::{FileStore, GroupOptions, ProcessGroup, Rank};

use super::ptrace::be_traced;

/// The scenario that this process plays, and where.
const SCENARIO: &str = "SCONCE_CRASH_SCENARIO";
const PLACE: &str = "SCONCE_CRASH_PLACE";
const RANK: &str = "SCONCE_CRASH_RANK";

/// Written while a process starts. Until it is its own program it holds what locks this one holds, and what is locked is
/// not removed.
static STARTING: RwLock<()> = RwLock::new(());

/// A save that is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scenario {
    /// One process saves where there is nothing, not even the directory.
    Save,
    /// One process replaces a checkpoint.
    Overwrite,
    /// Two ranks, threads of one process, replace a checkpoint.
    Threads,
    /// Two ranks, a process each, replace a checkpoint.
    Processes,
    /// One process saves the next checkpoint of a series that keeps one.
    Series,
    /// One process saves the next checkpoint of a series that keeps one and links what did not change.
    Linked,
    /// One process replaces a checkpoint and syncs nothing: what a disk that forgets must find.
    Unsynced,
}

/// The generation that is there before, and the one that is saved.
pub(crate) const OLD: i64 = 1;
pub(crate) const NEW: i64 = 2;
/// The one that a later save writes over what the crash left.
const NEXT: i64 = 3;
/// The one before the old one, where links need it.
const OLDER: i64 = 0;

/// Elements of the tensor.
const NUMEL: usize = 30_000;
/// Bytes of the tensor that never changes.
const FROZEN: usize = 70_000;
const FROZEN_BYTE: u8 = 0xee;

impl Scenario {
    const ALL: [Scenario; 7] = [
        Scenario::Save,
        Scenario::Overwrite,
        Scenario::Threads,
        Scenario::Processes,
        Scenario::Series,
        Scenario::Linked,
        Scenario::Unsynced,
    ];

    /// Number of traced processes.
    pub(crate) fn n_processes(self) -> usize {
        if self == Scenario::Processes { 2 } else { 1 }
    }

    fn n_ranks(self) -> usize {
        if matches!(self, Scenario::Threads | Scenario::Processes) { 2 } else { 1 }
    }

    fn target(self, dir: &Path) -> PathBuf {
        dir.join(if self == Scenario::Save { "runs/c" } else { "c" })
    }

    /// Brings `dir` to where the scenario begins.
    pub(crate) fn prepare(self, dir: &Path) {
        match self {
            Scenario::Save => {}
            Scenario::Series => save_in_series(dir, OLD, false).unwrap(),
            Scenario::Linked => {
                // What is frozen is told from the rest by the second save, and linked by the third.
                save_in_series(dir, OLDER, true).unwrap();
                save_in_series(dir, OLD, true).unwrap();
            }
            _ => drop(save_with(self.target(dir), &state(OLD, 0, 1), SaveOptions::default()).unwrap()),
        }
    }

    /// Saves the new generation as one of the traced processes.
    fn play(self, place: &Place, rank: usize) -> Result<(), Error> {
        let (n_ranks, target) = (self.n_ranks(), self.target(&place.dir()));
        match self {
            Scenario::Save | Scenario::Overwrite => overwrite(&target, NEW, None),
            Scenario::Unsynced => {
                let options = SaveOptions { overwrite: true, sync: false, ..SaveOptions::default() };
                save_with(&target, &state(NEW, 0, 1), options).map(drop)
            }
            Scenario::Series | Scenario::Linked => {
                save_in_series(&place.dir(), NEW, self == Scenario::Linked)
            }
            Scenario::Threads => {
                let groups = ProcessGroup::threads(n_ranks, options()).unwrap();
                std::thread::scope(|scope| {
                    let save = |group| overwrite(&target, NEW, Some(&group));
                    let ranks: Vec<_> =
                        groups.into_iter().map(|group| scope.spawn(move || save(group))).collect();
                    ranks.into_iter().try_for_each(|rank| rank.join().unwrap())
                })
            }
            Scenario::Processes => {
                let store = Arc::new(FileStore::open(place.store()).unwrap());
                let group = ProcessGroup::new(store, Rank(rank), n_ranks, options())?;
                overwrite(&target, NEW, Some(&group))
            }
        }
    }

    /// What is in `dir` now, loaded whole: a generation, or nothing; or why it does not load, or is a mix.
    pub(crate) fn loaded(self, dir: &Path) -> Result<Option<i64>, String> {
        if matches!(self, Scenario::Series | Scenario::Linked) {
            let mut loaded = series_state(0, self == Scenario::Linked);
            let resumed = open_series(dir, false).and_then(|series| series.resume(&mut loaded));
            let Some(resumed) = resumed.map_err(|error| error.to_string())? else { return Ok(None) };
            if !resumed.skipped.is_empty() {
                return Err(format!("the series names damage: {:?}", resumed.skipped));
            }
            return generation(&loaded).map(Some);
        }
        match load_new(self.target(dir)) {
            Ok(loaded) => generation(&loaded).map(Some),
            Err(Error::Missing { .. }) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What may be there before the save is done.
    pub(crate) fn is_allowed(self, found: &Result<Option<i64>, String>) -> bool {
        let old = (self != Scenario::Save).then_some(OLD);
        *found == Ok(old) || *found == Ok(Some(NEW))
    }

    /// A later save over whatever the crash left: it succeeds, and nothing else stays.
    #[track_caller]
    pub(crate) fn check_recovery(self, dir: &Path) {
        let _none_starts = STARTING.read().unwrap_or_else(PoisonError::into_inner);
        if matches!(self, Scenario::Series | Scenario::Linked) {
            save_in_series(dir, NEXT, self == Scenario::Linked).unwrap();
        } else {
            overwrite(&self.target(dir), NEXT, None).unwrap();
        }
        assert_eq!(self.loaded(dir), Ok(Some(NEXT)));
        let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}

/// Directories of one run: the traced one, and one for the ranks to meet in.
pub(crate) struct Place(pub(crate) PathBuf);

impl Place {
    pub(crate) fn dir(&self) -> PathBuf {
        self.0.join("dir")
    }

    fn store(&self) -> PathBuf {
        self.0.join("store")
    }
}

/// In a traced process: plays its scenario and ends. In the test: does nothing.
pub(crate) fn play_if_traced() {
    let Ok(name) = std::env::var(SCENARIO) else { return };
    let scenario = Scenario::ALL.into_iter().find(|scenario| format!("{scenario:?}") == name).unwrap();
    let place = Place(std::env::var_os(PLACE).unwrap().into());
    let rank = std::env::var(RANK).unwrap().parse().unwrap();
    be_traced();
    let failed = scenario.play(&place, rank).inspect_err(|error| println!("{error}")).is_err();
    std::process::exit(i32::from(failed));
}

/// Whether the child has closed what it inherited: its environment is laid out after that.
fn is_own_program(child: &Child) -> bool {
    let environ = std::fs::read(format!("/proc/{}/environ", child.id())).unwrap_or_default();
    environ.windows(SCENARIO.len()).any(|part| part == SCENARIO.as_bytes())
}

/// Starts the processes of a scenario: this test binary again, in the test that called [`play_if_traced`].
pub(crate) fn start(scenario: Scenario, test: &str, place: &Place) -> Vec<Child> {
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
        command.env(SCENARIO, format!("{scenario:?}")).env(PLACE, &place.0).env(RANK, rank.to_string());
        let _alone = STARTING.write().unwrap_or_else(PoisonError::into_inner);
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        // `spawn` may return when the child has its own memory, shortly before it closes what it got from this process.
        let started = Instant::now();
        while !is_own_program(&child) {
            assert!(started.elapsed() < Duration::from_secs(30), "a traced process did not start");
            std::thread::yield_now();
        }
        child
    };
    (0..scenario.n_processes()).map(start).collect()
}

fn options() -> GroupOptions {
    GroupOptions { timeout: Duration::from_secs(20) }
}

fn overwrite(target: &Path, generation: i64, group: Option<&ProcessGroup>) -> Result<(), Error> {
    let (rank, n) = group.map_or((0, 1), |group| (group.group_rank().0, group.size()));
    let options = SaveOptions { group, overwrite: true, ..SaveOptions::default() };
    save_with(target, &state(generation, rank, n), options).map(drop)
}

fn open_series(dir: &Path, link_unchanged: bool) -> Result<Series<'static>, Error> {
    let keep = Retention { last: Some(1), ..Retention::default() };
    Series::open(dir, SeriesOptions { keep, link_unchanged, ..SeriesOptions::default() })
}

fn save_in_series(dir: &Path, generation: i64, link_unchanged: bool) -> Result<(), Error> {
    let state = series_state(generation, link_unchanged);
    let report = open_series(dir, link_unchanged)?.save(generation as u64, &state)?;
    let is_linked = report.saved.linked_bytes > FROZEN as u64;
    assert!(is_linked || !link_unchanged || generation != NEW, "{report:?}");
    Ok(())
}

fn series_state(generation: i64, link_unchanged: bool) -> StateDict<'static> {
    let mut state = state(generation, 0, 1);
    if link_unchanged {
        let frozen = TensorBuf::new(DType::U8, &[FROZEN], vec![FROZEN_BYTE; FROZEN]).unwrap();
        state.insert_tensor("frozen", frozen);
    }
    state
}

/// A state whose every byte tells its generation.
fn state(generation: i64, rank: usize, n_ranks: usize) -> StateDict<'static> {
    let (start, end) = (rank * NUMEL / n_ranks, (rank + 1) * NUMEL / n_ranks);
    let held = TensorBox { offsets: vec![start], sizes: vec![end - start] };
    let bytes = vec![generation as u8; 4 * (end - start)];
    let mut state = StateDict::new();
    state.insert_tensor("w", TensorBuf::from_boxes(DType::F32, &[NUMEL], vec![held], bytes).unwrap());
    state.insert_tensor("b", TensorBuf::new(DType::U8, &[5], vec![generation as u8; 5]).unwrap());
    state.insert("generation", generation);
    state
}

fn generation(state: &StateDict<'_>) -> Result<i64, String> {
    let generation = state.get("generation").and_then(Value::as_int).ok_or("no generation")?;
    for (fqn, tensor) in state.flat_tensors().unwrap() {
        let mut is_whole = true;
        let expected = if fqn.as_str() == "frozen" { i64::from(FROZEN_BYTE) } else { generation };
        tensor.read_box(0, &mut |bytes| is_whole &= bytes.iter().all(|b| i64::from(*b) == expected)).unwrap();
        if !is_whole {
            return Err(format!("{fqn} is not of generation {generation}"));
        }
    }
    Ok(generation)
}
