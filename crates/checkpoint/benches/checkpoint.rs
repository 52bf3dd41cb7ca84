//! How long saves and loads take on rank processes, beside what the machine can do at all. Prints one line a figure,
//! judges nothing: `cargo xtask bench checkpoint` sets the lines beside torch's.
//!
//! ```text
//! place TAB ranks TAB what TAB bytes of the whole state TAB seconds TAB bytes that all ranks read
//! ```
//!
//! Seconds are the median over repeats of the slowest rank. The state is f32 matrices of 1024 × 1024, as a transformer of
//! that width has. Lines that begin with `limit` are what the machine does for the same bytes on as many processes: plain writes
//! to new files and to the device, plain reads of cached files, memcpy. Replicas are filled with more bytes than the state
//! has: `limit read of replicas` reads what the ranks of HSDP hold, half of the state each.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

#[path = "checkpoint/limits.rs"]
mod limits;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sconce_checkpoint::{LoadOptions, SaveOptions, Verify, load_with, save_with};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, chunk_range, run_boxes};
use sconce_mesh::{
    GroupOptions, ProcessGroup, RankEnv, RankOutput, RankProcesses, ReduceOp, die_with_parent,
};

/// Directories, separated by colons.
const PLACES: &str = "SCONCE_BENCH_PLACES";
/// Size of the whole state.
const MIB: &str = "SCONCE_BENCH_MIB";
/// Every tensor is a square matrix: the projections of a transformer of this width.
const WIDTH: usize = 1024;

fn main() {
    die_with_parent().unwrap();
    if RankEnv::from_env().unwrap().world_size > 1 {
        return rank(Path::new(&std::env::var(PLACES).unwrap()));
    }
    let places =
        std::env::var(PLACES).unwrap_or_else(|_| format!("/dev/shm:{}", env!("CARGO_TARGET_TMPDIR")));
    for place in places.split(':') {
        let dir = tempfile::Builder::new().prefix("sconce-bench-").tempdir_in(place).unwrap();
        // Four ranks first: two load what four have saved.
        for n in [4, 2] {
            let command = |_: &RankEnv| {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.env(PLACES, dir.path());
                command
            };
            let mut ranks = RankProcesses::spawn(n, RankOutput::Inherited, command).unwrap();
            ranks.wait(Some(Duration::from_secs(600)), Duration::from_secs(5)).unwrap();
        }
    }
}

/// One rank's side of every measurement.
struct Bench<'d> {
    group: ProcessGroup,
    dir: &'d Path,
    n_tensors: usize,
    whole_bytes: usize,
}

const SHAPE: [usize; 2] = [WIDTH, WIDTH];
const TENSOR_BYTES: usize = WIDTH * WIDTH * 4;

fn rank(dir: &Path) {
    let group = ProcessGroup::from_env(GroupOptions { timeout: Duration::from_secs(300) }).unwrap();
    let mib: usize = std::env::var(MIB).map_or(1024, |mib| mib.parse().unwrap());
    let n_tensors = (mib << 20) / TENSOR_BYTES;
    let bench = Bench { group, dir, n_tensors, whole_bytes: n_tensors * TENSOR_BYTES };
    bench.limits();
    let fsdp = bench.state(|me, n| bench.flat(me, n));
    bench.save("save fsdp", "fsdp", &fsdp);
    bench.load("load fsdp", "fsdp", fsdp, Verify::AsRead);
    bench.remove(&bench.checkpoint("fsdp"));
    let rows = bench.state(|me, n| vec![bench.chunk(0, me, n)]);
    bench.save("save rows", "rows", &rows);
    drop(rows);
    let columns = bench.state(|me, n| vec![bench.chunk(1, me, n)]);
    let columns = bench.load("load rows as columns", "rows", columns, Verify::AsRead);
    drop(bench.load("load rows as columns unverified", "rows", columns, Verify::Off));
    bench.remove(&bench.checkpoint("rows"));
    if bench.group.size() == 4 {
        let hsdp = bench.state(|me, _| bench.flat(me % 2, 2));
        bench.save("save hsdp", "hsdp", &hsdp);
        bench.load("load hsdp", "hsdp", hsdp, Verify::AsRead);
    } else {
        let fsdp = bench.state(|me, n| bench.flat(me, n));
        bench.load("load hsdp of 4 as fsdp of 2", "hsdp", fsdp, Verify::AsRead);
    }
}

