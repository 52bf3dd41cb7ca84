//! How much of an asynchronous all_gather hides beside a matrix product. Two rank processes: rank 0 computes on one core,
//! the bytes move on the other. Writes the timeline that its figures come from, and prints the times of rank 0 in one line:
//!
//! ```text
//! seconds of the all_gather alone TAB of a matrix product alone TAB of both at the same time
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

use std::hint::black_box;
use std::process::Command;
use std::time::{Duration, Instant};

use sconce_mesh::{
    FlightRecord, GroupOptions, ProcessGroup, RankEnv, RankOutput, RankProcesses, die_with_parent,
};

/// Bytes that each rank has after an all_gather.
const BYTES: usize = 64 << 20;
/// Rows and columns of the matrices: about four times as long as the all_gather.
const SIDE: usize = 640;
const REPEATS: usize = 15;
const TIMELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/overlap.json");

fn main() {
    die_with_parent().unwrap();
    if RankEnv::from_env().unwrap().world_size > 1 {
        return rank();
    }
    let command = |_: &RankEnv| Command::new(std::env::current_exe().unwrap());
    let mut ranks = RankProcesses::spawn(2, RankOutput::Inherited, command).unwrap();
    ranks.wait(Some(Duration::from_secs(120)), Duration::from_secs(5)).unwrap();
}

fn rank() {
    let group = ProcessGroup::from_env(GroupOptions::default()).unwrap();
    let computes = group.rank().0 == 0;
    let mut buffers = Some((vec![1f32; BYTES / 8], vec![0f32; BYTES / 4]));
    let (a, b) = (vec![1f32; SIDE * SIDE], vec![2f32; SIDE * SIDE]);
    let mut product = vec![0f32; SIDE * SIDE];
    let mut compute = || {
        if computes {
            multiply(&a, &b, black_box(&mut product))
        }
    };

    let gather = median(&group, || buffers = Some(issue(&group, buffers.take().unwrap()).wait().unwrap()));
    let matmul = median(&group, &mut compute);
    let both = median(&group, || {
        let work = issue(&group, buffers.take().unwrap());
        compute();
        buffers = Some(work.wait().unwrap());
    });
    if computes {
        println!("{gather}\t{matmul}\t{both}");
        std::fs::create_dir_all(std::path::Path::new(TIMELINE).parent().unwrap()).unwrap();
        std::fs::write(TIMELINE, FlightRecord::timeline(&[group.flight_record()])).unwrap();
        println!("timeline (chrome://tracing, Perfetto): {TIMELINE}");
    }
}

type Buffers = (Vec<f32>, Vec<f32>);

fn issue(group: &ProcessGroup, (part, mut all): Buffers) -> sconce_mesh::Work<Buffers> {
    group.issue(move |group| group.all_gather_into(&part, &mut all).map(|()| (part, all)))
}

/// Row by row, so that the inner loop runs along rows of both and vectorizes.
fn multiply(a: &[f32], b: &[f32], product: &mut [f32]) {
    product.fill(0.0);
    for (row, out) in a.chunks(SIDE).zip(product.chunks_mut(SIDE)) {
        for (factor, line) in row.iter().zip(b.chunks(SIDE)) {
            out.iter_mut().zip(line).for_each(|(out, value)| *out += factor * value);
        }
    }
}

fn median(group: &ProcessGroup, mut call: impl FnMut()) -> f64 {
    call();
    let measure = |_| {
        group.barrier().unwrap();
        let started = Instant::now();
        call();
        started.elapsed().as_secs_f64()
    };
    let mut seconds: Vec<f64> = (0..REPEATS).map(measure).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}
