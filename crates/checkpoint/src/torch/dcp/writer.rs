//! The storage writer: what `torch.distributed.checkpoint.load` reads.

use std::path::{Path, PathBuf};

use sconce_dtensor::{StateDict, TensorBox};

use super::METADATA_NAME;
use super::metadata::Step;
use crate::coordinate::Message as _;
use crate::metadata::FileMetadata;
use crate::plan::{Layout, TensorLayout, WritePlan, WrittenFile, WrittenItem};
use crate::save::SaveReport;
use crate::storage::commit::{self, Staging};
use crate::storage::place::Place;
use crate::storage::{StorageWriter, shards};
use crate::torch::archive::{ArchiveFile, Part};
use crate::torch::dtypes::TorchDType;
use crate::torch::pickle::Writer as Pickle;
use crate::tree::Node;
use crate::{Error, Result};

const METADATA_MODULE: &str = "torch.distributed.checkpoint.metadata";
const FILESYSTEM_MODULE: &str = "torch.distributed.checkpoint.filesystem";
/// torch's `CURRENT_DCP_VERSION`.
const VERSION: &str = "1.0.0";

/// Writes a directory that `torch.distributed.checkpoint.load` and `dcp_to_torch_save` read: sharded tensors as DTensors
/// leave them, values, and the nesting of dicts and lists.
///
/// As our own checkpoints it is written beside its place and published by one rename; `.metadata` is written last.
///
/// ```
/// use sconce_checkpoint::{DefaultSavePlanner, LoadOptions, load_new_from, save_to, torch};
/// use sconce_dtensor::{DType, StateDict, TensorBuf};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("step-1");
/// let mut state = StateDict::new();
/// state.insert_tensor("w", TensorBuf::new(DType::U8, &[2], vec![1, 2])?);
/// state.insert("step", 1i64);
/// save_to(&mut torch::Writer::new(&path), &mut DefaultSavePlanner, &state, None)?;
/// let loaded = load_new_from(&torch::Reader::new(&path), LoadOptions::default())?;
/// assert_eq!(loaded.get("step").and_then(|step| step.as_int()), Some(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Source
/// `torch.distributed.checkpoint.FileSystemWriter`.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// On the coordinator, while a save runs.
    staging: Option<Staging>,
}

impl Writer {
    /// A writer for `path`, at which nothing may be.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), staging: None }
    }
}

impl StorageWriter for Writer {
    /// # Errors
    /// `AlreadyExists`, `Io`.
    fn prepare(&mut self, layout: &Layout) -> Result<Vec<u8>> {
        let staging = self.staging.insert(commit::prepare(&self.path, false, true)?);
        Place::encoded(staging, layout, None)
    }

    /// # Errors
    /// `Io`, `Tensor`.
    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>> {
        if plan.items.is_empty() {
            return Ok(Vec::new());
        }
        let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let name = format!("__{}_0.distcp", plan.writer);
        let place = Place::decode(place)?;
        let mut file = ArchiveFile::create(&place.dir().join(&name))?;
        let mut parts = Vec::with_capacity(plan.items.len());
        for item in &plan.items {
            let tensor = shards::tensor_of(&tensors, item)?;
            parts.push(Part { fqn: &item.fqn, tensor, index: item.index });
        }
        let starts = file.add_parts(&parts, place.threads())?.into_iter().enumerate();
        let items = starts.map(|(item, offset_bytes)| WrittenItem { item, offset_bytes }).collect();
        let len_bytes = file.finish(true)?;
        Ok(vec![WrittenFile {
            file: FileMetadata { name, len_bytes, block_crcs: None },
            items,
            is_linked: false,
        }])
    }

