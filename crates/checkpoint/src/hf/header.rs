//! The header of a safetensors file, read and believed only where it fits the file.

use std::collections::HashMap;

use sconce_dtensor::{DType, OrderedMap};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::format::shard::MAX_HEADER_BYTES;
use crate::region::Region;
use crate::{Error, Result};

/// What a file holds.
#[derive(Debug)]
pub(crate) struct Entries {
    pub(crate) tensors: Vec<Entry>,
    /// The file's `__metadata__`.
    pub(crate) metadata: HashMap<String, String>,
}

/// A tensor, or a chunk of one.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) fqn: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Where in its tensor the chunk begins, if the file says so: torch's `DCP_SHARDING_INFO`.
    pub(crate) offsets: Option<Vec<usize>>,
    /// Its bytes.
    pub(crate) data: Region,
}

#[derive(Default)]
struct Head {
    metadata: HashMap<String, String>,
    tensors: OrderedMap<String, Info>,
}

/// Entry by entry: what serde's `flatten` sets aside takes many times the text.
impl<'de> Deserialize<'de> for Head {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Head;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Head, A::Error> {
                let mut head = Head::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        head.metadata = map.next_value()?;
                    } else if head.tensors.contains_key(&name) {
                        return Err(A::Error::custom(format!("two tensors of the name {name:.200}")));
                    } else {
                        head.tensors.insert(name, map.next_value()?);
                    }
                }
                Ok(head)
            }
        }
        from.deserialize_map(Entries)
    }
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

#[derive(Deserialize)]
struct Sharding {
    saved_offsets: Vec<usize>,
}

/// Reads the header with which `file` begins.
///
/// # Errors
/// `Refused` for dtypes that we cannot hold, `Corrupt` for a header that does not fit the file, `Io`.
pub(crate) fn read(file: &Region) -> Result<Entries> {
    let bad = |got: String| damaged(file, got);
    let mut len = [0; 8];
    if file.len() < 8 {
        return Err(bad(format!("{} bytes", file.len())));
    }
    file.read(0, &mut len)?;
    let len = u64::from_le_bytes(len);
    let data = len.checked_add(8).filter(|data| len <= MAX_HEADER_BYTES && *data <= file.len());
    let data = data.ok_or_else(|| bad(format!("a header of {len} bytes in a file of {}", file.len())))?;
    let json = file.part(8, len).ok_or_else(|| bad("a short file".to_owned()))?.read_all()?;
    let head: Head = serde_json::from_slice(&json).map_err(|e| bad(e.to_string()))?;
    let sharding = match head.metadata.get("DCP_SHARDING_INFO") {
        None => None,
        Some(json) => {
            let parsed: HashMap<String, Sharding> =
                serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
            Some(parsed)
        }
    };
    let mut tensors = Vec::with_capacity(head.tensors.len());
    for (fqn, info) in head.tensors {
        tensors.push(entry(file, data, fqn, info, sharding.as_ref())?);
    }
    refuse_overlap(file, &tensors)?;
    Ok(Entries { tensors, metadata: head.metadata })
}

fn entry(
    file: &Region,
    data: u64,
    fqn: String,
    info: Info,
    sharding: Option<&HashMap<String, Sharding>>,
) -> Result<Entry> {
    let dtype = DType::ALL.into_iter().find(|dtype| dtype.name().eq_ignore_ascii_case(&info.dtype));
    let refuse =
        || Error::refused(file.path(), file.start(), format!("{fqn:.200}: dtype {:.40}", info.dtype));
    let dtype = dtype.ok_or_else(refuse)?;
    let wrong = |what: &str| damaged(file, format!("{fqn:.200}: {what}"));
    let (start, end) = info.data_offsets;
    let numel = info.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let len = numel.and_then(|numel| numel.checked_mul(dtype.size_bytes()));
    let len = len.map(|len| len as u64).filter(|len| end.checked_sub(start) == Some(*len));
    let len = len.ok_or_else(|| wrong(&format!("bytes {start} to {end} for shape {:?}", info.shape)))?;
    let begin = data.checked_add(start).ok_or_else(|| wrong("an offset beyond all files"))?;
    let region = file
        .part(begin, len)
        .ok_or_else(|| wrong(&format!("data behind the end of {} bytes", file.len())))?;
    let offsets = match sharding {
        None => None,
        Some(sharding) => match sharding.get(&fqn) {
            Some(found) if found.saved_offsets.len() == info.shape.len() => Some(found.saved_offsets.clone()),
            _ => return Err(wrong("no offsets of as many dims in DCP_SHARDING_INFO")),
        },
    };
    Ok(Entry { fqn, dtype, shape: info.shape, offsets, data: region })
}

fn refuse_overlap(file: &Region, tensors: &[Entry]) -> Result<()> {
    let ends = |entry: &Entry| (entry.data.start(), entry.data.start() + entry.data.len());
    let mut taken: Vec<(u64, u64)> = tensors.iter().map(ends).filter(|(start, end)| start < end).collect();
    taken.sort_unstable();
    match taken.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        None => Ok(()),
        Some(pair) => Err(damaged(file, format!("two tensors over byte {}", pair[1].0))),
    }
}

fn damaged(file: &Region, got: String) -> Error {
    Error::Corrupt {
        path: file.owned_path(),
        what: "a safetensors header".to_owned(),
        offset_bytes: file.start(),
        fqns: Vec::new(),
        expected: "tensors that lie in the file".to_owned(),
        got,
    }
}
