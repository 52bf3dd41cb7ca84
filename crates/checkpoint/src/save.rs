//! Saving: local plan, global plan, write, commit. Each function is a step; the order is in [`save_with`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use sconce_dtensor::{Fqn, LocalTensor, StateDict};
use sconce_mesh::ProcessGroup;
use serde::{Deserialize, Serialize};

use crate::coordinate::Ranks;
use crate::format::{MANIFEST_NAME, manifest, shard};
use crate::metadata::{ChunkStorageMetadata, FileMetadata, Metadata, TensorStorageMetadata};
use crate::plan::{LocalPlan, WriteItem, WritePlan, WrittenChunk, WrittenFile};
use crate::planner::{GlobalLayout, assign_writers, global_layout};
use crate::storage::{BlockWriter, commit};
use crate::{Error, Result};

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
}

impl Default for SaveOptions<'_> {
    fn default() -> Self {
        Self { group: None, overwrite: false, sync: true }
    }
}

/// What a save wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Bytes of all data files of all ranks.
    pub data_bytes: u64,
    /// Number of data files of all ranks.
    pub n_files: usize,
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
    let (path, ranks) = (path.as_ref(), Ranks(options.group));
    let mut save = Coordinated { path, options, layout: None, staging: None };
    let n_ranks = ranks.size();
    let task: Task = ranks.reduce_scatter("plan", LocalPlan::of(state), |plans| save.plan(plans, n_ranks))?;
    let written = write_shards(&task, state, options.sync);
    let outcome = ranks.reduce_scatter("write", written, |files| save.commit(files, n_ranks));
    if let Some(staging) = save.staging.filter(|_| outcome.is_err()) {
        commit::discard(&staging);
    }
    outcome
}

/// What one rank is told to write, and where.
#[derive(Serialize, Deserialize)]
struct Task {
    staging: PathBuf,
    plan: WritePlan,
}

/// The coordinator's side of a save. On other ranks it stays as it was made.
struct Coordinated<'p> {
    path: &'p Path,
    options: SaveOptions<'p>,
    layout: Option<GlobalLayout>,
    staging: Option<PathBuf>,
}

impl Coordinated<'_> {
    fn plan(&mut self, plans: Vec<LocalPlan>, n_ranks: usize) -> Result<Vec<Task>> {
        let layout = self.layout.insert(global_layout(plans)?);
        let staging = commit::prepare(self.path, self.options.overwrite)?;
        let task = |plan| Task { staging: staging.clone(), plan };
        let tasks = assign_writers(layout, n_ranks).into_iter().map(task).collect();
        self.staging = Some(staging);
        Ok(tasks)
    }

    fn commit(&mut self, files: Vec<Vec<WrittenFile>>, n_ranks: usize) -> Result<Vec<SaveReport>> {
        let (Some(layout), Some(staging)) = (self.layout.take(), &self.staging) else {
            unreachable!("the coordinator planned before it commits");
        };
        let metadata = metadata(layout, files)?;
        let mut writer = BlockWriter::create(&staging.join(MANIFEST_NAME))?;
        writer.write(&manifest::encode(&metadata)?)?;
        writer.finish(self.options.sync)?;
        commit::publish(staging, self.path, self.options.sync)?;
        let data_bytes = metadata.files.iter().map(|file| file.len_bytes).sum();
        Ok(vec![SaveReport { data_bytes, n_files: metadata.files.len() }; n_ranks])
    }
}

