//! The storage writer of safetensors: whole tensors in files of bounded size, written by all ranks together.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sconce_dtensor::{CopyRuns, DType, LocalTensor, StateDict, TensorBox};

use super::{INDEX_NAME, TREE_KEY, header};
use crate::coordinate::Message as _;
use crate::format::shard;
use crate::plan::{Layout, TensorLayout, WriteItem, WritePlan, WrittenFile};
use crate::region::Region;
use crate::save::SaveReport;
use crate::storage::commit::{self, Staging};
use crate::storage::place::Place;
use crate::storage::{StorageWriter, shards};
use crate::threads::deal;
use crate::tree::Node;
use crate::{Error, Result};

/// The size after which Hugging Face's writers begin another file.
const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// What a thread takes of a box at a time.
const PART_BYTES: usize = 64 << 20;

/// Writes whole tensors as safetensors, whatever ranks hold which parts of them.
///
/// A path that ends in `.safetensors` becomes one file, which candle's `VarMap::load` reads; any other a directory as
/// Hugging Face's libraries have it: `model.safetensors`, or several files and `model.safetensors.index.json`.
/// Tensors are named by their flattened names. Safetensors hold nothing but tensors: other values and the nesting are
/// kept as JSON text in the first file's metadata, where [`Reader`](super::Reader) finds them.
///
/// # Source
/// `consolidate_safetensors_files` of torch, without the second pass over the bytes.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    max_shard_bytes: u64,
    /// On the coordinator, while a save runs.
    staging: Option<Staging>,
    files: Vec<PlannedFile>,
}

/// A file whose header is known before its data.
#[derive(Debug, Clone)]
struct PlannedFile {
    name: String,
    len_bytes: u64,
    tensors: Vec<String>,
}

impl Writer {
    /// A writer for `path`, at which nothing may be.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), max_shard_bytes: DEFAULT_SHARD_BYTES, staging: None, files: Vec::new() }
    }

    /// A writer of files with at most that many bytes of tensors, unless one tensor alone has more.
    pub fn with_max_shard_bytes(path: impl Into<PathBuf>, max_shard_bytes: u64) -> Self {
        Self { max_shard_bytes, ..Self::new(path) }
    }

    fn is_one_file(&self) -> bool {
        self.path.extension().is_some_and(|extension| extension == "safetensors")
    }

    /// Which tensors go to which file: in the order of their names, as long as there is room.
    fn split<'l>(&self, layout: &'l Layout) -> Vec<Vec<&'l TensorLayout>> {
        let (mut files, mut bytes): (Vec<Vec<&TensorLayout>>, u64) = (vec![Vec::new()], 0);
        for tensor in &layout.tensors {
            let len = (tensor.shape.iter().product::<usize>() * tensor.dtype.size_bytes()) as u64;
            let is_full = bytes > 0 && bytes + len > self.max_shard_bytes && !self.is_one_file();
            if is_full {
                files.push(Vec::new());
                bytes = 0;
            }
            bytes += len;
            if let Some(file) = files.last_mut() {
                file.push(tensor);
            }
        }
        files
    }
}

impl StorageWriter for Writer {
    /// # Errors
    /// `AlreadyExists`, `Io`.
    fn prepare(&mut self, layout: &Layout) -> Result<Vec<u8>> {
        let staging = self.staging.insert(commit::prepare(&self.path, false, true)?);
        let (dir, place) = (staging.dir().to_owned(), Place::encoded(staging, layout, None)?);
        let split = self.split(layout);
        self.files.clear();
        for (nth, mut tensors) in split.iter().cloned().enumerate() {
            let name = match split.len() {
                1 => "model.safetensors".to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", nth + 1),
            };
            shard::order(&mut tensors, |tensor| tensor.dtype);
            let entry = |tensor: &&TensorLayout| shard::Entry {
                fqn: tensor.fqn.clone(),
                dtype: tensor.dtype,
                bounds: TensorBox::whole(&tensor.shape),
            };
            let entries: Vec<_> = tensors.iter().map(entry).collect();
            let tree = if nth == 0 && !is_flat(&layout.tree) { Some(&layout.tree) } else { None };
            let (header, len_bytes) = shard::whole_header(&entries, TREE_KEY, tree)?;
            create(&dir.join(&name), &header, len_bytes)?;
            self.files.push(PlannedFile {
                name,
                len_bytes,
                tensors: tensors.iter().map(|t| t.fqn.clone()).collect(),
            });
        }
        Ok(place)
    }

    /// # Errors
    /// `Io`, `Tensor`.
    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>> {
        let place = Place::decode(place)?;
        let targets = Targets::find(&place.dir())?;
        let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let mut parts = Vec::new();
        for item in &plan.items {
            let tensor = shards::tensor_of(&tensors, item)?;
            let len = sconce_dtensor::box_len_bytes(tensor, item.index);
            parts.extend((0..len).step_by(PART_BYTES).map(|at| (item, tensor, at..len.min(at + PART_BYTES))));
        }
        deal(parts.len(), place.threads(), |nth| {
            let (item, tensor, range) = parts[nth].clone();
            targets.write(item, tensor, range)
        })?;
        targets.sync()?;
        Ok(Vec::new())
    }

