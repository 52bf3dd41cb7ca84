//! Scenarios of saves over an earlier commit, in front and in the background, of loads, and of a series of checkpoints.

use std::path::{Path, PathBuf};

use sconce_checkpoint::{
    Access, Error, FileSystemReader, FileSystemWriter, LoadOptions, Result, Retention, SaveOptions, Saver,
    Series, SeriesOptions, load_from, load_new, save_to, save_with,
};
use sconce_dtensor::{DType, LocalTensor, StateDict, TensorBox, TensorBuf};
use sconce_mesh::ProcessGroup;
use sconce_testkit::{Faults, FaultyReader, FaultyTensor, FaultyWriter};

pub(crate) const NAMES: [&str; 5] = ["save", "load", "async_save", "resume", "series_save"];

/// Rows of the sharded tensor on each rank, its width, and the length of the replicated one.
const SHAPES: (usize, usize, usize) = (3, 500, 700);

/// The step of the series' only checkpoint before the fault.
const STEP: u64 = 7;

/// What was committed before the fault, and what the faulty save would commit.
pub(crate) const OLD: u8 = 10;
pub(crate) const NEW: u8 = 77;

/// Runs `name` on one rank; `None` if there is no such scenario.
pub(crate) fn run(name: &str, world: &ProcessGroup, path: &Path, faults: &Faults) -> Option<Result<()>> {
    match name {
        "save" => Some(save(world, path, faults)),
        "load" => Some(load(world, path, faults)),
        "async_save" => Some(save_in_background(world, path, faults)),
        "resume" => Some(resume(world, path, faults).map(drop)),
        "series_save" => Some(resume(world, path, faults).and_then(|series| {
            let state =
                state(world.rank().0, world.size(), NEW, |buf| FaultyTensor::new(buf, faults.clone()));
            series.save(STEP + 1, &state).map(drop)
        })),
        _ => None,
    }
}

/// The save, and a collective of training beside it.
fn save_in_background(world: &ProcessGroup, path: &Path, faults: &Faults) -> Result<()> {
    let writer = FaultyWriter::new(FileSystemWriter::new(path, true, true), faults.clone());
    let state = state(world.rank().0, world.size(), NEW, |buf| FaultyTensor::new(buf, faults.clone()));
    let mut saver = Saver::new(Some(world))?;
    saver.save_to(Box::new(writer), path, &state)?;
    let trained = world.barrier();
    saver.wait()?;
    Ok(trained?)
}

/// Opens the series beside `path` and loads its newest checkpoint.
fn resume<'g>(world: &'g ProcessGroup, path: &Path, faults: &Faults) -> Result<Series<'g>> {
    let (rank, n) = (world.rank().0, world.size());
    let keep = Retention { last: Some(1), ..Retention::default() };
    let options = SeriesOptions { group: Some(world), keep, ..SeriesOptions::default() };
    let series = Series::open(series_beside(path), options)?;
    let mut loaded = state(rank, n, 0, |buf| FaultyTensor::new(buf, faults.clone()));
    let resumed = series.resume(&mut loaded)?;
    assert_eq!(resumed.map(|resumed| (resumed.step, resumed.skipped.len())), Some((STEP, 0)));
    assert_eq!(
        bytes(&loaded),
        bytes(&state(rank, n, OLD, |buf| buf)),
        "what was resumed is not what was saved"
    );
    Ok(series)
}

fn series_beside(path: &Path) -> PathBuf {
    path.with_file_name("series")
}

fn save(world: &ProcessGroup, path: &Path, faults: &Faults) -> Result<()> {
    let mut writer = FaultyWriter::new(FileSystemWriter::new(path, true, true), faults.clone());
    let state = state(world.rank().0, world.size(), NEW, |buf| FaultyTensor::new(buf, faults.clone()));
    save_to(&mut writer, &mut sconce_checkpoint::DefaultSavePlanner, &state, Some(world)).map(drop)
}

