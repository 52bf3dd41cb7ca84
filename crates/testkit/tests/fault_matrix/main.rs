//! The fault matrix: every scenario × every rank × every point that the rank comes to × {error, delay, kill, stop}, and
//! flipped bits where bytes are read. One cell is a world of three processes in which one is struck.
//!
//! In every cell the last commit loads, no rank goes on past its deadline, and the survivors return one typed error that
//! names the rank. By default a sample of each scenario and fault runs; `cargo xtask faults` runs all.
//!
//! - `SCONCE_FAULT_CELLS`: cells of each scenario and fault, or `all`;
//! - `SCONCE_FAULT_SEED`: which ones;
//! - `SCONCE_FAULT_CELL`: one cell by its text, as a failure prints it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod checkpoints;
mod collectives;
mod judge;
mod rank;
mod table;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use judge::{Cell, Judged};
use sconce_testkit::{Fault, FaultPlan, Point};

/// Ranks of each world.
const RANKS: usize = 3;
/// Cells at a time. Most of the time of most of them is waiting.
const LANES: usize = 6;
/// The test that rank processes run; they find by their environment what to do.
const TEST: &str = "no_fault_hangs_a_rank_loses_a_commit_or_is_told_differently";

#[test]
fn no_fault_hangs_a_rank_loses_a_commit_or_is_told_differently() {
    if rank::is_rank() {
        return rank::run();
    }
    let seed: u64 = std::env::var("SCONCE_FAULT_SEED").ok().map_or(1, |text| text.parse().unwrap());
    let chosen = std::env::var("SCONCE_FAULT_CELL").ok();
    let all: Vec<Cell> = match &chosen {
        Some(text) => vec![text.parse().unwrap()],
        None => scenarios().into_iter().flat_map(cells_of).collect(),
    };
    let n_all = all.len();
    let cells = if chosen.is_some() { all } else { sample(all, seed) };
    println!("{} of {n_all} cells, seed {seed}", cells.len());
    let judged = run(&cells);
    println!("{}", table::render(&judged));
    let wrong: Vec<String> = judged.iter().filter_map(Judged::complaint).collect();
    assert!(wrong.is_empty(), "seed {seed}: {} of {} cells\n{}", wrong.len(), cells.len(), wrong.join("\n"));
}

fn scenarios() -> Vec<String> {
    let collectives = collectives::NAMES.iter().copied();
    collectives.chain(checkpoints::NAMES.iter().copied()).map(str::to_owned).collect()
}

/// A run without faults tells where each rank comes by.
fn cells_of(scenario: String) -> Vec<Cell> {
    let points = judge::points(&scenario);
    let mut cells = Vec::new();
    for (rank, points) in points.into_iter().enumerate() {
        for point in points {
            for fault in faults_at(rank, &point) {
                let plan = FaultPlan { rank, point: point.clone(), fault };
                cells.push(Cell { scenario: scenario.clone(), plan });
            }
        }
    }
    cells
}

fn faults_at(rank: usize, point: &Point) -> Vec<Fault> {
    // Every block of this small checkpoint is needed by all ranks, and the first reads and verifies it for all (ADR 10).
    let is_verified = point.operation == "read_at" && rank == 0 && point.nth == 0;
    Fault::ALL.into_iter().filter(|fault| *fault != Fault::Corrupt || is_verified).collect()
}

/// So many cells of each scenario and fault, drawn by the seed.
fn sample(cells: Vec<Cell>, seed: u64) -> Vec<Cell> {
    let per_group = match std::env::var("SCONCE_FAULT_CELLS").as_deref() {
        Ok("all") => return cells,
        Ok(text) => text.parse().unwrap(),
        Err(_) => 1,
    };
    let mut order: Vec<(u64, Cell)> = cells.into_iter().map(|cell| (scrambled(&cell, seed), cell)).collect();
    order.sort_by_key(|(draw, _)| *draw);
    let mut taken = std::collections::BTreeMap::<(String, Fault), usize>::new();
    order.retain(|(_, cell)| {
        let n = taken.entry((cell.scenario.clone(), cell.plan.fault)).or_default();
        *n += 1;
        *n <= per_group
    });
    order.into_iter().map(|(_, cell)| cell).collect()
}

/// FNV-1a over the cell's text, from the seed.
fn scrambled(cell: &Cell, seed: u64) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let hash =
        cell.to_string().bytes().fold(start, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    hash ^ (hash >> 29)
}

fn run(cells: &[Cell]) -> Vec<Judged> {
    let (next, judged) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..LANES {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let verdict = judge::run(cell);
                    judged.lock().unwrap().push(verdict);
                }
            });
        }
    });
    judged.into_inner().unwrap()
}
