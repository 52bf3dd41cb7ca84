//! Death at every call.

use super::scenario::{NEW, OLD, Place, Scenario, play_if_traced, start};
use super::syscall::Call;
use super::tracer::{End, Observer, Verdict, trace};

/// Kills at the call of that number, counted over all processes.
struct KillAt {
    nth: usize,
    seen: usize,
    verdict: Verdict,
}

impl Observer for KillAt {
    fn entered(&mut self, _: &Call) -> Verdict {
        self.seen += 1;
        if self.seen == self.nth { self.verdict } else { Verdict::Continue }
    }
}

/// Runs the scenario once for each of its calls, and once to its end. Number of calls, and of deaths that left the old
/// and the new checkpoint.
fn kill_at_every_call(scenario: Scenario, test: &str, verdict: Verdict) -> (usize, [usize; 2]) {
    play_if_traced();
    let mut left = [0; 2];
    for nth in 1.. {
        let root = tempfile::tempdir().unwrap();
        let place = Place(root.path().canonicalize().unwrap());
        std::fs::create_dir(place.dir()).unwrap();
        scenario.prepare(&place.dir());
        let mut observer = KillAt { nth, seen: 0, verdict };
        let children = start(scenario, test, &place);
        let ids: Vec<u32> = children.iter().map(std::process::Child::id).collect();
        let ends = trace(&ids, &place.dir(), &mut observer);
        let found = scenario.loaded(&place.dir());
        assert!(scenario.is_allowed(&found), "death at call {nth}: {found:?}");
        if observer.seen < nth {
            assert!(ends.values().all(|end| *end == End::Exited(0)), "{ends:?}");
            assert_eq!(found, Ok(Some(NEW)));
            return (nth - 1, left);
        }
        assert!(ends.values().any(|end| *end == End::Killed), "call {nth}: {ends:?}");
        left[usize::from(found == Ok(Some(NEW)))] += 1;
        scenario.check_recovery(&place.dir());
    }
    unreachable!("a save ends")
}

macro_rules! killed {
    ($($name:ident: $scenario:ident, $verdict:ident, at least $least:literal;)+) => {$(
        #[test]
        fn $name() {
            let test = concat!("killed::", stringify!($name));
            let (calls, [old, new]) = kill_at_every_call(Scenario::$scenario, test, Verdict::$verdict);
            println!("{}: {calls} calls; {old} deaths left generation {OLD} or none, {new} left {NEW}", test);
            assert!(calls >= $least && old > 0 && new > 0, "{calls} calls, {old} old, {new} new");
        }
    )+};
}

killed! {
    one_process_killed_at_any_call_of_a_save_leaves_nothing_or_all: Save, KillAll, at least 20;
    one_process_killed_at_any_call_of_an_overwrite_leaves_the_old_or_the_new: Overwrite, KillAll, at least 20;
    two_ranks_killed_together_at_any_call_leave_the_old_or_the_new: Threads, KillAll, at least 30;
    one_rank_of_two_killed_at_any_call_leaves_the_old_or_the_new: Processes, KillIt, at least 30;
    a_series_that_links_files_killed_at_any_call_goes_on_from_the_old_or_the_new: Linked, KillAll, at least 40;
    a_series_killed_at_any_call_goes_on_from_the_old_or_the_new: Series, KillAll, at least 30;
}
