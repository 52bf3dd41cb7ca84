//! The MPI backend keeps the contract of process groups. Every rank is one process of an MPI job that runs this whole
//! binary, one test after the other, so that the cases meet: `cargo xtask mpi-test` starts such jobs.

#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, kill_process};
use sconce_mesh::{BackendSpec, CpuBackend, Error, GroupOptions, GroupRank, ProcessGroup, Rank, ReduceOp};
use sconce_testkit::conformance::{
    ODD_CALLS, process_group_abort, process_group_answers, process_group_mismatch,
};

const DEADLINE: Duration = Duration::from_secs(60);

/// The world of the job, which must have several ranks.
fn world(timeout: Duration) -> ProcessGroup {
    let backends = BackendSpec { cpu: CpuBackend::Mpi, cuda: None };
    let world = ProcessGroup::from_env_with(backends, GroupOptions { timeout }).unwrap();
    assert!(world.size() > 1, "these cases run in an MPI job: cargo xtask mpi-test");
    world
}

#[test]
#[ignore = "needs an MPI: cargo xtask mpi-test"]
fn ranks_get_the_oracles_answers() {
    process_group_answers(&world(DEADLINE), 120, 5);
}

#[test]
#[ignore = "needs an MPI: cargo xtask mpi-test"]
fn ranks_agree_on_every_mismatch() {
    for odd in 0..ODD_CALLS.len() {
        process_group_mismatch(&world(DEADLINE), odd);
    }
}

#[test]
#[ignore = "needs an MPI: cargo xtask mpi-test"]
fn ranks_learn_of_an_abort() {
    process_group_abort(&world(DEADLINE));
}

#[test]
#[ignore = "needs an MPI: cargo xtask mpi-test"]
fn all_ranks_get_the_same_bits_from_sums_that_depend_on_the_order() {
    let world = world(DEADLINE);
    for len in [10, 100_003] {
        let value = |i: usize| (1.0 + i as f32).powi(7 * (1 + world.rank().0 as i32) % 11) * 1e-3;
        let mut sum: Vec<f32> = (0..len).map(value).collect();
        world.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        let all = world.all_gather_object(bytemuck::cast_slice(&sum)).unwrap();
        assert!(all.iter().all(|other| *other == all[0]));
    }
}

#[test]
#[ignore = "needs an MPI: cargo xtask mpi-test"]
fn large_buffers_take_several_rounds() {
    let world = world(DEADLINE);
    let (n, len) = (world.size(), 6_000_001);
    let mut sum: Vec<i64> = (0..len as i64).collect();
    world.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    assert!((0..).zip(&sum).all(|(i, sum)| *sum == i * n as i64));
    let root = GroupRank(n - 1);
    let mut buffer = if world.group_rank() == root { sum.clone() } else { vec![0; len] };
    world.broadcast(&mut buffer, root).unwrap();
    assert_eq!(buffer, sum);
    let mut all = vec![0; len * n];
    world.all_gather_into(&sum, &mut all).unwrap();
    assert!(all.chunks(len).all(|part| part == sum));
    let mut part = vec![0; len];
    world.reduce_scatter(&all, &mut part, ReduceOp::Max).unwrap();
    assert_eq!(part, sum);
    let mut back = vec![0; len * n];
    world.all_to_all(&all, &mut back).unwrap();
    assert_eq!(back, all);
}

#[test]
#[ignore = "needs an MPI: cargo xtask mpi-test"]
fn a_stopped_rank_is_a_timeout_that_names_it() {
    let world = world(Duration::from_secs(2));
    let pids = world.all_gather_object(&getpid().as_raw_pid().to_le_bytes()).unwrap();
    let last = Rank(world.size() - 1);
    let pid = i32::from_le_bytes(pids[last.0].clone().try_into().unwrap());
    let signal = |signal| kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    let barrier = |step| {
        if step == 100 && world.rank() == Rank(0) {
            signal(Signal::STOP);
        }
        world.barrier().err()
    };
    let error = (0..).find_map(barrier).unwrap();
    if world.rank() == last {
        // Whoever woke it up had given up.
        return;
    }
    let Error::Timeout { missing, .. } = &error else { panic!("{error}") };
    assert_eq!(missing, &[last]);
    println!("survivor {}: {error}", world.rank());
    assert_eq!(world.barrier(), Err(error));
    // The others give up at about the same time.
    std::thread::sleep(Duration::from_secs(2));
    if world.rank() == Rank(0) {
        signal(Signal::CONT);
    }
}

#[test]
#[ignore = "needs an MPI: cargo xtask mpi-test"]
fn a_rank_that_left_is_lost_to_those_who_need_it_only() {
    let world = world(DEADLINE);
    let (first, rest) = (vec![Rank(0)], world.ranks()[1..].to_vec());
    let group = world.subgroups(&[first, rest]).unwrap().unwrap();
    if world.rank() == Rank(0) {
        return;
    }
    let started = Instant::now();
    let error = world.barrier().unwrap_err();
    assert!(matches!(error, Error::PeerLost { rank: Rank(0), .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    let mut sum = [1u32];
    group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    assert_eq!(sum[0] as usize, group.size());
}

/// Runs in a job of its own. Without ULFM the launcher may end the survivors at any moment, with ULFM they must return.
#[test]
#[ignore = "needs an MPI: cargo xtask mpi-test"]
fn a_killed_rank_is_lost_to_the_survivors() {
    let world = world(DEADLINE);
    let last = Rank(world.size() - 1);
    let mut buffer = vec![1f32; 100_000];
    let killed = Instant::now();
    let error = (0..)
        .find_map(|step| {
            if step == 20 && world.rank() == last {
                kill_process(getpid(), Signal::KILL).unwrap();
            }
            world.all_reduce(&mut buffer, ReduceOp::Max).err()
        })
        .unwrap();
    assert!(matches!(&error, Error::PeerLost { rank, .. } if *rank == last), "{error}");
    assert!(killed.elapsed() < Duration::from_secs(10), "{:?}", killed.elapsed());
    println!("survivor {}: {error}", world.rank());
}
