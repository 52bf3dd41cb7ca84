//! The backends keep the contract of process groups: the local one with ranks as threads and as processes, those of CUDA
//! tensors with processes.

use std::time::Duration;

use sconce_testkit::conformance::{
    ODD_CALLS, process_group_abort, process_group_answers, process_group_answers_at, process_group_mismatch,
};
use sconce_testkit::{Place, gpu_ranks, rank_tests, run_procs, run_ranks, test_path};

const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn thread_ranks_get_the_oracles_answers() {
    for n in [1, 2, 3, 4] {
        run_ranks(n, DEADLINE, |world| process_group_answers(&world, 150, n as u64));
    }
}

#[test]
fn thread_ranks_agree_on_mismatches_and_aborts() {
    for n in [2, 3] {
        for odd in 0..ODD_CALLS.len() {
            run_ranks(n, DEADLINE, |world| process_group_mismatch(&world, odd));
        }
        run_ranks(n, DEADLINE, |world| process_group_abort(&world));
    }
}

rank_tests! {
    ranks: 3, deadline: DEADLINE;
    mod process_ranks {
        get_the_oracles_answers => |rank| process_group_answers(&rank.world, 150, 7);
        agree_on_a_mismatch => |rank| process_group_mismatch(&rank.world, 0);
        learn_of_an_abort => |rank| process_group_abort(&rank.world);
    }
}

rank_tests! {
    ranks: gpu_ranks(), deadline: Duration::from_secs(300);
    mod on_cuda {
        #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
        ranks_get_the_oracles_answers => |rank| {
            process_group_answers_at(&Place::cuda(&rank.world), &rank.world, 300, 11);
        };
    }
}

#[test]
fn two_processes_get_the_oracles_answers() {
    let test = test_path(concat!(module_path!(), "::two_processes_get_the_oracles_answers"));
    run_procs(test, 2, DEADLINE, |rank| process_group_answers(&rank.world, 100, 2));
}
