//! The pickle `.metadata` as values: what is where, before any file is opened.

use std::collections::{HashMap, HashSet};

use sconce_dtensor::{DType, TensorBox};

use crate::torch::pickle::{Class, Item, Pickle};

/// What `.metadata` says.
#[derive(Debug, Default)]
pub(super) struct DcpMetadata {
    pub(super) tensors: Vec<DcpTensor>,
    /// Values that are no tensors: name and place.
    pub(super) values: Vec<(String, Place)>,
    /// The nesting of each flattened name, in order; empty if the state was saved flat.
    pub(super) paths: Vec<(String, Vec<Step>)>,
}

#[derive(Debug)]
pub(super) struct DcpTensor {
    pub(super) fqn: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    pub(super) chunks: Vec<(TensorBox, Place)>,
}

/// Where an item lies.
#[derive(Debug, Clone)]
pub(in crate::torch) struct Place {
    /// Relative to the directory; one plain component.
    pub(in crate::torch) file: String,
    pub(in crate::torch) offset_bytes: u64,
    pub(super) len_bytes: u64,
    /// What the item's bytes went through, the last first.
    pub(super) transforms: Vec<String>,
}

/// One step from a container to what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// Why a pickle is no metadata.
pub(super) struct Wrong {
    pub(super) what: String,
    /// Well formed, but not to be had here.
    pub(super) refused: bool,
}

type Outcome<T> = Result<T, Wrong>;

/// The fewest bytes of a pickle that a chunk and its place take.
const BYTES_OF_CHUNK: usize = 16;
/// The longest name of a file, and of what an item's bytes went through.
const MAX_NAME: usize = 255;
/// The most steps of a path, and the most transforms of an item.
const MAX_STEPS: usize = 100;

fn damaged<T>(what: impl Into<String>) -> Outcome<T> {
    Err(Wrong { what: what.into(), refused: false })
}

fn refused<T>(what: impl Into<String>) -> Outcome<T> {
    Err(Wrong { what: what.into(), refused: true })
}

impl DcpMetadata {
    /// Adds what another rank said that saved alone. Of boxes and values that both have, the earlier rank's hold.
    pub(super) fn add_rank(&mut self, other: DcpMetadata) -> Outcome<()> {
        let mut known: HashMap<String, usize> =
            self.tensors.iter().enumerate().map(|(nth, tensor)| (tensor.fqn.clone(), nth)).collect();
        for tensor in other.tensors {
            match known.get(&tensor.fqn) {
                Some(nth) => self.tensors[*nth].add_chunks(tensor)?,
                None => {
                    known.insert(tensor.fqn.clone(), self.tensors.len());
                    self.tensors.push(tensor);
                }
            }
        }
        let named: HashSet<String> = self.values.iter().map(|(fqn, _)| fqn.clone()).collect();
        self.values.extend(other.values.into_iter().filter(|(fqn, _)| !named.contains(fqn)));
        let named: HashSet<String> = self.paths.iter().map(|(fqn, _)| fqn.clone()).collect();
        self.paths.extend(other.paths.into_iter().filter(|(fqn, _)| !named.contains(fqn)));
        match self.values.iter().find(|(fqn, _)| known.contains_key(fqn)) {
            None => Ok(()),
            Some((fqn, _)) => refused(format!("{fqn}: a tensor on one rank, and none on another")),
        }
    }
}

impl DcpTensor {
    fn add_chunks(&mut self, other: DcpTensor) -> Outcome<()> {
        if (self.dtype, &self.shape) != (other.dtype, &other.shape) {
            let (fqn, dtype, shape) = (&self.fqn, self.dtype, &self.shape);
            let what =
                format!("{fqn}: {} {:?}, and {dtype} {shape:?} on an earlier rank", other.dtype, other.shape);
            return refused(what);
        }
        let known: HashSet<TensorBox> = self.chunks.iter().map(|(bounds, _)| bounds.clone()).collect();
        self.chunks.extend(other.chunks.into_iter().filter(|(bounds, _)| !known.contains(bounds)));
        Ok(())
    }
}

/// Places by name and offsets, as torch's `MetadataIndex` compares.
type Places<'p> = HashMap<(&'p str, Option<Vec<usize>>), Place>;

