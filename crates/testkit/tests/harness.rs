//! The harness itself: it must fail when a rank does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::time::Duration;

use sconce_mesh::{Rank, ReduceOp};
use sconce_testkit::{rank_tests, run_procs, run_procs_for_exits, run_ranks, test_path};

const DEADLINE: Duration = Duration::from_secs(20);

rank_tests! {
    ranks: 3, deadline: DEADLINE;
    mod processes {
        share_a_world_and_a_directory => |rank| {
            let mut sum = [rank.world.rank().0 as u32 + 1];
            rank.world.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum, [6]);
            assert!(rank.dir.is_dir());
        };
    }
}

#[test]
fn a_failing_rank_fails_the_test_with_its_output() {
    let test = "a_failing_rank_fails_the_test_with_its_output";
    let fail =
        |rank: sconce_testkit::RankContext| assert_ne!(rank.world.rank(), Rank(1), "rank one says why");
    let Some(exits) = run_procs_for_exits(test, 2, DEADLINE, fail) else { return };
    assert!(exits[0].status.success() && !exits[1].status.success());
    assert!(exits[1].last_lines.contains("rank one says why"), "{}", exits[1].last_lines);
}

#[test]
fn a_rank_that_hangs_is_killed_at_the_deadline() {
    let test = "a_rank_that_hangs_is_killed_at_the_deadline";
    let hang = |rank: sconce_testkit::RankContext| {
        if rank.world.rank() == Rank(0) {
            std::thread::park();
        }
    };
    let Some(exits) = run_procs_for_exits(test, 2, Duration::from_secs(2), hang) else { return };
    assert!(!exits[0].by_itself && exits[1].by_itself && exits[1].status.success());
}

#[test]
#[should_panic(expected = "did not run it; is that its name?")]
fn a_name_that_is_no_test_is_found_out() {
    run_procs("no_such_test", 1, DEADLINE, |_| {});
}

#[test]
#[should_panic(expected = "rank two says why")]
fn a_panic_of_a_thread_rank_is_the_tests() {
    run_ranks(3, DEADLINE, |world| assert_ne!(world.rank(), Rank(2), "rank two says why"));
}

#[test]
fn test_paths_leave_the_crate_out() {
    assert_eq!(test_path("harness::a::b"), "a::b");
}
