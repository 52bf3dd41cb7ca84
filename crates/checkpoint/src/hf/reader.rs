//! The storage reader of safetensors: one file, or a directory with or without an index.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use sconce_dtensor::{DType, TensorBox};
use serde::Deserialize;

use super::{TREE_KEY, header};
use crate::damage::Damage;
use crate::metadata::{ChunkStorageMetadata, FileMetadata, Metadata, TensorStorageMetadata};
use crate::region::Region;
use crate::storage::{Access, DataFile, LocalFile, StorageReader};
use crate::tree::Node;
use crate::{Error, Result};

/// An index longer than this is refused.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// Reads a `.safetensors` file (candle's `VarMap::save`), or a directory of them: single, with an index, or sharded by
/// torch's `HuggingFaceStorageWriter`. With [`load_from`](crate::load_from) every load works on them.
///
/// The directory's links are followed: Hugging Face's cache consists of them.
///
/// ```
/// use sconce_checkpoint::{LoadOptions, hf, load_new_from, save_to, DefaultSavePlanner};
/// use sconce_dtensor::{DType, StateDict, TensorBuf};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("model.safetensors");
/// let mut state = StateDict::new();
/// state.insert_tensor("w", TensorBuf::new(DType::U8, &[2], vec![1, 2])?);
/// save_to(&mut hf::Writer::new(&path), &mut DefaultSavePlanner, &state, None)?;
/// let loaded = load_new_from(&hf::Reader::new(&path), LoadOptions::default())?;
/// assert_eq!(loaded.tensor::<TensorBuf>("w").map(|w| w.bytes()), Some(&[1, 2][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Source
/// `torch.distributed.checkpoint.hf_storage.HuggingFaceStorageReader`; the index of `transformers`.
#[derive(Debug, Clone)]
pub struct Reader {
    path: PathBuf,
}

/// Files, and in which of them an index says each tensor is; `None` if there is no index.
type Files = (Vec<PathBuf>, Option<HashMap<String, PathBuf>>);

impl Reader {
    /// A reader of the file or directory at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The number of files, and the damage of those that are not there or whose headers do not fit them.
    ///
    /// # Errors
    /// `Missing`, `NotACheckpoint`, `Refused`; what keeps the index from being read.
    pub(crate) fn damages(&self) -> Result<(usize, Vec<Damage>)> {
        let (files, by_name) = self.files()?;
        let mut damages = Vec::new();
        for path in &files {
            match Region::open(path, true).and_then(|file| header::read(&file)) {
                Ok(_) => {}
                Err(error @ Error::Refused { .. }) => return Err(error),
                Err(error) => {
                    let within = by_name.iter().flatten().filter(|(_, file)| *file == path);
                    let mut fqns: Vec<String> = within.map(|(fqn, _)| fqn.clone()).collect();
                    fqns.sort();
                    let file = path.strip_prefix(&self.path).ok().filter(|name| !name.as_os_str().is_empty());
                    let file = file.unwrap_or(path).display().to_string();
                    damages.push(Damage { file, offset_bytes: 0, what: error.to_string(), fqns });
                }
            }
        }
        Ok((files.len(), damages))
    }

    /// The files that are to be read.
    fn files(&self) -> Result<Files> {
        let found = std::fs::metadata(&self.path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { path: self.path.clone() },
            _ => Error::io("look at", &self.path, &e),
        })?;
        if found.is_file() {
            return Ok((vec![self.path.clone()], None));
        }
        let (mut files, mut indexes) = (Vec::new(), Vec::new());
        let entries = std::fs::read_dir(&self.path).map_err(|e| Error::io("list", &self.path, &e))?;
        for entry in entries {
            let path = entry.map_err(|e| Error::io("list", &self.path, &e))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name.ends_with(".safetensors") {
                files.push(path);
            } else if name.ends_with(".safetensors.index.json") {
                indexes.push(path);
            }
        }
        files.sort();
        match &indexes[..] {
            [] if files.is_empty() => {
                let reason = "it has no *.safetensors files".to_owned();
                Err(Error::NotACheckpoint { path: self.path.clone(), reason })
            }
            [] => Ok((files, None)),
            [index] => self.indexed(index),
            _ => {
                Err(Error::refused(&self.path, 0, format!("{} indexes of safetensors files", indexes.len())))
            }
        }
    }

    fn indexed(&self, index: &Path) -> Result<Files> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let bytes = Region::open(index, true)?;
        if bytes.len() > MAX_INDEX_BYTES {
            return Err(Error::refused(index, 0, "an index of more than 256 MiB"));
        }
        let parsed: Index = serde_json::from_slice(&bytes.read_all()?).map_err(|e| Error::Corrupt {
            path: index.to_owned(),
            what: "the index".to_owned(),
            offset_bytes: 0,
            fqns: Vec::new(),
            expected: "JSON with a weight_map".to_owned(),
            got: e.to_string(),
        })?;
        let mut files: Vec<PathBuf> = Vec::new();
        let mut by_name = HashMap::with_capacity(parsed.weight_map.len());
        for (fqn, name) in parsed.weight_map {
            if !crate::format::is_confined(&name) {
                return Err(Error::refused(
                    index,
                    0,
                    format!("{fqn}: the file {name:?}, which is not in its directory"),
                ));
            }
            let file = self.path.join(name);
            files.push(file.clone());
            by_name.insert(fqn, file);
        }
        files.sort();
        files.dedup();
        Ok((files, Some(by_name)))
    }
}