    /// # Errors
    /// `Uncovered` if a rank did not write what its plan said; `Io`.
    fn finish(&mut self, layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<SaveReport> {
        let Some(staging) = &self.staging else {
            unreachable!("the coordinator prepared the place before it finishes");
        };
        let mut index = Index::default();
        let (mut data_bytes, mut n_files) = (0, 0);
        for file in written.iter().flatten() {
            data_bytes += file.file.len_bytes;
            n_files += 1;
        }
        for tensor in &layout.tensors {
            index.add_tensor(tensor, &written)?;
        }
        let own = write_values(staging.dir(), &layout, &mut index)?;
        write_metadata(&staging.dir().join(METADATA_NAME), &index)?;
        if let Some(staging) = self.staging.take() {
            commit::publish_foreign(staging, &self.path)?;
        }
        Ok(SaveReport {
            data_bytes: data_bytes + own.unwrap_or(0),
            n_files: n_files + usize::from(own.is_some()),
            linked_bytes: 0,
        })
    }

    fn discard(&mut self) {
        if let Some(staging) = self.staging.take() {
            commit::abandon(staging);
        }
    }
}

/// What `.metadata` will say.
#[derive(Default)]
struct Index<'l> {
    tensors: Vec<(&'l TensorLayout, Vec<(TensorBox, ItemPlace)>)>,
    values: Vec<(String, ItemPlace)>,
    paths: Vec<(String, Vec<Step>)>,
}

struct ItemPlace {
    file: String,
    offset_bytes: u64,
    len_bytes: u64,
}

impl<'l> Index<'l> {
    fn add_tensor(&mut self, tensor: &'l TensorLayout, written: &[Vec<WrittenFile>]) -> Result<()> {
        let mut chunks = Vec::with_capacity(tensor.chunks.len());
        for chunk in &tensor.chunks {
            let place = written.get(chunk.writer).and_then(|files| place_of(files, chunk.item));
            let place = place.ok_or_else(|| Error::Uncovered {
                fqn: tensor.fqn.clone(),
                shape: tensor.shape.clone(),
                missing: chunk.bounds.to_string(),
            })?;
            chunks.push((chunk.bounds.clone(), place));
        }
        self.tensors.push((tensor, chunks));
        Ok(())
    }
}

/// Items are written in order, so that each ends where the next begins.
fn place_of(files: &[WrittenFile], item: usize) -> Option<ItemPlace> {
    let file = files.first()?;
    let at = file.items.binary_search_by_key(&item, |written| written.item).ok()?;
    let offset_bytes = file.items[at].offset_bytes;
    let end = file.items.get(at + 1).map_or(file.file.len_bytes, |next| next.offset_bytes);
    Some(ItemPlace { file: file.file.name.clone(), offset_bytes, len_bytes: end - offset_bytes })
}

/// What no rank writes: values, and tensors without elements. The length of the file, if there is anything.
fn write_values<'l>(staging: &Path, layout: &'l Layout, index: &mut Index<'l>) -> Result<Option<u64>> {
    let name = "__0_1.distcp";
    let mut leaves = Vec::new();
    if let Node::Map(entries) = &layout.tree {
        entries.iter().for_each(|(key, node)| flatten(vec![Step::Key(key.clone())], node, &mut leaves));
    }
    let is_empty = |(tensor, _): &(&TensorLayout, _)| tensor.shape.contains(&0);
    let has_values = leaves.iter().any(|(_, node)| **node != Node::Tensor);
    if !has_values && !index.tensors.iter().any(is_empty) {
        index.paths = leaves.into_iter().map(|(path, _)| (fqn_of(&path), path)).collect();
        return Ok(None);
    }
    let mut file = ArchiveFile::create(&staging.join(name))?;
    let place = |(offset_bytes, len_bytes)| ItemPlace { file: name.to_owned(), offset_bytes, len_bytes };
    for (tensor, chunks) in index.tensors.iter_mut().filter(|tensor| tensor.0.shape.contains(&0)) {
        let written = file.add_empty(tensor.dtype, &tensor.shape)?;
        chunks.push((TensorBox::whole(&tensor.shape), place(written)));
    }
    for (path, node) in leaves {
        let fqn = fqn_of(&path);
        if *node != Node::Tensor {
            index.values.push((fqn.clone(), place(file.add_value(node)?)));
        }
        index.paths.push((fqn, path));
    }
    file.finish(true).map(Some)
}

fn fqn_of(path: &[Step]) -> String {
    path.iter().map(Step::to_string).collect::<Vec<_>>().join(".")
}

/// The leaves as torch takes them: dicts are walked, and lists that hold a tensor or a dict. An empty dict has no leaf in
/// torch and would be lost; here it is one.
///
/// # Source
/// `traverse_state_dict` of `torch/distributed/checkpoint/_traverse.py`.
fn flatten<'n>(path: Vec<Step>, node: &'n Node, leaves: &mut Vec<(Vec<Step>, &'n Node)>) {
    let below = |step| path.iter().cloned().chain([step]).collect::<Vec<_>>();
    match node {
        Node::Map(entries) if !entries.is_empty() => {
            entries.iter().for_each(|(key, node)| flatten(below(Step::Key(key.clone())), node, leaves));
        }
        Node::List(items) if is_walked(node) => {
            items.iter().enumerate().for_each(|(nth, node)| flatten(below(Step::Index(nth)), node, leaves));
        }
        leaf => leaves.push((path, leaf)),
    }
}

fn is_walked(node: &Node) -> bool {
    match node {
        Node::Tensor | Node::Map(_) => true,
        Node::List(items) => items.iter().any(is_walked),
        _ => false,
    }
}