/// The metadata that a pickle is.
pub(super) fn decode(pickle: &Pickle<'_>) -> Outcome<DcpMetadata> {
    let root = pickle.root();
    let field = |name| pickle.field(root, Class::Metadata, name);
    let Some(entries) = field("state_dict_metadata").and_then(|item| pickle.dict(item)) else {
        return damaged(format!("{} in the place of Metadata", pickle.describe(root)));
    };
    let Some(storage) = field("storage_data").and_then(|item| pickle.dict(item)) else {
        return damaged("no storage_data: where the items lie");
    };
    let places = places(pickle, storage)?;
    // Many tensors may share one list of chunks: a list of bounded length in all is no bomb.
    let mut left = pickle.len_bytes();
    let mut decoded = DcpMetadata { paths: paths(pickle, field("planner_data"))?, ..DcpMetadata::default() };
    for (fqn, item) in last_of_each(pickle, entries)? {
        if pickle.made(item, Class::BytesStorageMetadata).is_some() {
            match places.get(&(fqn, None)) {
                Some(place) => decoded.values.push((fqn.to_owned(), place.clone())),
                None => return damaged(format!("{fqn}: no place in storage_data")),
            }
        } else {
            decoded.tensors.push(tensor(pickle, fqn, item, &places, &mut left)?);
        }
    }
    Ok(decoded)
}

/// Entries of a dict of names; the last of equal ones holds.
fn last_of_each<'p>(pickle: &Pickle<'p>, entries: &[(Item, Item)]) -> Outcome<Vec<(&'p str, Item)>> {
    let mut at = HashMap::new();
    let mut named: Vec<(&str, Item)> = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let Some(name) = pickle.str(*key) else {
            return damaged(format!("{} in the place of a name", pickle.describe(*key)));
        };
        match at.insert(name, named.len()) {
            None => named.push((name, *value)),
            Some(earlier) => {
                named[earlier].1 = *value;
                at.insert(name, earlier);
            }
        }
    }
    Ok(named)
}

fn places<'p>(pickle: &Pickle<'p>, entries: &[(Item, Item)]) -> Outcome<Places<'p>> {
    let mut places = Places::with_capacity(entries.len());
    for (key, value) in entries {
        let index = |name| pickle.field(*key, Class::MetadataIndex, name);
        let Some(fqn) = index("fqn").and_then(|item| pickle.str(item)) else {
            return damaged(format!("{} in the place of MetadataIndex", pickle.describe(*key)));
        };
        let offset = match index("offset") {
            None | Some(Item::None) => None,
            Some(item) => match pickle.sizes(item) {
                Some(offset) => Some(offset),
                None => {
                    return damaged(format!("{fqn}: {} in the place of an offset", pickle.describe(item)));
                }
            },
        };
        places.insert((fqn, offset), place(pickle, fqn, *value)?);
    }
    Ok(places)
}

fn place(pickle: &Pickle<'_>, fqn: &str, item: Item) -> Outcome<Place> {
    let field = |name| pickle.field(item, Class::StorageInfo, name);
    let number = |name| match field(name) {
        Some(Item::Int(int)) => u64::try_from(int).ok(),
        _ => None,
    };
    let file = field("relative_path").and_then(|item| pickle.str(item));
    let Some(((file, offset_bytes), len_bytes)) = file.zip(number("offset")).zip(number("length")) else {
        return damaged(format!("{fqn}: {} in the place of _StorageInfo", pickle.describe(item)));
    };
    if file.len() > MAX_NAME || !crate::format::is_confined(file) {
        let what = format!("{fqn}: the file {file:.80?}, which is not one of the checkpoint's directory");
        return refused(what);
    }
    let transforms = match field("transform_descriptors") {
        None | Some(Item::None) => Vec::new(),
        Some(item) => {
            let items = pickle.items(item).filter(|items| items.len() <= MAX_STEPS);
            let name =
                |item: &Item| pickle.str(*item).filter(|name| name.len() <= MAX_NAME).map(str::to_owned);
            match items.and_then(|items| items.iter().map(name).collect::<Option<Vec<_>>>()) {
                Some(names) => names,
                None => return damaged(format!("{fqn}: transform_descriptors that are no names")),
            }
        }
    };
    Ok(Place { file: file.to_owned(), offset_bytes, len_bytes, transforms })
}

