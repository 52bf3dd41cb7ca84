//! The safetensors files: names and headers. Pure: bytes are written elsewhere.
//!
//! Keys and metadata are those that torch's `HuggingFaceStorageReader` reads, so that PyTorch opens the files without
//! Sconce. The header is padded with spaces so that data begin on a page; tensors come by falling element size, so
//! that each is aligned.

use std::collections::BTreeMap;

use sconce_dtensor::{DType, TensorBox};
use serde::Serialize;

use crate::tree::Node;
use crate::{Error, Result};

/// Data begin at a multiple of this.
const ALIGN_BYTES: usize = 4096;

/// Longer headers are refused by the safetensors library, and by us.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) fqn: String,
    pub(crate) dtype: DType,
    pub(crate) bounds: TensorBox,
}

/// File `nth` of `n_files` that the rank at position `writer` writes; both count from 0 here and from 1 in the name.
///
/// # Source
/// `_gen_file_name` of `torch/distributed/checkpoint/_hf_utils.py`.
pub(crate) fn file_name(writer: usize, nth: usize, n_files: usize) -> String {
    format!("shard-{:05}-model-{:05}-of-{:05}.safetensors", writer + 1, nth + 1, n_files)
}

/// Whether a file of that name is one that a rank wrote.
pub(crate) fn is_file_name(name: &str) -> bool {
    name.starts_with("shard-") && name.ends_with(".safetensors")
}

/// Puts the entries in the order in which they lie in the file.
pub(crate) fn order<T>(entries: &mut [T], dtype: impl Fn(&T) -> DType) {
    entries.sort_by_key(|entry| std::cmp::Reverse(dtype(entry).size_bytes()));
}

/// The JSON header of a safetensors file. The safetensors crate would bring eight packages for it; tests read what we
/// write with that crate.
#[derive(Serialize)]
struct Header<'e> {
    #[serde(rename = "__metadata__")]
    metadata: BTreeMap<&'static str, String>,
    #[serde(flatten)]
    tensors: BTreeMap<&'e str, Info<'e>>,
}

#[derive(Serialize)]
struct Info<'e> {
    dtype: String,
    shape: &'e [usize],
    data_offsets: [usize; 2],
}

/// The file up to its data, and where each of the ordered entries begins in the file.
pub(crate) fn header(entries: &[Entry]) -> Result<(Vec<u8>, Vec<u64>)> {
    let (bytes, starts, _) = build(entries, torch_metadata(entries)?)?;
    Ok((bytes, starts))
}

/// The header of a file of whole tensors, with a tree of values under `tree_key` if there is one, and the length of
/// the file.
pub(crate) fn whole_header(
    entries: &[Entry],
    tree_key: &'static str,
    tree: Option<&Node>,
) -> Result<(Vec<u8>, u64)> {
    let mut metadata = BTreeMap::from([("format", "pt".to_owned())]);
    if let Some(tree) = tree {
        tree.check_depth()?;
        metadata.insert(tree_key, String::from_utf8_lossy(&to_json(tree)?).into_owned());
    }
    let (bytes, _, end) = build(entries, metadata)?;
    Ok((bytes, end))
}

/// The header, where each entry begins in the file, and where the file ends.
fn build(entries: &[Entry], metadata: BTreeMap<&'static str, String>) -> Result<(Vec<u8>, Vec<u64>, u64)> {
    let (mut tensors, mut starts, mut end) = (BTreeMap::new(), Vec::with_capacity(entries.len()), 0);
    for entry in entries {
        let start = end;
        end += entry.bounds.numel() * entry.dtype.size_bytes();
        // safetensors names dtypes as we do, in capitals.
        let dtype = entry.dtype.name().to_uppercase();
        tensors.insert(&*entry.fqn, Info { dtype, shape: &entry.bounds.sizes, data_offsets: [start, end] });
        starts.push(start);
    }
    let mut json = to_json(&Header { metadata, tensors })?;
    json.resize((json.len() + 8).next_multiple_of(ALIGN_BYTES) - 8, b' ');
    if json.len() as u64 > MAX_HEADER_BYTES {
        let cause =
            format!("a safetensors header of {} bytes, at most {MAX_HEADER_BYTES} are read", json.len());
        return Err(Error::Tensor { fqn: String::new(), cause });
    }
    let data = (json.len() + 8) as u64;
    let bytes = [&(json.len() as u64).to_le_bytes()[..], &json].concat();
    Ok((bytes, starts.into_iter().map(|start| data + start as u64).collect(), data + end as u64))
}

/// What torch's reader looks for: the format, and where in its tensor each entry was.
fn torch_metadata(entries: &[Entry]) -> Result<BTreeMap<&'static str, String>> {
    let offsets = |entry: &Entry| BTreeMap::from([("saved_offsets", entry.bounds.offsets.clone())]);
    let info: BTreeMap<&str, _> = entries.iter().map(|entry| (&*entry.fqn, offsets(entry))).collect();
    let info = String::from_utf8_lossy(&to_json(&info)?).into_owned();
    let entries =
        [("format", "pt".to_owned()), ("DCP_VERSION", "1.0".to_owned()), ("DCP_SHARDING_INFO", info)];
    Ok(BTreeMap::from(entries))
}

fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::Tensor { fqn: String::new(), cause: e.to_string() })
}
