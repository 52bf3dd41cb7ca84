//! How fast `sconce-ckpt` is and how much memory it takes, beside what the machine can do at all. Prints one line a figure,
//! judges nothing: `cargo xtask bench cli` makes the table.
//!
//! ```text
//! place TAB what TAB bytes TAB seconds TAB bytes of peak memory
//! ```
//!
//! Lines that begin with `limit` are plain reads and copies of as many bytes of cached files, by a thread a processor. The
//! least of repeats, since others on the machine only ever add.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sconce_checkpoint::{
    ChunkStorageMetadata, FileMetadata, MANIFEST_NAME, Metadata, Node, SaveOptions, TensorStorageMetadata,
    save_with,
};
use sconce_dtensor::{DType, LocalTensor, Result, StateDict, TensorBox, chunk_range};
use sconce_mesh::{GroupOptions, ProcessGroup};

/// Directories, separated by colons.
const PLACES: &str = "SCONCE_BENCH_PLACES";
/// Size of the checkpoint.
const MIB: &str = "SCONCE_BENCH_MIB";
/// A conversion needs as much room again.
const REPEATS: usize = 3;
const RANKS: usize = 4;
const SHAPE: [usize; 2] = [4096, 1024];
const TENSOR_BYTES: usize = SHAPE[0] * SHAPE[1] * 4;
const PIECE_BYTES: usize = 4 << 20;

fn main() {
    let places =
        std::env::var(PLACES).unwrap_or_else(|_| format!("/dev/shm:{}", env!("CARGO_TARGET_TMPDIR")));
    let mib: usize = std::env::var(MIB).map_or(4096, |mib| mib.parse().unwrap());
    for place in places.split(':') {
        let dir = tempfile::Builder::new().prefix("sconce-bench-").tempdir_in(place).unwrap();
        let bench = Bench { dir: dir.path(), n_tensors: (mib << 20) / TENSOR_BYTES };
        bench.run();
    }
}

struct Bench<'d> {
    dir: &'d Path,
    n_tensors: usize,
}