fn load(world: &ProcessGroup, path: &Path, faults: &Faults) -> Result<()> {
    let (rank, n) = (world.rank().0, world.size());
    let reader = FaultyReader::new(FileSystemReader::new(path, Access::positional()), faults.clone());
    let mut loaded = state(rank, n, 0, |buf| FaultyTensor::new(buf, faults.clone()));
    load_from(&reader, &mut loaded, LoadOptions { group: Some(world), ..LoadOptions::default() })?;
    let expected = state(rank, n, OLD, |buf| buf);
    assert_eq!(bytes(&loaded), bytes(&expected), "what was loaded is not what was saved");
    Ok(())
}

/// One rank's part of a state that `seed` makes: rows of one tensor, a copy of another, a number.
fn state<T: LocalTensor + 'static>(
    rank: usize,
    n: usize,
    seed: u8,
    wrap: impl Fn(TensorBuf) -> T,
) -> StateDict<'static> {
    let (rows, width, len) = SHAPES;
    let own = TensorBox { offsets: vec![rank * rows, 0], sizes: vec![rows, width] };
    let start = rank * rows * width;
    let sharded = (start..start + rows * width).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
    let sharded = TensorBuf::from_boxes(DType::U8, &[n * rows, width], vec![own], sharded);
    let copied = TensorBuf::new(DType::U8, &[len], (0..len).map(|i| i as u8 ^ seed).collect());
    let mut state = StateDict::new();
    state.insert_tensor("sharded", wrap(sharded.unwrap()));
    state.insert_tensor("copied", wrap(copied.unwrap()));
    state.insert("seed", i64::from(seed));
    state
}

fn bytes(state: &StateDict<'_>) -> Vec<u8> {
    let mut all = vec![];
    Faults::looking_on(|| {
        for tensor in state.flat_tensors().unwrap().values() {
            for index in 0..tensor.local_boxes().len() {
                tensor.read_box(index, &mut |bytes| all.extend_from_slice(bytes)).unwrap();
            }
        }
    });
    all
}

/// Commits [`OLD`] at `path` and in the series beside it, by one process for all ranks.
pub(crate) fn commit_old(path: &Path) {
    save_with(path, &whole(OLD), SaveOptions::default()).unwrap();
    series(path).save(STEP, &whole(OLD)).unwrap();
}

fn series(path: &Path) -> Series<'static> {
    Series::open(series_beside(path), SeriesOptions::default()).unwrap()
}

/// What the scenario's last commit holds, whole.
///
/// # Errors
/// What the load said, or that it holds neither state.
pub(crate) fn committed(scenario: &str, path: &Path) -> Result<u8, String> {
    if !matches!(scenario, "resume" | "series_save") {
        return held(path);
    }
    let latest = series(path).latest_valid().map_err(|error| error.to_string())?.ok_or("an empty series")?;
    if latest.skipped.is_empty() { held(&latest.path) } else { Err(format!("{:?}", latest.skipped)) }
}

fn whole(seed: u8) -> StateDict<'static> {
    let (rows, width, len) = SHAPES;
    let rows = rows * crate::RANKS;
    let sharded = (0..rows * width).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
    let copied = (0..len).map(|i| i as u8 ^ seed).collect();
    let mut state = StateDict::new();
    state.insert_tensor("sharded", TensorBuf::new(DType::U8, &[rows, width], sharded).unwrap());
    state.insert_tensor("copied", TensorBuf::new(DType::U8, &[len], copied).unwrap());
    state.insert("seed", i64::from(seed));
    state
}

/// Which of the two states the checkpoint at `path` holds.
fn held(path: &Path) -> Result<u8, String> {
    let state = load_new(path).map_err(|error: Error| error.to_string())?;
    let seed = state.get("seed").and_then(|value| value.as_int()).ok_or("no seed")?;
    let expected = [OLD, NEW].into_iter().find(|known| i64::from(*known) == seed).ok_or("another seed")?;
    if bytes(&state) == bytes(&whole(expected)) {
        Ok(expected)
    } else {
        Err(format!("seed {seed}, other bytes"))
    }
}
