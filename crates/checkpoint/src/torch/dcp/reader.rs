//! The storage reader: a directory of torch's as metadata of ours.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::METADATA_NAME;
use super::item::{Chunk, MAX_VALUE_BYTES, read_value};
use super::metadata::{self, DcpMetadata, DcpTensor, Place, Step};
use crate::metadata::{ChunkStorageMetadata, FileMetadata, Metadata, TensorStorageMetadata};
use crate::region::Region;
use crate::storage::{DataFile, StorageReader};
use crate::torch::pickle;
use crate::torch::saved::{self, StoredTensor};
use crate::torch::tensors::{TensorFile, tensor_metadata};
use crate::tree::Node;
use crate::{Error, Result};

/// `.metadata` files longer than this are refused.
const MAX_METADATA_BYTES: u64 = 2 << 30;

/// Reads checkpoints that `torch.distributed.checkpoint.save` wrote, without Python.
///
/// With [`load_from`](crate::load_from) every load works on them that works on our own: resharding, in place, partial,
/// renamed. Nothing in the directory runs: its pickles may hold plain data of the classes that torch itself writes.
///
/// ```no_run
/// # // Needs a directory that torch wrote.
/// use sconce_checkpoint::{LoadOptions, load_new_from, torch};
///
/// let state = load_new_from(&torch::Reader::new("runs/step-100"), LoadOptions::default())?;
/// # Ok::<(), sconce_checkpoint::Error>(())
/// ```
///
/// # Source
/// `torch.distributed.checkpoint.FileSystemReader`.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    tensors_only: bool,
    known: Mutex<Known>,
}

/// What the metadata said, for `open`.
#[derive(Debug, Default)]
struct Known {
    items: HashMap<String, Item>,
    files: HashMap<String, Region>,
}

#[derive(Debug, Clone)]
enum Item {
    Chunk(Box<Chunk>),
    /// A tensor inside a value, such as a tuple of tensors.
    InValue(Box<StoredTensor>),
}

impl Reader {
    /// A reader of the directory at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), tensors_only: false, known: Mutex::default() }
    }

    /// A reader that leaves out all values but tensors: for checkpoints whose values are of classes that are refused.
    pub fn tensors_only(path: impl Into<PathBuf>) -> Self {
        Self { tensors_only: true, ..Self::new(path) }
    }

    /// Every item: its name, its place, and the most bytes that its archive may have.
    pub(in crate::torch) fn places(&self) -> Result<Vec<(String, Place, u64)>> {
        let decoded = self.decode()?;
        let of_tensor = |DcpTensor { fqn, dtype, chunks, .. }: DcpTensor| {
            chunks.into_iter().map(move |(bounds, place)| {
                let chunk = Chunk { fqn: fqn.clone(), dtype, bounds, place };
                let most = chunk.most_archive_bytes();
                (chunk.fqn, chunk.place, most)
            })
        };
        let of_value = |(fqn, place)| (fqn, place, MAX_VALUE_BYTES);
        let values = decoded.values.into_iter().map(of_value);
        Ok(decoded.tensors.into_iter().flat_map(of_tensor).chain(values).collect())
    }

    /// All that the metadata says: one file's, or that of every rank.
    fn decode(&self) -> Result<DcpMetadata> {
        if !self.path.exists() {
            return Err(Error::Missing { path: self.path.clone() });
        }
        let mut files = metadata_files(&self.path)?.into_iter();
        let Some(first) = files.next() else {
            let reason =
                "it has no .metadata: its save was never finished, or it is something else".to_owned();
            return Err(Error::NotACheckpoint { path: self.path.clone(), reason });
        };
        let mut all = decode_file(&first)?;
        for path in files {
            all.add_rank(decode_file(&path)?).map_err(|wrong| of_wrong(&path, wrong))?;
        }
        Ok(all)
    }

    fn file(&self, known: &mut Known, name: &str) -> Result<Region> {
        if let Some(file) = known.files.get(name) {
            return Ok(file.clone());
        }
        let file = Region::open(&self.path.join(name), false)?;
        known.files.insert(name.to_owned(), file.clone());
        Ok(file)
    }

    /// The values, by name; tensors inside of them are added to `made`.
    fn values(
        &self,
        decoded: &DcpMetadata,
        known: &mut Known,
        made: &mut Described,
    ) -> Result<BTreeMap<String, Node>> {
        let mut values = BTreeMap::new();
        if self.tensors_only {
            return Ok(values);
        }
        for (fqn, place) in &decoded.values {
            let file = self.file(known, &place.file)?;
            let saved = read_value(&file, fqn, place)?;
            for (name, stored) in saved.tensors {
                let file = made.add_file(&place.file, place.offset_bytes, stored.len_bytes());
                known.items.insert(made.files[file].name.clone(), Item::InValue(Box::new(stored.clone())));
                made.tensors.push(tensor_metadata(name, &stored, file, 0));
            }
            values.insert(fqn.clone(), saved.tree);
        }
        Ok(values)
    }
}

