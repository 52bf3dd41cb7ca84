//! Saving: local plan, global plan, write, commit. Each function is a step; the order is in [`save_to`].

use std::path::Path;

use sconce_dtensor::StateDict;
use sconce_mesh::ProcessGroup;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::coordinate::Ranks;
use crate::plan::{Layout, WrittenFile};
use crate::planner::{DefaultSavePlanner, SavePlanner};
use crate::save_cache::{Offer, Reply, SaveCache};
use crate::storage::{FileSystemWriter, StorageWriter};

/// How a checkpoint is saved.
#[derive(Clone, Copy)]
pub struct SaveOptions<'g> {
    /// The ranks that save together; `None` for one process by itself.
    pub group: Option<&'g ProcessGroup>,
    /// Whether a checkpoint at the path is replaced. It stays whole until the new one is.
    pub overwrite: bool,
    /// Whether files and directories are on the device before the save returns. Off, a crash of the machine may lose
    /// the checkpoint; a crash of the program may not.
    pub sync: bool,
    /// An earlier checkpoint on the same file system: files of it that would be written again as they are, are linked
    /// instead, as [`FileSystemWriter::since`] says.
    pub since: Option<&'g Path>,
}

impl Default for SaveOptions<'_> {
    fn default() -> Self {
        Self { group: None, overwrite: false, sync: true, since: None }
    }
}

/// What a save wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Bytes of all data files of all ranks.
    pub data_bytes: u64,
    /// Number of data files of all ranks.
    pub n_files: usize,
    /// Of `data_bytes`, those of files that were linked from an earlier checkpoint and not written.
    pub linked_bytes: u64,
}

/// Saves the state of one process at `path`.
///
/// ```
/// use sconce_checkpoint::{load, save};
/// use sconce_dtensor::{DType, StateDict, TensorView, TensorViewMut};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("step-1");
/// let weights = [1u8, 2, 3, 4];
/// let mut state = StateDict::new();
/// state.insert_tensor("w", TensorView::new(DType::U8, &[2, 2], &weights)?);
/// state.insert("step", 1i64);
/// save(&path, &state)?;
///
/// let mut loaded = [0u8; 4];
/// let mut state = StateDict::new();
/// state.insert_tensor("w", TensorViewMut::new(DType::U8, &[2, 2], &mut loaded)?);
/// state.insert("step", 0i64);
/// load(&path, &mut state)?;
/// assert_eq!(state.get("step").and_then(|v| v.as_int()), Some(1));
/// drop(state);
/// assert_eq!(loaded, weights);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`save_with`].
pub fn save(path: impl AsRef<Path>, state: &StateDict<'_>) -> Result<SaveReport> {
    save_with(path, state, SaveOptions::default())
}

/// Saves the state of all ranks of a group at `path`: all of it, or nothing.
///
/// Every rank passes its own part; boxes that several ranks hold are written once, their bytes spread over the ranks.
/// Names and plain values must agree where ranks have both.
///
/// Ranks: collective over `options.group`; all ranks see the same file system.
///
/// # Errors
/// `AlreadyExists`; `ShapeMismatch`, `DTypeMismatch`, `ValueMismatch`, `Uncovered`, `Overlap` for parts that do not fit
/// together; `Io`. With a group they come as `Ranks`, the same on every rank, or as `Mesh` if the group broke. After any
/// of them what was at `path` before is there still.
///
/// # Source
/// The protocol of `torch.distributed.checkpoint.save`.
pub fn save_with(
    path: impl AsRef<Path>,
    state: &StateDict<'_>,
    options: SaveOptions<'_>,
) -> Result<SaveReport> {
    let mut writer = FileSystemWriter::new(path.as_ref(), options.overwrite, options.sync);
    if let Some(earlier) = options.since {
        writer = writer.since(earlier);
    }
    save_to(&mut writer, &mut DefaultSavePlanner, state, options.group)
}

/// Saves through a storage and a planner of the caller's choice: the protocol itself, for any format.
///
/// Ranks: collective over `group`; every rank passes a planner and a writer of the same kind.
///
/// # Errors
/// Those of planner and storage. With a group they come as `Ranks`, the same on every rank, or as `Mesh` if the group
/// broke.
///
/// # Source
/// `torch.distributed.checkpoint.save` with `storage_writer` and `planner`.
pub fn save_to(
    writer: &mut dyn StorageWriter,
    planner: &mut dyn SavePlanner,
    state: &StateDict<'_>,
    group: Option<&ProcessGroup>,
) -> Result<SaveReport> {
    run(writer, planner, Ok(state), group, &mut SaveCache::default())
}

/// [`save_to`], with what the ranks remember of the save before. A rank that has no state to save says so to the others.
pub(crate) fn run(
    writer: &mut dyn StorageWriter,
    planner: &mut dyn SavePlanner,
    state: Result<&StateDict<'_>>,
    group: Option<&ProcessGroup>,
    cache: &mut SaveCache,
) -> Result<SaveReport> {
    let ranks = Ranks(group);
    let mut layout = None;
    let local = state.and_then(|state| Ok((state, planner.local_plan(state)?)));
    let offer = local.as_ref().map(|(_, plan)| cache.offer(plan)).map_err(Clone::clone);
    let task: Result<Task> =
        ranks.reduce_scatter("plan", offer, |offers| plan(offers, planner, writer, cache, &mut layout));
    let is_prepared = layout.is_some();
    let outcome = task.and_then(|Task { place, plan }| {
        let written = local.and_then(|(state, local)| {
            let write = planner.finish_plan(cache.accept(local, plan)?)?;
            writer.write(&place, &write, state)
        });
        let n_ranks = ranks.size();
        ranks.reduce_scatter("write", written, |files| finish(layout.take(), writer, files, n_ranks))
    });
    if outcome.is_err() {
        cache.clear();
        if is_prepared {
            writer.discard();
        }
    }
    outcome
}

/// What one rank is told to write, and where.
#[derive(Serialize, Deserialize)]
struct Task {
    place: Vec<u8>,
    plan: Reply,
}

/// The coordinator's first step: one task for each rank.
fn plan(
    offers: Vec<Offer>,
    planner: &mut dyn SavePlanner,
    writer: &mut dyn StorageWriter,
    cache: &mut SaveCache,
    layout: &mut Option<Layout>,
) -> Result<Vec<Task>> {
    let (global, is_same) = cache.global(offers, |plans| planner.global_plan(plans))?;
    let place = writer.prepare(layout.insert(global.layout))?;
    let reply = |write| Task { place: place.clone(), plan: (!is_same).then_some(write) };
    Ok(global.writes.into_iter().map(reply).collect())
}

/// The coordinator's second step: the checkpoint is published, and every rank told of it.
fn finish(
    layout: Option<Layout>,
    writer: &mut dyn StorageWriter,
    files: Vec<Vec<WrittenFile>>,
    n_ranks: usize,
) -> Result<Vec<SaveReport>> {
    let Some(layout) = layout else {
        unreachable!("the coordinator planned before it commits");
    };
    Ok(vec![writer.finish(layout, files)?; n_ranks])
}
