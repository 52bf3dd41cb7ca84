//! The safetensors files: names and headers. Pure: bytes are written elsewhere.
//!
//! Keys and metadata are those that torch's `HuggingFaceStorageReader` reads, so that PyTorch opens the files without
//! Sconce. The header is padded with spaces so that data begin on a page; tensors come by falling element size, so
//! that each is aligned.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Metadata, TensorInfo};
use sconce_dtensor::{DType, TensorBox};

use crate::{Error, Result};

/// Data begin at a multiple of this.
const ALIGN_BYTES: usize = 4096;

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

/// Puts the entries in the order in which they lie in the file.
pub(crate) fn order<T>(entries: &mut [T], dtype: impl Fn(&T) -> DType) {
    entries.sort_by_key(|entry| std::cmp::Reverse(dtype(entry).size_bytes()));
}

/// The file up to its data, and where each of the ordered entries begins in the file.
pub(crate) fn header(entries: &[Entry]) -> Result<(Vec<u8>, Vec<u64>)> {
    let (mut infos, mut end) = (Vec::with_capacity(entries.len()), 0);
    for entry in entries {
        let start = end;
        end += entry.bounds.numel() * entry.dtype.size_bytes();
        let (dtype, shape) = (safetensors_dtype(entry.dtype), entry.bounds.sizes.clone());
        infos.push((entry.fqn.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
    }
    let starts: Vec<usize> = infos.iter().map(|(_, info)| info.data_offsets.0).collect();
    let failed = |cause: String| Error::Tensor { fqn: String::new(), cause };
    let metadata = Metadata::new(Some(torch_metadata(entries)?), infos).map_err(|e| failed(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| failed(e.to_string()))?;
    json.resize((json.len() + 8).next_multiple_of(ALIGN_BYTES) - 8, b' ');
    let data = (json.len() + 8) as u64;
    let bytes = [&(json.len() as u64).to_le_bytes()[..], &json].concat();
    Ok((bytes, starts.into_iter().map(|start| data + start as u64).collect()))
}

/// What torch's reader looks for: the format, and where in its tensor each entry was.
fn torch_metadata(entries: &[Entry]) -> Result<HashMap<String, String>> {
    let offsets = |entry: &Entry| BTreeMap::from([("saved_offsets", entry.bounds.offsets.clone())]);
    let info: BTreeMap<&str, _> = entries.iter().map(|entry| (&*entry.fqn, offsets(entry))).collect();
    let info = serde_json::to_string(&info)
        .map_err(|e| Error::Tensor { fqn: String::new(), cause: e.to_string() })?;
    Ok(HashMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("DCP_VERSION".to_owned(), "1.0".to_owned()),
        ("DCP_SHARDING_INFO".to_owned(), info),
    ]))
}

fn safetensors_dtype(dtype: DType) -> safetensors::Dtype {
    match dtype {
        DType::U8 => safetensors::Dtype::U8,
        DType::I8 => safetensors::Dtype::I8,
        DType::I16 => safetensors::Dtype::I16,
        DType::I32 => safetensors::Dtype::I32,
        DType::I64 => safetensors::Dtype::I64,
        DType::U32 => safetensors::Dtype::U32,
        DType::F16 => safetensors::Dtype::F16,
        DType::BF16 => safetensors::Dtype::BF16,
        DType::F32 => safetensors::Dtype::F32,
        DType::F64 => safetensors::Dtype::F64,
    }
}