/// A tensor being put together from its chunks.
struct Chunks {
    dtype: DType,
    shape: Vec<usize>,
    chunks: Vec<ChunkStorageMetadata>,
}

impl StorageReader for Reader {
    /// # Errors
    /// `Missing`, `NotACheckpoint`, `Refused`, `Corrupt`, `DTypeMismatch`, `Overlap`, `Io`.
    fn read_metadata(&self) -> Result<Metadata> {
        let (paths, index) = self.files()?;
        let (mut files, mut tensors, mut tree) = (Vec::new(), BTreeMap::<String, Chunks>::new(), None);
        for path in &paths {
            let region = Region::open(path, true)?;
            let entries = header::read(&region)?;
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            for entry in entries.tensors {
                let is_indexed = index.as_ref().is_none_or(|index| index.get(&entry.fqn) == Some(path));
                if is_indexed {
                    add(&mut tensors, entry, files.len())?;
                }
            }
            files.push(FileMetadata { name, len_bytes: region.len(), block_crcs: None });
            tree = tree.or_else(|| entries.metadata.get(TREE_KEY).map(|json| (path.clone(), json.clone())));
        }
        if let Some((fqn, file)) = index.iter().flatten().find(|(fqn, _)| !tensors.contains_key(*fqn)) {
            return Err(Error::refused(file, 0, format!("{fqn}, which the index says is here, is not")));
        }
        let tensors =
            tensors.into_iter().map(|(fqn, tensor)| finished(fqn, tensor)).collect::<Result<Vec<_>>>()?;
        let tree = match tree {
            Some((path, json)) => nested(&path, &json, &tensors)?,
            None => Node::Map(tensors.iter().map(|t| (t.fqn.clone(), Node::Tensor)).collect()),
        };
        Ok(Metadata { tensors, files, tree })
    }

    /// # Errors
    /// `Io`, `Length`.
    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        let is_file = self.path.is_file();
        let path = if is_file { self.path.clone() } else { self.path.join(&file.name) };
        Ok(Box::new(LocalFile::open(path, file.len_bytes, Access::positional())?))
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

fn add(tensors: &mut BTreeMap<String, Chunks>, entry: header::Entry, file: usize) -> Result<()> {
    let header::Entry { fqn, dtype, shape, offsets, data } = entry;
    let offsets = offsets.unwrap_or_else(|| vec![0; shape.len()]);
    let end = |(offset, size): (&usize, &usize)| offset.checked_add(*size);
    let ends: Option<Vec<usize>> = offsets.iter().zip(&shape).map(end).collect();
    let ends = ends.ok_or_else(|| {
        Error::refused(data.path(), data.start(), format!("{fqn}: offsets beyond all tensors"))
    })?;
    let tensor = tensors.entry(fqn.clone()).or_insert_with(|| Chunks {
        dtype,
        shape: ends.clone(),
        chunks: Vec::new(),
    });
    if tensor.dtype != dtype {
        return Err(Error::dtypes(&fqn, tensor.dtype, dtype));
    }
    if tensor.shape.len() != ends.len() {
        return Err(Error::ShapeMismatch { fqn, expected: tensor.shape.clone(), got: ends });
    }
    tensor.shape.iter_mut().zip(&ends).for_each(|(size, end)| *size = (*size).max(*end));
    let bounds = TensorBox { offsets, sizes: shape };
    if !bounds.is_empty() {
        tensor.chunks.push(ChunkStorageMetadata { bounds, file, offset_bytes: data.start() });
    }
    Ok(())
}

/// The global shape of a tensor in shards is the largest end seen: no file says it.
fn finished(fqn: String, tensor: Chunks) -> Result<TensorStorageMetadata> {
    let Chunks { dtype, shape, chunks } = tensor;
    let bounds: Vec<&TensorBox> = chunks.iter().map(|chunk| &chunk.bounds).collect();
    crate::planner::check_disjoint(&fqn, &bounds)?;
    let fits = shape.iter().try_fold(dtype.size_bytes(), |n, d| n.checked_mul(*d));
    let held: usize = chunks.iter().map(|chunk| chunk.bounds.numel()).sum();
    // Chunks do not overlap, so fewer elements than the shape has are a hole: a file is missing.
    if fits.is_none_or(|bytes| bytes / dtype.size_bytes() != held) {
        return Err(Error::Uncovered { fqn, shape, missing: format!("all but {held} elements") });
    }
    Ok(TensorStorageMetadata { fqn, dtype, shape, chunks })
}

/// The nesting that our writer left, if it is about these tensors.
fn nested(path: &Path, json: &str, tensors: &[TensorStorageMetadata]) -> Result<Node> {
    let wrong = |got: String| Error::Corrupt {
        path: path.to_owned(),
        what: TREE_KEY.to_owned(),
        offset_bytes: 0,
        fqns: Vec::new(),
        expected: "a tree of the tensors of these files".to_owned(),
        got,
    };
    let tree: Node = serde_json::from_str(json).map_err(|e| wrong(e.to_string()))?;
    let leaves = tree.leaves();
    let named: HashSet<&str> =
        leaves.iter().filter(|(_, node)| **node == Node::Tensor).map(|(name, _)| name.as_str()).collect();
    match tensors.iter().find(|tensor| !named.contains(&*tensor.fqn)) {
        None if named.len() == tensors.len() => {}
        Some(tensor) => return Err(wrong(format!("one without {}", tensor.fqn))),
        None => return Err(wrong("one of other tensors".to_owned())),
    }
    Ok(tree)
}