fn write_metadata(path: &Path, index: &Index<'_>) -> Result<()> {
    use std::io::Write as _;
    let bytes = metadata_pickle(index);
    let written = std::fs::File::create_new(path).and_then(|mut file| {
        file.write_all(&bytes)?;
        file.sync_all()
    });
    written.map_err(|e| Error::io("write", path, &e))
}

fn metadata_pickle(index: &Index<'_>) -> Vec<u8> {
    let mut pickle = Pickle::new();
    pickle.instance(METADATA_MODULE, "Metadata");
    pickle.begin_dict();
    pickle.str("state_dict_metadata");
    pickle.begin_dict();
    for (tensor, chunks) in &index.tensors {
        pickle.str(&tensor.fqn);
        tensor_entry(&mut pickle, tensor, chunks);
    }
    for (fqn, _) in &index.values {
        pickle.str(fqn);
        pickle.instance(METADATA_MODULE, "BytesStorageMetadata");
    }
    pickle.end_dict();
    pickle.str("planner_data");
    pickle.begin_dict();
    for (fqn, path) in &index.paths {
        pickle.str(fqn);
        path_entry(&mut pickle, path);
    }
    pickle.end_dict();
    pickle.str("storage_data");
    pickle.begin_dict();
    for (tensor, chunks) in &index.tensors {
        for (nth, (bounds, place)) in chunks.iter().enumerate() {
            place_entry(&mut pickle, &tensor.fqn, Some((&bounds.offsets, nth)), place);
        }
    }
    index.values.iter().for_each(|(fqn, place)| place_entry(&mut pickle, fqn, None, place));
    pickle.end_dict();
    pickle.str("storage_meta");
    pickle.none();
    pickle.str("version");
    pickle.str(VERSION);
    pickle.end_dict();
    pickle.build();
    pickle.finish()
}

fn path_entry(pickle: &mut Pickle, path: &[Step]) {
    pickle.mark();
    for step in path {
        match step {
            Step::Key(key) => pickle.str(key),
            Step::Index(nth) => pickle.size(*nth),
        }
    }
    pickle.tuple();
}

fn tensor_entry(pickle: &mut Pickle, tensor: &TensorLayout, chunks: &[(TensorBox, ItemPlace)]) {
    pickle.instance(METADATA_MODULE, "TensorStorageMetadata");
    pickle.begin_dict();
    pickle.str("properties");
    properties(pickle, TorchDType::of(tensor.dtype));
    pickle.str("size");
    pickle.torch_size(&tensor.shape);
    pickle.str("chunks");
    pickle.begin_list();
    for (bounds, _) in chunks {
        pickle.instance(METADATA_MODULE, "ChunkStorageMetadata");
        pickle.begin_dict();
        pickle.str("offsets");
        pickle.torch_size(&bounds.offsets);
        pickle.str("sizes");
        pickle.torch_size(&bounds.sizes);
        pickle.end_dict();
        pickle.build();
    }
    pickle.end_list();
    pickle.end_dict();
    pickle.build();
}

/// Five properties, which every version of torch reads; later ones write the strides as a sixth.
fn properties(pickle: &mut Pickle, dtype: TorchDType) {
    pickle.instance(METADATA_MODULE, "TensorProperties");
    pickle.mark();
    pickle.class("torch", dtype.name());
    pickle.class("torch.serialization", "_get_layout");
    pickle.str("torch.strided");
    pickle.tuple_of(1);
    pickle.call();
    pickle.bool(false);
    pickle.class(METADATA_MODULE, "_MEM_FORMAT_ENCODING");
    pickle.int(0);
    pickle.tuple_of(1);
    pickle.call();
    pickle.bool(false);
    pickle.tuple();
    pickle.build();
}

/// `MetadataIndex` to `_StorageInfo`.
fn place_entry(pickle: &mut Pickle, fqn: &str, chunk: Option<(&[usize], usize)>, place: &ItemPlace) {
    pickle.instance(METADATA_MODULE, "MetadataIndex");
    pickle.begin_dict();
    pickle.str("fqn");
    pickle.str(fqn);
    pickle.str("index");
    match chunk {
        None => pickle.none(),
        Some((offsets, nth)) => {
            pickle.size(nth);
            pickle.str("offset");
            pickle.torch_size(offsets);
        }
    }
    pickle.end_dict();
    pickle.build();
    pickle.instance(FILESYSTEM_MODULE, "_StorageInfo");
    pickle.begin_dict();
    pickle.str("relative_path");
    pickle.str(&place.file);
    pickle.str("offset");
    pickle.int(place.offset_bytes as i64);
    pickle.str("length");
    pickle.int(place.len_bytes as i64);
    pickle.end_dict();
    pickle.build();
}