/// What all ranks wrote, as the manifest says it.
fn metadata(layout: GlobalLayout, files: Vec<Vec<WrittenFile>>) -> Result<Metadata> {
    let mut chunks = HashMap::<(usize, WriteItem), (usize, u64)>::new();
    let mut all = Vec::new();
    for (rank, file) in
        files.into_iter().enumerate().flat_map(|(rank, files)| files.into_iter().map(move |f| (rank, f)))
    {
        for WrittenChunk { item, offset_bytes } in file.chunks {
            chunks.insert((rank, item), (all.len(), offset_bytes));
        }
        all.push(FileMetadata { name: file.name, len_bytes: file.len_bytes, block_crcs: file.block_crcs });
    }
    let mut tensors = Vec::with_capacity(layout.tensors.len());
    for (fqn, tensor) in layout.tensors {
        let mut saved = Vec::with_capacity(tensor.boxes.len());
        for (bounds, holders) in tensor.boxes {
            let place = |rank, index| chunks.get(&(rank, WriteItem { fqn: fqn.clone(), index }));
            let Some((file, offset_bytes)) = holders.iter().find_map(|h| place(h.rank, h.index)) else {
                let (shape, missing) = (tensor.shape, bounds.to_string());
                return Err(Error::Uncovered { fqn, shape, missing });
            };
            saved.push(ChunkStorageMetadata { bounds, file: *file, offset_bytes: *offset_bytes });
        }
        tensors.push(TensorStorageMetadata { fqn, dtype: tensor.dtype, shape: tensor.shape, chunks: saved });
    }
    Ok(Metadata { tensors, files: all, tree: layout.tree })
}

/// Writes this rank's boxes, the k-th of each tensor to the k-th file.
fn write_shards(task: &Task, state: &StateDict<'_>, sync: bool) -> Result<Vec<WrittenFile>> {
    let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
    let files = split_by_file(&task.plan.items);
    let write = |(nth, items): (usize, &Vec<WriteItem>)| {
        let name = shard::file_name(task.plan.writer, nth, files.len());
        write_shard(&task.staging, name, items, &tensors, sync)
    };
    files.iter().enumerate().map(write).collect()
}

fn split_by_file(items: &[WriteItem]) -> Vec<Vec<WriteItem>> {
    let mut files: Vec<Vec<WriteItem>> = Vec::new();
    let mut seen = HashMap::<&str, usize>::new();
    for item in items {
        let nth = seen.entry(&item.fqn).or_default();
        if *nth == files.len() {
            files.push(Vec::new());
        }
        files[*nth].push(item.clone());
        *nth += 1;
    }
    files
}

type Tensors<'s, 'a> = IndexMap<Fqn, &'s (dyn LocalTensor + 'a)>;

fn write_shard(
    staging: &Path,
    name: String,
    items: &[WriteItem],
    tensors: &Tensors<'_, '_>,
    sync: bool,
) -> Result<WrittenFile> {
    let mut items = items
        .iter()
        .map(|item| tensor_of(tensors, item).map(|tensor| (item, tensor)))
        .collect::<Result<Vec<_>>>()?;
    shard::order(&mut items, |(_, tensor)| tensor.dtype());
    let entry = |(item, tensor): &(&WriteItem, &dyn LocalTensor)| shard::Entry {
        fqn: item.fqn.clone(),
        dtype: tensor.dtype(),
        bounds: tensor.local_boxes()[item.index].clone(),
    };
    let (header, starts) = shard::header(&items.iter().map(entry).collect::<Vec<_>>())?;
    let mut writer = BlockWriter::create(&staging.join(&name))?;
    writer.write(&header)?;
    for (item, tensor) in &items {
        let mut outcome = Ok(());
        let lent = tensor.read_box(item.index, &mut |bytes| outcome = writer.write(bytes));
        lent.map_err(|error| Error::tensor(&item.fqn, &error))?;
        outcome?;
    }
    let (len_bytes, block_crcs) = writer.finish(sync)?;
    let chunk = |((item, _), start): (&(&WriteItem, _), u64)| WrittenChunk {
        item: WriteItem::clone(item),
        offset_bytes: start,
    };
    let chunks = items.iter().zip(starts).map(chunk).collect();
    Ok(WrittenFile { name, len_bytes, block_crcs, chunks })
}

fn tensor_of<'t>(tensors: &'t Tensors<'_, '_>, item: &WriteItem) -> Result<&'t dyn LocalTensor> {
    let tensor = tensors.get(&Fqn(item.fqn.clone())).copied();
    tensor.filter(|tensor| item.index < tensor.local_boxes().len()).ok_or_else(|| Error::Tensor {
        fqn: item.fqn.clone(),
        cause: format!("the plan asks for box {}, which this rank does not hold", item.index),
    })
}