/// The files of metadata: `.metadata`, or `__0.metadata` and so on, in the order of their ranks, where each rank saved
/// alone (`use_collectives=False`).
fn metadata_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let path = dir.join(METADATA_NAME);
    if std::fs::symlink_metadata(&path).is_ok() {
        return Ok(vec![path]);
    }
    let mut of_ranks = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, &e))? {
        let path = entry.map_err(|e| Error::io("list", dir, &e))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let rank = name.strip_prefix("__").and_then(|name| name.strip_suffix(METADATA_NAME));
        if let Some(rank) = rank.and_then(|rank| rank.parse::<u32>().ok()) {
            of_ranks.push((rank, path));
        }
    }
    of_ranks.sort();
    Ok(of_ranks.into_iter().map(|(_, path)| path).collect())
}

fn decode_file(path: &Path) -> Result<DcpMetadata> {
    let file = Region::open(path, false)?;
    if file.len() > MAX_METADATA_BYTES {
        return Err(Error::refused(path, 0, "a .metadata file of more than 2 GiB"));
    }
    let bytes = file.read_all()?;
    let (pickle, _) =
        pickle::load(&bytes, pickle::Unlisted::Refused).map_err(|fault| saved::of_fault(&file, fault))?;
    metadata::decode(&pickle).map_err(|wrong| of_wrong(path, wrong))
}

fn of_wrong(path: &Path, wrong: metadata::Wrong) -> Error {
    if wrong.refused {
        return Error::refused(path, 0, wrong.what);
    }
    Error::Corrupt {
        path: path.to_owned(),
        what: "torch's metadata".to_owned(),
        offset_bytes: 0,
        fqns: Vec::new(),
        expected: "Metadata of torch.distributed.checkpoint".to_owned(),
        got: wrong.what,
    }
}

/// Metadata being made.
#[derive(Default)]
struct Described {
    tensors: Vec<TensorStorageMetadata>,
    files: Vec<FileMetadata>,
}

impl Described {
    /// Every item is a file of its own: where its bytes begin is found out when it is opened.
    fn add_file(&mut self, file: &str, offset_bytes: u64, len_bytes: u64) -> usize {
        let nth = self.files.len();
        self.files.push(FileMetadata {
            name: format!("{file}@{offset_bytes}#{nth}"),
            len_bytes,
            block_crcs: None,
        });
        nth
    }