    /// # Errors
    /// `Io`.
    fn finish(&mut self, layout: Layout, _: Vec<Vec<WrittenFile>>) -> Result<SaveReport> {
        let Some(staging) = self.staging.take() else {
            unreachable!("the coordinator prepared the place before it finishes");
        };
        if self.is_one_file() {
            let Some(only) = self.files.first() else { unreachable!("there is always a first file") };
            commit::publish_file(staging, &only.name, &self.path)?;
        } else {
            let indexed = match self.files.len() {
                1 => Ok(()),
                _ => write_index(&staging.dir().join(INDEX_NAME), &self.files, &layout),
            };
            if let Err(error) = indexed {
                commit::abandon(staging);
                return Err(error);
            }
            commit::publish_foreign(staging, &self.path)?;
        }
        Ok(SaveReport {
            data_bytes: self.files.iter().map(|file| file.len_bytes).sum(),
            n_files: self.files.len(),
            linked_bytes: 0,
        })
    }

    fn discard(&mut self) {
        if let Some(staging) = self.staging.take() {
            commit::abandon(staging);
        }
    }
}

/// Whether the names of the tensors say all that the tree does.
fn is_flat(tree: &Node) -> bool {
    matches!(tree, Node::Map(entries) if entries.iter().all(|(_, node)| *node == Node::Tensor))
}

fn create(path: &Path, header: &[u8], len_bytes: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    let file = file.map_err(|e| Error::io("create", path, &e))?;
    file.write_all_at(header, 0).map_err(|e| Error::io("write", path, &e))?;
    file.set_len(len_bytes).map_err(|e| Error::io("lengthen", path, &e))?;
    file.sync_all().map_err(|e| Error::io("sync", path, &e))
}

/// The files of the place, open for the ranks to write their parts.
struct Targets {
    files: Vec<(PathBuf, File)>,
    by_name: HashMap<String, Target>,
}

struct Target {
    file: usize,
    start: u64,
    dtype: DType,
    whole: TensorBox,
}

impl Targets {
    fn find(staging: &Path) -> Result<Self> {
        let (mut files, mut by_name) = (Vec::new(), HashMap::new());
        for entry in std::fs::read_dir(staging).map_err(|e| Error::io("list", staging, &e))? {
            let path = entry.map_err(|e| Error::io("list", staging, &e))?.path();
            if path.extension().is_none_or(|extension| extension != "safetensors") {
                continue;
            }
            for entry in header::read(&Region::open(&path, false)?)?.tensors {
                let target = Target {
                    file: files.len(),
                    start: entry.data.start(),
                    dtype: entry.dtype,
                    whole: TensorBox::whole(&entry.shape),
                };
                by_name.insert(entry.fqn, target);
            }
            let file =
                OpenOptions::new().write(true).open(&path).map_err(|e| Error::io("open", &path, &e))?;
            files.push((path, file));
        }
        Ok(Self { files, by_name })
    }

    /// Writes a range of the bytes of an item.
    fn write(&self, item: &WriteItem, tensor: &dyn LocalTensor, range: Range<usize>) -> Result<()> {
        let Some(target) = self.by_name.get(&item.fqn) else {
            let cause = "the plan asks for a tensor that no file has room for".to_owned();
            return Err(Error::Tensor { fqn: item.fqn.clone(), cause });
        };
        let runs = CopyRuns::new(
            &tensor.local_boxes()[item.index],
            &tensor.local_boxes()[item.index],
            &target.whole,
        );
        let mut part = Part { runs, at: range.start, start: target.start, size: target.dtype.size_bytes() };
        let mut outcome = Ok(());
        let lent = tensor.read_box_range(item.index, range, &mut |bytes| {
            if outcome.is_ok() {
                outcome = part.write(&self.files[target.file], bytes);
            }
        });
        lent.map_err(|error| Error::tensor(&item.fqn, &error))?;
        outcome
    }

    fn sync(&self) -> Result<()> {
        self.files
            .iter()
            .try_for_each(|(path, file)| file.sync_data().map_err(|e| Error::io("sync", path, &e)))
    }
}

/// A part of a box on its way into its tensor's file.
struct Part {
    /// Where each run of the box goes.
    runs: CopyRuns,
    /// What of the box's bytes comes next.
    at: usize,
    /// Where the tensor begins in its file.
    start: u64,
    /// Bytes of an element.
    size: usize,
}

impl Part {
    /// Writes the next bytes of the box.
    fn write(&mut self, (path, file): &(PathBuf, File), mut bytes: &[u8]) -> Result<()> {
        let run_bytes = self.runs.run_len() * self.size;
        while !bytes.is_empty() {
            let (nth, into) = (self.at / run_bytes, self.at % run_bytes);
            let (now, later) = bytes.split_at(bytes.len().min(run_bytes - into));
            let to = self.start + (self.runs.run(nth).dst * self.size + into) as u64;
            file.write_all_at(now, to).map_err(|e| Error::io("write", path, &e))?;
            self.at += now.len();
            bytes = later;
        }
        Ok(())
    }
}

fn write_index(path: &Path, files: &[PlannedFile], layout: &Layout) -> Result<()> {
    let weight_map: BTreeMap<&str, &str> =
        files.iter().flat_map(|file| file.tensors.iter().map(|fqn| (&**fqn, &*file.name))).collect();
    let bytes = |tensor: &TensorLayout| tensor.shape.iter().product::<usize>() * tensor.dtype.size_bytes();
    let total_size: usize = layout.tensors.iter().map(bytes).sum();
    let index = serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    let text = format!("{index:#}\n");
    std::fs::write(path, text)
        .and_then(|()| File::open(path)?.sync_all())
        .map_err(|e| Error::io("write", path, &e))
}
