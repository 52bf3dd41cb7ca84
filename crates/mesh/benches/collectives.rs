//! How long the collectives of the `local` backend take on rank processes. Prints one line a figure, judges nothing:
//! `cargo xtask bench collectives` sets the lines beside those of others.
//!
//! ```text
//! ranks TAB op TAB bytes TAB seconds [TAB bytes copied by all ranks TAB bytes a second that all copy together]
//! ```
//!
//! `bytes` is the longest buffer of the call on one rank. Seconds are the median over repeats of the slowest rank.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

use std::hint::black_box;
use std::process::Command;
use std::time::{Duration, Instant};

use sconce_mesh::{
    GroupOptions, GroupRank, ProcessGroup, RankEnv, RankOutput, RankProcesses, ReduceOp, die_with_parent,
};

const RANKS: [usize; 2] = [2, 4];
const BYTES: [usize; 4] = [1 << 20, 4 << 20, 16 << 20, 64 << 20];
const SMALL: usize = 4096;
/// Bytes that a rank copies in one measurement of the machine's speed: many times a turn of the scheduler.
const COPIED_BYTES: usize = 512 << 20;
/// Small calls in one measurement.
const BURST: usize = 200;

fn main() {
    die_with_parent().unwrap();
    if RankEnv::from_env().unwrap().world_size > 1 {
        return rank();
    }
    for n in RANKS {
        let command = |_: &RankEnv| Command::new(std::env::current_exe().unwrap());
        let mut ranks = RankProcesses::spawn(n, RankOutput::Inherited, command).unwrap();
        ranks.wait(Some(Duration::from_secs(300)), Duration::from_secs(5)).unwrap();
    }
}

fn rank() {
    let group = ProcessGroup::from_env(GroupOptions::default()).unwrap();
    for bytes in BYTES {
        large(&group, bytes);
    }
    small(&group);
}

fn large(group: &ProcessGroup, bytes: usize) {
    let (n, whole) = (group.size(), bytes / 4);
    let part = whole / n;
    let bandwidth = copy_bandwidth(group, bytes);
    let (mut all, mut all_too, mut one) = (vec![1f32; whole], vec![1f32; whole], vec![1f32; part]);
    let report = |op: &str, copied: f64, seconds: f64| {
        if group.rank().0 == 0 {
            let copied = copied * bytes as f64;
            println!("{n}\t{op}\t{bytes}\t{seconds}\t{copied}\t{bandwidth}");
        }
    };
    // Copies by all ranks, in multiples of the buffer: what goes in, what comes out. Reducing k parts into one reads k
    // and writes 1, which is (k + 1) / 2 copies of a part.
    let ranks = n as f64;
    let reduced = (ranks + 1.0) / 2.0;
    let seconds = time(group, || group.all_reduce(&mut all, ReduceOp::Max).unwrap());
    report("all_reduce", (ranks - 1.0) + reduced + ranks, seconds);
    let seconds = time(group, || group.all_gather_into(&one, &mut all).unwrap());
    report("all_gather", 1.0 + ranks, seconds);
    let seconds = time(group, || group.reduce_scatter(&all, &mut one, ReduceOp::Sum).unwrap());
    report("reduce_scatter", (ranks - 1.0) + reduced, seconds);
    let seconds = time(group, || group.broadcast(&mut all, GroupRank(0)).unwrap());
    report("broadcast", ranks, seconds);
    let seconds = time(group, || group.all_to_all(&all, &mut all_too).unwrap());
    report("all_to_all", 2.0 * (ranks - 1.0) + 1.0, seconds);
}

fn small(group: &ProcessGroup) {
    let mut buffer = vec![1f32; SMALL / 4];
    let burst = time(group, || {
        (0..BURST).for_each(|_| group.all_reduce(&mut buffer, ReduceOp::Max).unwrap());
    });
    if group.rank().0 == 0 {
        println!("{}\tall_reduce\t{SMALL}\t{}", group.size(), burst / BURST as f64);
    }
}

/// Bytes a second that all ranks copy together, each between buffers of its own. So often that ranks which share a core
/// take turns: one short copy would end before the core's other rank has its turn, and tell of twice the cores.
fn copy_bandwidth(group: &ProcessGroup, bytes: usize) -> f64 {
    let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
    let copies = COPIED_BYTES.div_ceil(bytes);
    let seconds = time(group, || {
        (0..copies).for_each(|_| black_box(&mut to).copy_from_slice(black_box(&from)));
    });
    (group.size() * copies * bytes) as f64 / seconds
}

/// Median over repeats of the slowest rank's seconds.
fn time(group: &ProcessGroup, mut call: impl FnMut()) -> f64 {
    const REPEATS: usize = 15;
    call();
    let measure = |_| {
        group.barrier().unwrap();
        let started = Instant::now();
        call();
        started.elapsed().as_secs_f64()
    };
    let mut seconds: Vec<f64> = (0..REPEATS).map(measure).collect();
    group.all_reduce(&mut seconds, ReduceOp::Max).unwrap();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}