fn tensor(
    pickle: &Pickle<'_>,
    fqn: &str,
    item: Item,
    places: &Places<'_>,
    left: &mut usize,
) -> Outcome<DcpTensor> {
    let field = |name| pickle.field(item, Class::TensorStorageMetadata, name);
    let wrong = |what: &str| damaged(format!("{fqn}: {what}"));
    let Some(shape) = field("size").and_then(|item| pickle.sizes(item)) else {
        return wrong(&format!("{} in the place of TensorStorageMetadata", pickle.describe(item)));
    };
    let Some(Class::DType(dtype)) = field("properties").and_then(|item| dtype(pickle, item)) else {
        return wrong("properties without a dtype");
    };
    let Some(ours) = dtype.ours() else {
        return refused(format!("{fqn}: dtype {}", dtype.name()));
    };
    let Some(saved) = field("chunks").and_then(|item| pickle.items(item)) else {
        return wrong("chunks that are no list");
    };
    *left = match left.checked_sub(saved.len().saturating_mul(BYTES_OF_CHUNK)) {
        Some(left) => left,
        None => return wrong("more chunks than the metadata has bytes for"),
    };
    let mut chunks = Vec::with_capacity(saved.len());
    for chunk in saved {
        let of_chunk =
            |name| pickle.field(*chunk, Class::ChunkStorageMetadata, name).and_then(|i| pickle.sizes(i));
        let Some((offsets, sizes)) = of_chunk("offsets").zip(of_chunk("sizes")) else {
            return wrong("a chunk without offsets and sizes");
        };
        let bounds = TensorBox { offsets, sizes };
        if bounds.is_empty() && bounds.sizes.len() == shape.len() {
            continue;
        }
        if !bounds.fits(&shape) {
            return wrong(&format!("a chunk {bounds} outside of {shape:?}"));
        }
        match places.get(&(fqn, Some(bounds.offsets.clone()))) {
            Some(place) => chunks.push((bounds, place.clone())),
            None => return wrong(&format!("the chunk at {:?} has no place in storage_data", bounds.offsets)),
        }
    }
    Ok(DcpTensor { fqn: fqn.to_owned(), dtype: ours, shape, chunks })
}

/// `TensorProperties` are pickled as a tuple that begins with the dtype.
fn dtype(pickle: &Pickle<'_>, properties: Item) -> Option<Class> {
    let (_, state) = pickle.made(properties, Class::TensorProperties)?;
    let first = match pickle.items(state) {
        Some(items) => items.first().copied(),
        None => pickle.field(properties, Class::TensorProperties, "dtype"),
    };
    match first {
        Some(Item::Class(class)) => Some(class),
        _ => None,
    }
}

/// The planner's mapping: none if the state was saved flat, or by a planner that is not torch's.
fn paths(pickle: &Pickle<'_>, planner_data: Option<Item>) -> Outcome<Vec<(String, Vec<Step>)>> {
    let Some(entries) = planner_data.and_then(|item| pickle.dict(item)) else { return Ok(Vec::new()) };
    let step = |item: &Item| match *item {
        Item::Int(int) => usize::try_from(int).ok().map(Step::Index),
        item => pickle.str(item).map(|key| Step::Key(key.to_owned())),
    };
    let path = |(name, path): (&str, Item)| {
        // A path is as long as the name that it flattens to; many names may share one that is not.
        let items = pickle.items(path).filter(|steps| steps.len() <= MAX_STEPS);
        let long: usize = items.into_iter().flatten().map(|step| pickle.str(*step).map_or(0, str::len)).sum();
        let items = items.filter(|_| long <= name.len());
        let steps = items.and_then(|steps| steps.iter().map(step).collect::<Option<Vec<_>>>());
        match steps.filter(|steps| matches!(steps.first(), Some(Step::Key(_)))) {
            Some(steps) => Ok((name.to_owned(), steps)),
            None => damaged(format!("{name}: {} in the place of its path", pickle.describe(path))),
        }
    };
    last_of_each(pickle, entries)?.into_iter().map(path).collect()
}
