//! What one `torch.save` archive holds: tensors where their storages lie, and plain values.

use sconce_dtensor::{DType, OrderedMap};

use super::dtypes::TorchDType;
use super::pickle::{self, Class, Fault, Item, Object, Pickle, Unlisted};
use super::zip::Archive;
use crate::region::Region;
use crate::tree::{Node, child};
use crate::{Error, Result};

/// Pickles longer than this are refused: torch keeps tensors outside of them.
const MAX_PICKLE_BYTES: u64 = 1 << 30;
/// Values deeper than this are refused.
const MAX_DEPTH: usize = 100;
/// A view that repeats its storage may be this large all the same.
const MAX_REPEATED_BYTES: usize = 64 << 20;

/// What a value counts for, and what a tensor does beside it.
const NODE_BYTES: usize = size_of::<Node>();
const TENSOR_BYTES: usize = 256;

/// The contents of an archive.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) tree: Node,
    /// Tensors by flattened name, in order.
    pub(crate) tensors: Vec<(String, StoredTensor)>,
}

/// A tensor and the part of the archive that is its storage.
#[derive(Debug, Clone)]
pub(crate) struct StoredTensor {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// In elements.
    strides: Vec<usize>,
    /// The storage from the tensor's first element on.
    storage: Region,
    /// Bytes of each element whose sign bit is to be turned: views that torch negates or conjugates when it reads them.
    turned: Vec<usize>,
}

impl StoredTensor {
    /// Whether its bytes are its elements in row-major order.
    pub(crate) fn is_contiguous(&self) -> bool {
        if !self.turned.is_empty() {
            return false;
        }
        let mut expected = 1;
        let dims = self.shape.iter().zip(&self.strides).rev();
        self.shape.contains(&0)
            || dims.into_iter().all(|(size, stride)| {
                let fits = *size == 1 || *stride == expected;
                expected *= size;
                fits
            })
    }

    pub(crate) fn len_bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size_bytes()) as u64
    }

    pub(crate) fn storage(&self) -> &Region {
        &self.storage
    }

    /// Its bytes in row-major order.
    pub(crate) fn row_major(&self) -> Result<Vec<u8>> {
        let stored = self.storage.read_all()?;
        let size = self.dtype.size_bytes();
        let numel: usize = self.shape.iter().product();
        let mut bytes = Vec::with_capacity(numel * size);
        let mut index = vec![0; self.shape.len()];
        let mut at = 0;
        for _ in 0..numel {
            bytes.extend_from_slice(&stored[at * size..(at + 1) * size]);
            for dim in (0..index.len()).rev() {
                index[dim] += 1;
                at += self.strides[dim];
                if index[dim] < self.shape[dim] {
                    break;
                }
                at -= index[dim] * self.strides[dim];
                index[dim] = 0;
            }
        }
        for sign in &self.turned {
            bytes.iter_mut().skip(*sign).step_by(size).for_each(|byte| *byte ^= 0x80);
        }
        Ok(bytes)
    }
}

/// Reads the archive that fills `region`; names of tensors begin with `at`. With opaque classes, values that are not read
/// here are None.
///
/// # Errors
/// `Refused` for classes that are not on the list, big-endian archives, values and dtypes that we cannot hold;
/// `Corrupt`, `Io`.
pub(crate) fn read(region: Region, at: &str, unlisted: Unlisted) -> Result<Saved> {
    let archive = Archive::open(region)?;
    refuse_big_endian(&archive)?;
    let record = archive.record("data.pkl").filter(|record| record.len() <= MAX_PICKLE_BYTES);
    let record =
        record.ok_or_else(|| Error::refused(archive.region().path(), 0, "a pickle of 1 GiB or more"))?;
    let bytes = record.read_all()?;
    let (pickle, _) = pickle::load(&bytes, unlisted).map_err(|fault| of_fault(&record, fault))?;
    let mut reading = Reading {
        archive: &archive,
        record: &record,
        pickle: &pickle,
        unlisted,
        tensors: Vec::new(),
        budget: budget(&bytes),
    };
    let tree = reading.node(pickle.root(), at, 0)?;
    Ok(Saved { tree, tensors: reading.tensors })
}