    fn add_tensor(&mut self, tensor: &DcpTensor, known: &mut Known) {
        let mut chunks = Vec::with_capacity(tensor.chunks.len());
        for (bounds, place) in &tensor.chunks {
            let chunk = Chunk {
                fqn: tensor.fqn.clone(),
                dtype: tensor.dtype,
                bounds: bounds.clone(),
                place: place.clone(),
            };
            let file = self.add_file(&place.file, place.offset_bytes, chunk.len_bytes());
            known.items.insert(self.files[file].name.clone(), Item::Chunk(Box::new(chunk)));
            chunks.push(ChunkStorageMetadata { bounds: bounds.clone(), file, offset_bytes: 0 });
        }
        let (fqn, shape) = (tensor.fqn.clone(), tensor.shape.clone());
        self.tensors.push(TensorStorageMetadata { fqn, dtype: tensor.dtype, shape, chunks });
    }
}

impl StorageReader for Reader {
    /// # Errors
    /// `Missing`, `NotACheckpoint`, `Refused`, `Corrupt`, `Overlap`, `Io`.
    fn read_metadata(&self) -> Result<Metadata> {
        let decoded = self.decode()?;
        let mut known = Known::default();
        let mut made = Described::default();
        for tensor in &decoded.tensors {
            check_claims(&self.path, tensor)?;
            made.add_tensor(tensor, &mut known);
        }
        let values = self.values(&decoded, &mut known, &mut made)?;
        let Described { mut tensors, files } = made;
        tensors.sort_by(|a, b| a.fqn.cmp(&b.fqn));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].fqn == pair[1].fqn) {
            let what = format!("two tensors of the name {}", pair[0].fqn);
            return Err(Error::refused(&self.path.join(METADATA_NAME), 0, what));
        }
        let tree =
            tree(&decoded, values).map_err(|what| Error::refused(&self.path.join(METADATA_NAME), 0, what))?;
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = known;
        Ok(Metadata { tensors, files, tree })
    }

    /// # Errors
    /// `Refused`, `Corrupt`, `Length`, `ShapeMismatch`, `DTypeMismatch`, `Io`.
    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let item = known.items.get(&file.name).cloned();
        match item {
            Some(Item::Chunk(chunk)) => {
                let region = self.file(&mut known, &chunk.place.file)?;
                drop(known);
                Ok(Box::new(chunk.open(&region)?))
            }
            Some(Item::InValue(stored)) => Ok(Box::new(TensorFile::new(*stored))),
            None => Err(Error::Missing { path: self.path.join(&file.name) }),
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// Chunks may not overlap, and an item that is not compressed must be at least as long as what it is said to hold.
fn check_claims(path: &Path, tensor: &DcpTensor) -> Result<()> {
    let metadata = path.join(METADATA_NAME);
    let bounds: Vec<_> = tensor.chunks.iter().map(|(bounds, _)| bounds).collect();
    crate::planner::check_disjoint(&tensor.fqn, &bounds)?;
    let claims = tensor.chunks.iter().find(|(bounds, place)| {
        let len = bounds.sizes.iter().try_fold(tensor.dtype.size_bytes(), |n, d| n.checked_mul(*d));
        // zstd makes at most about 1 byte of 100,000.
        let most = if place.transforms.is_empty() {
            place.len_bytes
        } else {
            place.len_bytes.saturating_mul(1 << 17)
        };
        len.is_none_or(|len| len as u64 > most)
    });
    match claims {
        None => Ok(()),
        Some((bounds, place)) => {
            let what = format!("{}: {} bytes that are to hold the box {bounds}", tensor.fqn, place.len_bytes);
            Err(Error::refused(&metadata, 0, what))
        }
    }
}

/// The nesting of all names: the planner's where it has one, else each name as it is.
fn tree(decoded: &DcpMetadata, mut values: BTreeMap<String, Node>) -> std::result::Result<Node, String> {
    let mut tensors: std::collections::HashSet<&str> = decoded.tensors.iter().map(|t| &*t.fqn).collect();
    let mut root = Node::Map(Vec::new());
    let mut index = Index::default();
    for (fqn, path) in &decoded.paths {
        let node = if tensors.remove(&**fqn) { Some(Node::Tensor) } else { values.remove(fqn) };
        if let Some(node) = node {
            let flat: Vec<String> = path.iter().map(Step::to_string).collect();
            if flat.join(".") != *fqn {
                return Err(format!("{fqn}: a path that does not flatten to its name: {}", flat.join(".")));
            }
            index.insert(&mut root, path, node)?;
        }
    }
    let unnamed: Vec<&str> =
        decoded.tensors.iter().map(|t| &*t.fqn).filter(|fqn| tensors.contains(fqn)).collect();
    for fqn in unnamed {
        index.insert(&mut root, &[Step::Key(fqn.to_owned())], Node::Tensor)?;
    }
    for (fqn, node) in values {
        index.insert(&mut root, &[Step::Key(fqn)], node)?;
    }
    Ok(root)
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Step::Key(key) => f.write_str(key),
            Step::Index(nth) => nth.fmt(f),
        }
    }
}