impl Bench<'_> {
    /// The flat shard of rank `me` of `n`.
    fn flat(&self, me: usize, n: usize) -> Vec<TensorBox> {
        let range = chunk_range(WIDTH * WIDTH, n, me);
        run_boxes(&SHAPE, range.start, range.len())
    }

    fn chunk(&self, dim: usize, me: usize, n: usize) -> TensorBox {
        let range = chunk_range(SHAPE[dim], n, me);
        let mut part = TensorBox::whole(&SHAPE);
        (part.offsets[dim], part.sizes[dim]) = (range.start, range.len());
        part
    }

    fn state(&self, boxes: impl Fn(usize, usize) -> Vec<TensorBox>) -> StateDict<'static> {
        let mut state = StateDict::new();
        for nth in 0..self.n_tensors {
            let boxes = boxes(self.group.group_rank().0, self.group.size());
            let len = boxes.iter().map(TensorBox::numel).sum::<usize>() * 4;
            // Every page is touched here, so that no measurement pays for it.
            let tensor = TensorBuf::from_boxes(DType::F32, &SHAPE, boxes, vec![nth as u8 + 1; len]).unwrap();
            state.insert_tensor(format!("layers.{nth}.weight"), tensor);
        }
        state
    }

    fn save(&self, what: &str, name: &str, state: &StateDict<'_>) {
        let path = self.checkpoint(name);
        let seconds = self.timed(
            5,
            || self.remove(&path),
            || {
                save_with(&path, state, SaveOptions { group: Some(&self.group), ..SaveOptions::default() })
                    .unwrap();
            },
        );
        self.report(what, seconds, 0);
    }

    fn load(
        &self,
        what: &str,
        name: &str,
        mut state: StateDict<'static>,
        verify: Verify,
    ) -> StateDict<'static> {
        let path = self.checkpoint(name);
        let options = LoadOptions { group: Some(&self.group), verify, ..LoadOptions::default() };
        load_with(&path, &mut state, options).unwrap();
        let before = bytes_read();
        let seconds = self.timed(
            5,
            || (),
            || {
                load_with(&path, &mut state, options).unwrap();
            },
        );
        let mut read = [((bytes_read() - before) / 5) as i64];
        self.group.all_reduce(&mut read, ReduceOp::Sum).unwrap();
        self.report(what, seconds, read[0]);
        state
    }

    fn limits(&self) {
        let mine = self.whole_bytes / self.group.size();
        let path = self.dir.join(format!("limit-{}", self.group.rank().0));
        let source = limits::Pages::new(mine);
        let remove = || drop(std::fs::remove_file(&path));
        let seconds = self.timed(5, remove, || limits::write(&path, &source));
        self.report("limit write", seconds, 0);
        let mut to = vec![1u8; mine];
        self.report("limit read", self.read_limit(&path, &mut to), 0);
        let seconds = self.timed(5, || (), || to.copy_from_slice(source.bytes()));
        self.report("limit memcpy", seconds, 0);
        remove();
        if self.group.size() == 4 {
            limits::write(&path, &limits::Pages::new(self.whole_bytes / 2));
            let mut to = vec![1u8; self.whole_bytes / 2];
            self.report("limit read of replicas", self.read_limit(&path, &mut to), 0);
            remove();
        }
    }

    fn read_limit(&self, path: &Path, to: &mut [u8]) -> f64 {
        limits::read(path, to);
        self.timed(5, || (), || limits::read(path, to))
    }

    fn checkpoint(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn remove(&self, path: &Path) {
        self.group.barrier().unwrap();
        if self.group.rank().0 == 0 {
            let _ = std::fs::remove_dir_all(path);
        }
    }

    /// The median over repeats of the slowest rank.
    fn timed(&self, repeats: usize, mut prepare: impl FnMut(), mut call: impl FnMut()) -> f64 {
        let mut seconds = Vec::new();
        for _ in 0..repeats {
            prepare();
            self.group.barrier().unwrap();
            let started = Instant::now();
            call();
            seconds.push(started.elapsed().as_secs_f64());
        }
        self.group.all_reduce(&mut seconds, ReduceOp::Max).unwrap();
        seconds.sort_by(f64::total_cmp);
        seconds[repeats / 2]
    }

    fn report(&self, what: &str, seconds: f64, read: i64) {
        if self.group.rank().0 == 0 {
            let place = if self.dir.starts_with("/dev/shm") { "tmpfs" } else { "disk" };
            println!("{place}\t{}\t{what}\t{}\t{seconds}\t{read}", self.group.size(), self.whole_bytes);
        }
    }
}

/// Bytes that this process has read by system calls.
fn bytes_read() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}