/// What the values may take, in bytes and in steps, when everything that a pickle shares is written out.
fn budget(bytes: &[u8]) -> usize {
    bytes.len().saturating_mul(64).saturating_add(16 << 20)
}

/// The fault of a pickle as an error of its file.
pub(crate) fn of_fault(pickle: &Region, fault: Fault) -> Error {
    let offset_bytes = pickle.start() + fault.at as u64;
    if fault.refused {
        return Error::refused(pickle.path(), offset_bytes, fault.what);
    }
    Error::Corrupt {
        path: pickle.owned_path(),
        what: "a pickle".to_owned(),
        offset_bytes,
        fqns: Vec::new(),
        expected: "what torch writes".to_owned(),
        got: fault.what,
    }
}

fn refuse_big_endian(archive: &Archive) -> Result<()> {
    let Some(order) = archive.record("byteorder") else { return Ok(()) };
    let text = if order.len() <= 16 { order.read_all()? } else { Vec::new() };
    if text == b"little" {
        return Ok(());
    }
    let what = format!("byte order {:?}; read is little", String::from_utf8_lossy(&text));
    Err(Error::refused(order.path(), order.start(), what))
}

struct Reading<'r> {
    archive: &'r Archive,
    record: &'r Region,
    pickle: &'r Pickle<'r>,
    unlisted: Unlisted,
    tensors: Vec<(String, StoredTensor)>,
    budget: usize,
}

