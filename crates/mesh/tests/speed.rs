//! How long collectives take, with ranks as threads and as processes. Run it by name, in release:
//! `cargo test --release -p sconce-mesh --test speed -- --ignored --nocapture`

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "test code: clippy knows it only inside `#[test]`"
)]

#[expect(dead_code, reason = "what only tests of faults use")]
mod support;

use std::time::{Duration, Instant};

use sconce_mesh::{GroupOptions, ProcessGroup, ReduceOp};
use support::procs;

const RANKS: usize = 4;
const LARGE: usize = 16 << 20;
const MANY: u32 = 2000;

/// Median time of `call`, which all ranks make.
fn time(group: &ProcessGroup, repeats: usize, mut call: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..repeats)
        .map(|_| {
            group.barrier().unwrap();
            let started = Instant::now();
            call();
            started.elapsed()
        })
        .collect();
    times.sort();
    times[repeats / 2]
}

fn measure(kind: &str, group: &ProcessGroup) {
    let mut large = vec![0f32; LARGE];
    let mut part = vec![1f32; LARGE / RANKS];
    let mut small = vec![0f32; 1024];
    let mut halves = vec![half::bf16::ONE; LARGE * 2];
    let all_reduce = time(group, 9, || group.all_reduce(&mut large, ReduceOp::Sum).unwrap());
    let sum_bf16 = time(group, 9, || group.all_reduce(&mut halves, ReduceOp::Avg).unwrap());
    let reduce_scatter = time(group, 9, || group.reduce_scatter(&large, &mut part, ReduceOp::Sum).unwrap());
    let all_gather = time(group, 9, || group.all_gather_into(&part, &mut large).unwrap());
    let many =
        time(group, 5, || (0..MANY).for_each(|_| group.all_reduce(&mut small, ReduceOp::Sum).unwrap()));
    let barriers = time(group, 5, || (0..MANY).for_each(|_| group.barrier().unwrap()));
    let (latency, barrier) = (many / MANY, barriers / MANY);
    if group.rank().0 == 0 {
        println!(
            "{RANKS} {kind}: 64 MiB all_reduce f32 {all_reduce:.1?}, bf16 {sum_bf16:.1?}, all_gather \
             {all_gather:.1?}, reduce_scatter {reduce_scatter:.1?}; 4 KiB all_reduce {latency:.1?}, barrier {barrier:.1?}"
        );
    }
}

#[test]
#[ignore = "prints times, asserts none"]
fn times_of_thread_ranks() {
    let groups = ProcessGroup::threads(RANKS, GroupOptions::default()).unwrap();
    std::thread::scope(|scope| {
        groups.iter().for_each(|group| drop(scope.spawn(|| measure("threads", group))));
    });
}

#[test]
#[ignore = "prints times, asserts none"]
fn times_of_process_ranks() {
    let ranks = procs("times_of_process_ranks", &[0, 1, 2, 3], |process| {
        measure("processes", &process.join(RANKS, Duration::from_secs(60)).unwrap());
    });
    if let Some(mut ranks) = ranks {
        ranks.assert_success(&[0, 1, 2, 3]);
    }
}