/// Items of lists that nothing is known of, in a whole tree: a few bytes that speak of item 10^12 are not believed.
const MAX_HOLES: usize = 100_000;

/// Where the entries of each map of a tree are: maps have many entries.
#[derive(Default)]
struct Index {
    places: HashMap<Vec<Step>, usize>,
    /// Items of lists that stay `None`, as torch leaves them: its flattening loses items without entries.
    holes: usize,
}

impl Index {
    fn insert(&mut self, root: &mut Node, path: &[Step], leaf: Node) -> std::result::Result<(), String> {
        let mut at = root;
        for depth in 0..path.len() {
            let next = match path.get(depth + 1) {
                None => Node::None,
                Some(Step::Key(_)) => Node::Map(Vec::new()),
                Some(Step::Index(_)) => Node::List(Vec::new()),
            };
            at = match (at, &path[depth]) {
                (Node::Map(entries), Step::Key(key)) => {
                    let place = *self.places.entry(path[..=depth].to_vec()).or_insert_with(|| {
                        entries.push((key.clone(), next));
                        entries.len() - 1
                    });
                    &mut entries[place].1
                }
                (Node::List(items), Step::Index(nth)) => {
                    let holes = nth.saturating_sub(items.len());
                    if holes > MAX_HOLES - self.holes {
                        return Err(format!("item {nth} of a list of which {} are known", items.len()));
                    }
                    self.holes += holes;
                    items.resize(items.len().max(*nth), Node::None);
                    if *nth == items.len() {
                        items.push(next);
                    } else if items[*nth] == Node::None {
                        items[*nth] = next;
                    }
                    &mut items[*nth]
                }
                _ => return Err(format!("{:?} is a map and a list, or a value", &path[..depth])),
            };
        }
        *at = leaf;
        Ok(())
    }
}

/// The nesting that metadata asks for: for fuzzing.
#[cfg(any(fuzzing, test))]
pub(super) fn fuzz_tree(decoded: &DcpMetadata) -> std::result::Result<(), metadata::Wrong> {
    let value = |(fqn, _): &(String, Place)| (fqn.clone(), Node::None);
    let built = tree(decoded, decoded.values.iter().map(value).collect());
    built.map(drop).map_err(|what| metadata::Wrong { what, refused: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_that_torch_lost_are_none_and_a_list_of_holes_is_refused() {
        let path = |nth| [Step::Key("l".to_owned()), Step::Index(nth)];
        let (mut root, mut index) = (Node::Map(Vec::new()), Index::default());
        index.insert(&mut root, &path(2), Node::Int(7)).unwrap();
        index.insert(&mut root, &path(1), Node::Tensor).unwrap();
        let list = Node::List(vec![Node::None, Node::Tensor, Node::Int(7)]);
        assert_eq!(root, Node::Map(vec![("l".to_owned(), list)]));
        let refused = index.insert(&mut root, &path(1 << 40), Node::Int(1));
        assert_eq!(refused, Err("item 1099511627776 of a list of which 3 are known".to_owned()));
    }
}