impl Reading<'_> {
    fn node(&mut self, item: Item, at: &str, depth: usize) -> Result<Node> {
        self.spend(at, NODE_BYTES.max(at.len()))?;
        if depth > MAX_DEPTH {
            return Err(self.refuse(at, format!("nested more than {MAX_DEPTH} deep")));
        }
        let pickle = self.pickle;
        Ok(match (item, pickle.object(item)) {
            (Item::None, _) => Node::None,
            (Item::Bool(truth), _) => Node::Bool(truth),
            (Item::Int(int), _) => Node::Int(int),
            (Item::Float(float), _) => Node::Float(float.to_bits()),
            (Item::Str(_), _) => {
                let text = pickle.str(item).unwrap_or_default();
                self.spend(at, text.len())?;
                Node::Str(text.to_owned())
            }
            (_, Some(Object::Dict(entries))) => self.map(entries, at, depth)?,
            (_, Some(Object::List(_) | Object::Tuple(_) | Object::Set(_))) => self.list(item, at, depth)?,
            (_, Some(Object::Made { class: Class::Size, .. })) => self.list(item, at, depth)?,
            (_, Some(Object::Made { class: Class::BytesIo, state, .. })) => {
                // Contents, position, attributes.
                match pickle.items(*state) {
                    Some(&[contents, ..]) => self.node(contents, at, depth + 1)?,
                    _ => return Err(self.refuse(at, "a BytesIO without contents")),
                }
            }
            (_, Some(Object::Made { class, .. }))
                if self.unlisted == Unlisted::Opaque && !class.makes_tensor() =>
            {
                Node::None
            }
            (_, Some(Object::Made { .. })) => match self.named(item) {
                Some(text) => {
                    self.spend(at, text.len())?;
                    Node::Str(text)
                }
                None => {
                    self.spend(at, TENSOR_BYTES)?;
                    let tensor = self.tensor(item, at)?;
                    self.tensors.push((at.to_owned(), tensor));
                    Node::Tensor
                }
            },
            (Item::Class(Class::DType(dtype)), _) => Node::Str(format!("torch.{}", dtype.name())),
            _ => match pickle.bytes(item) {
                Some(bytes) => {
                    self.spend(at, bytes.len())?;
                    Node::Bytes(bytes.to_vec())
                }
                None if self.unlisted == Unlisted::Opaque => Node::None,
                None => return Err(self.refuse(at, pickle.describe(item))),
            },
        })
    }

    fn list(&mut self, item: Item, at: &str, depth: usize) -> Result<Node> {
        let pickle = self.pickle;
        let items = pickle.items(item).ok_or_else(|| self.refuse(at, pickle.describe(item)))?;
        self.spend(at, items.len().saturating_mul(NODE_BYTES))?;
        let mut nodes = Vec::with_capacity(items.len());
        for (nth, item) in items.iter().enumerate() {
            nodes.push(self.node(*item, &child(at, &nth.to_string()), depth + 1)?);
        }
        Ok(Node::List(nodes))
    }

    fn map(&mut self, entries: &[(Item, Item)], at: &str, depth: usize) -> Result<Node> {
        // The later of equal keys holds, in the place of the first, as in Python.
        let mut last: OrderedMap<String, (Item, Item)> = OrderedMap::new();
        for (item, value) in entries {
            let key = self.key(*item);
            let key =
                key.ok_or_else(|| self.refuse(at, format!("the key {}", self.pickle.describe(*item))))?;
            self.spend(at, NODE_BYTES + key.len())?;
            let earlier = last.get(&key).map(|(earlier, _)| *earlier);
            if earlier.is_some_and(|earlier| !self.is_same_kind(earlier, *item)) {
                return Err(self.refuse(at, format!("two keys that are both {key:?} as text")));
            }
            last.insert(key, (*item, *value));
        }
        let mut map = Vec::with_capacity(last.len());
        for (key, (_, value)) in last {
            let node = self.node(value, &child(at, &key), depth + 1)?;
            map.push((key, node));
        }
        Ok(Node::Map(map))
    }

    /// Whether two keys whose text is equal are equal in Python as well.
    fn is_same_kind(&self, one: Item, other: Item) -> bool {
        self.pickle.str(one).is_some() == self.pickle.str(other).is_some()
    }

    /// torch's own flattening turns every key into text.
    fn key(&self, key: Item) -> Option<String> {
        match key {
            Item::Int(int) => Some(int.to_string()),
            Item::Bool(truth) => Some(if truth { "True" } else { "False" }.to_owned()),
            Item::None => Some("None".to_owned()),
            key => self.pickle.str(key).map(str::to_owned),
        }
    }

    /// Paths, devices and layouts, as text.
    fn named(&self, item: Item) -> Option<String> {
        let pickle = self.pickle;
        let parts = |class| {
            let (arguments, _) = pickle.made(item, class)?;
            let part = |item: &Item| match item {
                Item::Int(int) => Some(int.to_string()),
                item => pickle.str(*item).map(str::to_owned),
            };
            arguments.iter().map(part).collect::<Option<Vec<_>>>()
        };
        let path = || parts(Class::Path).map(|parts| parts.join("/").replacen("//", "/", 1));
        path()
            .or_else(|| parts(Class::Device).map(|parts| parts.join(":")))
            .or_else(|| parts(Class::Layout).map(|p| p.join("")))
    }

    fn tensor(&self, item: Item, at: &str) -> Result<StoredTensor> {
        let pickle = self.pickle;
        if let Some((arguments, _)) = pickle.made(item, Class::RebuildParameter) {
            let inner = arguments.first().copied().unwrap_or(Item::None);
            // One step: a parameter holds a tensor, never another parameter.
            return self.plain_tensor(inner, at);
        }
        if let Some((&[function, class, arguments, ..], _)) = pickle.made(item, Class::RebuildFromType) {
            let is_plain = matches!(class, Item::Class(Class::Tensor | Class::Parameter));
            if let (Item::Class(function), true, Some(arguments)) =
                (function, is_plain, pickle.items(arguments))
            {
                return self.rebuilt(function, arguments, at);
            }
            return Err(self.refuse(at, format!("a tensor of {}", pickle.describe(class))));
        }
        self.plain_tensor(item, at)
    }

    fn plain_tensor(&self, item: Item, at: &str) -> Result<StoredTensor> {
        for class in [Class::RebuildTensorV2, Class::RebuildTensorV3, Class::RebuildTensorPlain] {
            if let Some((arguments, _)) = self.pickle.made(item, class) {
                return self.rebuilt(class, arguments, at);
            }
        }
        Err(self.refuse(at, self.pickle.describe(item)))
    }

    /// The arguments of torch's rebuild functions: storage, offset, size, strides, and what is of no use here.
    fn rebuilt(&self, function: Class, arguments: &[Item], at: &str) -> Result<StoredTensor> {
        let pickle = self.pickle;
        let wrong = || self.refuse(at, "a tensor with other arguments than torch's");
        let [storage, offset, shape, strides, ..] = *arguments else { return Err(wrong()) };
        let offset = pickle.size(offset).ok_or_else(wrong)?;
        let (shape, strides) = pickle.sizes(shape).zip(pickle.sizes(strides)).ok_or_else(wrong)?;
        let (kind, storage) = self.storage(storage, at)?;
        let (dtype, flags) = match (function, kind) {
            (Class::RebuildTensorV3, _) => match arguments.get(6) {
                Some(Item::Class(Class::DType(dtype))) => (*dtype, arguments.get(7)),
                _ => return Err(wrong()),
            },
            (_, Some(dtype)) => (dtype, arguments.get(6)),
            (_, None) => return Err(wrong()),
        };
        let ours = dtype.ours().ok_or_else(|| self.refuse(at, format!("dtype {}", dtype.name())))?;
        let storage = cut(&storage, ours, offset, &shape, &strides);
        let storage = storage.ok_or_else(|| self.refuse(at, "a tensor larger than its storage"))?;
        let turned = flags.map_or(Vec::new(), |flags| self.turned(*flags, ours));
        Ok(StoredTensor { dtype: ours, shape, strides, storage, turned })
    }

    /// `("storage", class, record, device, length)`.
    fn storage(&self, item: Item, at: &str) -> Result<(Option<TorchDType>, Region)> {
        let pickle = self.pickle;
        let wrong = || self.refuse(at, "a storage that torch.save does not write");
        let Some(Object::Persistent(id)) = pickle.object(item) else { return Err(wrong()) };
        let Some(&[kind, Item::Class(Class::Storage(dtype)), record, _, _]) = pickle.items(*id) else {
            return Err(wrong());
        };
        let name = pickle.str(record).filter(|_| pickle.str(kind) == Some("storage")).ok_or_else(wrong)?;
        let record = self.archive.record(&format!("data/{name}"));
        let missing = || self.refuse(at, format!("a storage data/{name:.40} that is not in the archive"));
        Ok((dtype, record.ok_or_else(missing)?))
    }

    /// Conjugated and negated views store the values they are views of: where the signs that they turn lie.
    fn turned(&self, flags: Item, dtype: DType) -> Vec<usize> {
        let is_set = |name: &str| {
            let mut entries = self.pickle.dict(flags).into_iter().flatten();
            entries.any(|(key, value)| self.pickle.str(*key) == Some(name) && *value == Item::Bool(true))
        };
        let (conjugated, negated) = (is_set("conj") && dtype == DType::C64, is_set("neg"));
        let size = dtype.size_bytes();
        let parts: &[(usize, bool)] = match dtype {
            DType::C64 => &[(3, negated), (7, negated != conjugated)],
            _ => &[(size - 1, negated)],
        };
        parts.iter().filter(|(_, turned)| *turned).map(|(sign, _)| *sign).collect()
    }

    fn spend(&mut self, at: &str, cost: usize) -> Result<()> {
        match self.budget.checked_sub(cost) {
            Some(left) => {
                self.budget = left;
                Ok(())
            }
            None => Err(self.refuse(at, "values that repeat each other beyond all measure")),
        }
    }

    fn refuse(&self, at: &str, what: impl std::fmt::Display) -> Error {
        let at = if at.is_empty() { String::new() } else { format!("{at:.200}: ") };
        Error::refused(self.record.path(), self.record.start(), format!("{at}{what}"))
    }
}

/// The storage from the first element of a tensor to its last; `None` if they are not all inside.
fn cut(storage: &Region, dtype: DType, offset: usize, shape: &[usize], strides: &[usize]) -> Option<Region> {
    let size = dtype.size_bytes();
    if shape.len() != strides.len() {
        return None;
    }
    let numel = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
    let bytes = numel.checked_mul(size)?;
    if numel == 0 {
        return storage.part(0, 0);
    }
    let mut last = 0usize;
    for (size, stride) in shape.iter().zip(strides) {
        last = last.checked_add((size - 1).checked_mul(*stride)?)?;
    }
    let span = last.checked_add(1)?.checked_mul(size)?;
    if bytes > span && bytes > MAX_REPEATED_BYTES {
        return None;
    }
    storage.part(offset.checked_mul(size)? as u64, span as u64)
}
