//! The figures of crates/mesh/benches/collectives.rs, for ferrotorch-distributed over TCP: same sizes and lines.
//!
//! A collective that it does not offer over TCP prints no line.

use std::process::Command;
use std::time::{Duration, Instant};

use ferrotorch_core::{Tensor, creation::ones};
use ferrotorch_distributed::backend::TcpBackend;
use ferrotorch_distributed::collective::{
    ReduceOp, all_gather, all_to_all, allreduce, barrier, broadcast, reduce_scatter,
};

const BYTES: [usize; 4] = [1 << 20, 4 << 20, 16 << 20, 64 << 20];
const BURST: usize = 20;

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().unwrap()).collect();
    if let [rank, n, port] = arguments[..] {
        return run(rank, n, port);
    }
    for n in [2, 4] {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = |rank: usize| {
            let arguments = [rank, n, usize::from(port)].map(|a| a.to_string());
            Command::new(std::env::current_exe().unwrap()).args(arguments).spawn().unwrap()
        };
        let ranks: Vec<_> = (0..n).map(start).collect();
        ranks.into_iter().for_each(|mut rank| assert!(rank.wait().unwrap().success()));
    }
}

fn run(rank: usize, n: usize, port: usize) {
    // Ranks that come before rank 0 listens are refused.
    let joined = (0..100).find_map(|_| {
        let joined = TcpBackend::new(rank, n, &format!("127.0.0.1:{port}"));
        joined.inspect_err(|_| std::thread::sleep(Duration::from_millis(50))).ok()
    });
    let backend = joined.unwrap();
    let report = |op: &str, bytes: usize, seconds: Option<f64>| {
        if let (0, Some(seconds)) = (rank, seconds) {
            println!("{n}\t{op}\t{bytes}\t{seconds}");
        }
    };
    for bytes in BYTES {
        let whole: Tensor<f32> = ones(&[bytes / 4]).unwrap();
        let part: Tensor<f32> = ones(&[bytes / 4 / n]).unwrap();
        let repeats = if bytes < (16 << 20) { 9 } else { 3 };
        let time = |call: &dyn Fn() -> bool| median(&backend, repeats, call);
        report("all_reduce", bytes, time(&|| allreduce(&whole, &backend, ReduceOp::Sum).is_ok()));
        report("all_gather", bytes, time(&|| all_gather(&part, &backend).is_ok()));
        report("reduce_scatter", bytes, time(&|| reduce_scatter(&whole, &backend, ReduceOp::Sum).is_ok()));
        report("broadcast", bytes, time(&|| broadcast(&whole, &backend, 0).is_ok()));
        if n == 2 {
            // Over TCP it knows the way to rank 0 only.
            report("all_to_all", bytes, time(&|| all_to_all(&whole, &backend).is_ok()));
        }
    }
    let small: Tensor<f32> = ones(&[1024]).unwrap();
    let burst = || (0..BURST).all(|_| allreduce(&small, &backend, ReduceOp::Sum).is_ok());
    report("all_reduce", 4096, median(&backend, 9, &burst).map(|seconds| seconds / BURST as f64));
}

/// Seconds of rank 0; `None` if the call fails.
fn median(backend: &TcpBackend, repeats: usize, call: &dyn Fn() -> bool) -> Option<f64> {
    call().then_some(())?;
    let mut seconds: Vec<f64> = (0..repeats)
        .map(|_| {
            barrier(backend).unwrap();
            let started = Instant::now();
            assert!(call());
            started.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    Some(seconds[repeats / 2])
}
