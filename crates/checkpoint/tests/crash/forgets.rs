//! Power failures: the recorded operations of a save, and every state that a disk which forgets may be in.

use std::collections::HashSet;
use std::path::Path;

use super::disk::{Tree, states};
use super::recorder::Recorder;
use super::scenario::{NEW, Place, Scenario, play_if_traced, start};
use super::tracer::{End, trace};

/// How many random states are tried after each operation, beside the systematic ones.
fn n_random() -> usize {
    std::env::var("SCONCE_CRASH_STATES").map_or(1000, |n| n.parse().expect("a number"))
}

/// Different states of the disk that were loaded.
#[derive(Debug, Default)]
struct Tally {
    states: usize,
    new: usize,
    /// What neither the old nor the new checkpoint loaded from, or lost what the save had promised.
    lost: Vec<String>,
}

/// How often a scenario is recorded at most. Where ranks take turns, each recording has other states.
const MAX_RECORDINGS: usize = 4;

/// Fails after every operation of recordings of the scenario, until `least` different states were loaded.
fn fail_after_every_operation(scenario: Scenario, test: &str, least: usize) -> Tally {
    play_if_traced();
    let scratch = scratch();
    let mut tally = Tally::default();
    // While the save runs, and once it is over and more is promised.
    let mut seen = [HashSet::new(), HashSet::new()];
    for _ in 0..MAX_RECORDINGS {
        let root = tempfile::tempdir().unwrap();
        let place = Place(root.path().canonicalize().unwrap());
        let recorder = record(scenario, test, &place);
        for done in 0..=recorder.ops.len() {
            let is_over = done == recorder.ops.len();
            let seen = &mut seen[usize::from(is_over)];
            states(&recorder.before, &recorder.ops, done, n_random(), seen, |tree| {
                let dir = scratch.path().join(tally.states.to_string());
                materialize(tree, &dir);
                let found = scenario.loaded(&dir);
                if !scenario.is_allowed(&found) || (is_over && found != Ok(Some(NEW))) {
                    tally.lost.push(format!("after {done} operations: {found:?}"));
                } else if tally.states % 16 == 0 {
                    scenario.check_recovery(&dir);
                }
                tally.new += usize::from(found == Ok(Some(NEW)));
                tally.states += 1;
                std::fs::remove_dir_all(&dir).unwrap();
            });
        }
        let Tally { states, new, lost } = &tally;
        let operations = recorder.ops.len();
        println!("{test}: {operations} operations, {states} states, {new} new, {} lost", lost.len());
        if tally.states >= least {
            break;
        }
    }
    tally
}

fn record(scenario: Scenario, test: &str, place: &Place) -> Recorder {
    std::fs::create_dir(place.dir()).unwrap();
    scenario.prepare(&place.dir());
    let mut recorder = Recorder::of(&place.dir());
    let children = start(scenario, test, place);
    let ids: Vec<u32> = children.iter().map(std::process::Child::id).collect();
    let ends = trace(&ids, &place.dir(), &mut recorder);
    assert!(ends.values().all(|end| *end == End::Exited(0)), "{ends:?}");
    recorder.check();
    recorder
}

/// A directory in memory, where there is one: the states are many, and nothing of them need be kept.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn materialize(tree: &Tree, dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    for (path, bytes) in tree {
        match bytes {
            None => std::fs::create_dir(dir.join(path)).unwrap(),
            Some(bytes) => std::fs::write(dir.join(path), bytes).unwrap(),
        }
    }
}

macro_rules! forgets {
    ($($name:ident: $scenario:ident, at least $least:literal states;)+) => {$(
        #[test]
        fn $name() {
            let test = concat!("forgets::", stringify!($name));
            let Tally { states, new, lost } = fail_after_every_operation(Scenario::$scenario, test, $least);
            assert!(lost.is_empty(), "{lost:#?}");
            assert!(states >= $least && new > 0 && new < states, "{states} states, {new} new");
        }
    )+};
}

forgets! {
    a_save_survives_any_power_failure: Save, at least 1000 states;
    an_overwrite_survives_any_power_failure: Overwrite, at least 1000 states;
    an_overwrite_by_two_ranks_survives_any_power_failure: Threads, at least 700 states;
    a_series_that_links_files_survives_any_power_failure: Linked, at least 1000 states;
    a_series_survives_any_power_failure: Series, at least 1000 states;
}

#[test]
fn the_disk_finds_what_a_save_without_syncs_loses() {
    let test = "forgets::the_disk_finds_what_a_save_without_syncs_loses";
    let Tally { states, lost, .. } = fail_after_every_operation(Scenario::Unsynced, test, 1);
    assert!(lost.len() * 4 > states, "{} of {states} states are lost", lost.len());
}
