//! How long a redistribute of 256 MiB takes on 4 rank processes. Prints one line a transition, judges nothing: `cargo
//! xtask bench redistribute` sets the lines beside torch's.
//!
//! ```text
//! ranks TAB transition TAB bytes of the global tensor TAB seconds TAB bytes copied TAB bytes a second that all copy
//! ```
//!
//! Seconds are the median over repeats of the slowest rank. Bytes are copied twice where they cross from rank to rank.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

use std::hint::black_box;
use std::process::Command;
use std::time::{Duration, Instant};

use sconce_dtensor::Placement::{self, Replicate, Shard};
use sconce_dtensor::{DTensor, DType};
use sconce_mesh::{
    DeviceMesh, DeviceType, GroupOptions, ProcessGroup, RankEnv, RankOutput, RankProcesses, ReduceOp,
    die_with_parent,
};

const RANKS: usize = 4;
const SIDE: usize = 8192;
const BYTES: usize = SIDE * SIDE * 4;
const REPEATS: usize = 7;

fn main() {
    die_with_parent().unwrap();
    if RankEnv::from_env().unwrap().world_size > 1 {
        return rank();
    }
    let command = |_: &RankEnv| Command::new(std::env::current_exe().unwrap());
    let mut ranks = RankProcesses::spawn(RANKS, RankOutput::Inherited, command).unwrap();
    ranks.wait(Some(Duration::from_secs(300)), Duration::from_secs(5)).unwrap();
}

fn rank() {
    let world = ProcessGroup::from_env(GroupOptions::default()).unwrap();
    let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &[RANKS], &[]).unwrap();
    let bandwidth = copy_bandwidth(&world);
    for (from, to) in
        [(Shard(0), Shard(1)), (Shard(0), Replicate), (Shard(1), Replicate), (Shard(1), Shard(0))]
    {
        let tensor = DTensor::ones(&[SIDE, SIDE], DType::F32, &mesh, &[from]).unwrap();
        let seconds = time(&world, || black_box(tensor.redistribute(&[to]).unwrap()));
        if world.rank().0 == 0 {
            let copied = copied(&tensor, to);
            println!("{RANKS}\t{from} -> {to}\t{BYTES}\t{seconds}\t{copied}\t{bandwidth}");
        }
    }
}

/// What all ranks receive is copied in and out; what each keeps, once. A gather passes each byte in only once.
fn copied(tensor: &DTensor, to: Placement) -> usize {
    let received = tensor.plan(&[to]).unwrap().received_numel() * 4;
    let wanted = if to == Replicate { RANKS * BYTES } else { BYTES };
    if to == Replicate { BYTES + wanted } else { 2 * received + (wanted - received) }
}

/// Bytes a second that all ranks copy together, each between buffers of its own.
fn copy_bandwidth(world: &ProcessGroup) -> f64 {
    let (from, mut to) = (vec![1u8; BYTES / RANKS], vec![2u8; BYTES / RANKS]);
    let seconds = time(world, || black_box(&mut to).copy_from_slice(black_box(&from)));
    BYTES as f64 / seconds
}

/// Median over repeats of the slowest rank's seconds.
fn time<R>(world: &ProcessGroup, mut call: impl FnMut() -> R) -> f64 {
    call();
    let measure = |_| {
        world.barrier().unwrap();
        let started = Instant::now();
        let result = call();
        let seconds = started.elapsed().as_secs_f64();
        drop(result);
        seconds
    };
    let mut seconds: Vec<f64> = (0..REPEATS).map(measure).collect();
    world.all_reduce(&mut seconds, ReduceOp::Max).unwrap();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}