impl Bench<'_> {
    fn run(&self) {
        self.save();
        let files = files(&self.dir.join("c"));
        self.timed("limit read", || (pass(&files, None), 0));
        self.timed("verify", || self.ckpt(&["verify", "c"]));
        self.timed("limit copy", || {
            std::fs::create_dir(self.dir.join("out")).unwrap();
            (pass(&files, Some(&self.dir.join("out"))), 0)
        });
        for to in ["sconce", "torch", "safetensors"] {
            self.timed(&format!("convert to {to}"), || self.ckpt(&["convert", "c", "out", "--to", to]));
        }
        self.timed("reshard to 3 ranks", || self.ckpt(&["reshard", "c", "out", "-n", "3"]));
        self.ckpt(&["convert", "c", "torch", "--to", "torch"]);
        std::fs::remove_dir_all(self.dir.join("c")).unwrap();
        self.timed("verify of torch's", || self.ckpt(&["verify", "torch"]));
        self.timed("convert from torch's", || self.ckpt(&["convert", "torch", "out", "--to", "sconce"]));
        std::fs::remove_dir_all(self.dir.join("torch")).unwrap();
        self.manifest();
        self.timed("inspect of a million chunks", || self.ckpt(&["inspect", "million"]));
        self.timed("inspect --tree of a million chunks", || self.ckpt(&["inspect", "million", "--tree"]));
    }

    /// What ranks that hold rows have saved, made while it is written.
    fn save(&self) {
        let groups = ProcessGroup::threads(RANKS, GroupOptions::default()).unwrap();
        std::thread::scope(|scope| {
            for group in groups {
                scope.spawn(move || {
                    let mut state = StateDict::new();
                    for nth in 0..self.n_tensors {
                        let rows = Rows::of(group.group_rank().0, nth);
                        state.insert_tensor(format!("layers.{nth}.weight"), rows);
                    }
                    let options = SaveOptions { group: Some(&group), ..SaveOptions::default() };
                    save_with(self.dir.join("c"), &state, options).unwrap();
                });
            }
        });
    }

    /// An index of a thousand tensors in a thousand chunks each, without data.
    fn manifest(&self) {
        let side = 1000;
        let chunk = |row: usize, nth: usize| ChunkStorageMetadata {
            bounds: TensorBox { offsets: vec![row, 0], sizes: vec![1, 64] },
            file: row,
            offset_bytes: 4096 + nth as u64 * 256,
        };
        let tensor = |nth: usize| TensorStorageMetadata {
            fqn: format!("model.layers.{nth:03}.self_attn.q_proj.weight"),
            dtype: DType::F32,
            shape: vec![side, 64],
            chunks: (0..side).map(|row| chunk(row, nth)).collect(),
        };
        let file = |row: usize| FileMetadata {
            name: format!("shard-{:05}-model-00001-of-00001.safetensors", row + 1),
            len_bytes: 4096 + side as u64 * 256,
            block_crcs: Some(vec![0]),
        };
        let tensors: Vec<_> = (0..side).map(tensor).collect();
        let tree = Node::Map(tensors.iter().map(|tensor| (tensor.fqn.clone(), Node::Tensor)).collect());
        let metadata = Metadata { tensors, files: (0..side).map(file).collect(), tree };
        std::fs::create_dir(self.dir.join("million")).unwrap();
        std::fs::write(self.dir.join("million").join(MANIFEST_NAME), metadata.to_manifest().unwrap())
            .unwrap();
    }

    /// Prints the fastest of a few calls, each of which tells its time and its peak memory.
    fn timed(&self, what: &str, mut call: impl FnMut() -> (Duration, u64)) {
        let mut best: Option<(Duration, u64)> = None;
        for _ in 0..REPEATS {
            let (took, peak) = call();
            let _ = std::fs::remove_dir_all(self.dir.join("out"));
            let most = best.map_or(peak, |(_, earlier)| earlier.max(peak));
            best = Some((best.map_or(took, |(earlier, _)| earlier.min(took)), most));
        }
        let (took, peak) = best.unwrap();
        let place = if self.dir.starts_with("/dev/shm") { "tmpfs" } else { "disk" };
        let bytes = if what.starts_with("inspect") { 0 } else { self.n_tensors * TENSOR_BYTES };
        println!("{place}\t{what}\t{bytes}\t{}\t{peak}", took.as_secs_f64());
    }

    /// Runs the program; how long it took and the most memory that it had.
    fn ckpt(&self, arguments: &[&str]) -> (Duration, u64) {
        let started = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_sconce-ckpt"))
            .args(arguments)
            .current_dir(self.dir)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let status = format!("/proc/{}/status", child.id());
        let mut peak = 0;
        loop {
            // The kernel's own high-water mark: only what was added in the last moments is missed.
            peak = high_water(&status).unwrap_or(peak);
            if let Some(ended) = child.try_wait().unwrap() {
                assert!(ended.success(), "{arguments:?}: {ended}");
                return (started.elapsed(), peak);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn high_water(status: &str) -> Option<u64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Reads all files in pieces, by a thread a processor, and writes them to a directory if there is one.
fn pass(files: &[PathBuf], to: Option<&Path>) -> Duration {
    let started = Instant::now();
    let open = |path: &PathBuf| {
        let copy = to.map(|to| File::create(to.join(path.file_name().unwrap())).unwrap());
        (File::open(path).unwrap(), copy)
    };
    let opened: Vec<_> = files.iter().map(open).collect();
    let pieces: Vec<(usize, u64, usize)> =
        opened.iter().enumerate().flat_map(|(nth, (file, _))| pieces(nth, file)).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                let mut buffer = vec![0; PIECE_BYTES];
                while let Some((nth, start, len)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (file, copy) = &opened[*nth];
                    file.read_exact_at(&mut buffer[..*len], *start).unwrap();
                    if let Some(copy) = copy {
                        copy.write_all_at(&buffer[..*len], *start).unwrap();
                    }
                }
            });
        }
    });
    opened.iter().flat_map(|(_, copy)| copy).for_each(|copy| copy.sync_all().unwrap());
    started.elapsed()
}

fn pieces(nth: usize, file: &File) -> Vec<(usize, u64, usize)> {
    let len = file.metadata().unwrap().len();
    (0..len)
        .step_by(PIECE_BYTES)
        .map(|start| (nth, start, (len - start).min(PIECE_BYTES as u64) as usize))
        .collect()
}

/// A rank's rows of a tensor, of which nothing is held.
struct Rows {
    boxes: Vec<TensorBox>,
    seed: u8,
}

impl Rows {
    fn of(rank: usize, nth: usize) -> Self {
        let rows = chunk_range(SHAPE[0], RANKS, rank);
        let bounds = TensorBox { offsets: vec![rows.start, 0], sizes: vec![rows.len(), SHAPE[1]] };
        Self { boxes: vec![bounds], seed: (nth * 7 + rank) as u8 }
    }
}

impl LocalTensor for Rows {
    fn dtype(&self) -> DType {
        DType::F32
    }
    fn global_shape(&self) -> &[usize] {
        &SHAPE
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.boxes
    }
    fn read_box(&self, index: usize, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        let len = self.boxes[index].numel() * 4;
        read(&(0..len).map(|at| (at as u8).wrapping_mul(31) ^ self.seed).collect::<Vec<u8>>());
        Ok(())
    }
    fn write_box(&mut self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        Err(sconce_dtensor::Error::ReadOnly { what: "rows that are made as they are read".to_owned() })
    }
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>> {
        Ok(Box::new(Self { boxes: self.boxes.clone(), seed: self.seed }))
    }
}
