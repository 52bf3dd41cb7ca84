//! Metadata: what a checkpoint holds and where. Values only; how they lie in the manifest is `format::manifest`.

use std::ops::Range;
use std::path::Path;

use sconce_dtensor::{DType, TensorBox};
use serde::{Deserialize, Serialize};

use crate::format::manifest;
use crate::plan::{Layout, TensorLayout, WrittenFile};
use crate::tree::Node;
use crate::{Error, Result};

/// Bytes that one checksum covers.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// What a checkpoint holds and where its bytes lie, whatever format it has.
///
/// A [`StorageReader`](crate::StorageReader) of a foreign format describes its files with it: a chunk is a byte range
/// of a file, wherever in the file that is, and a file without checksums says so.
///
/// # Source
/// `torch.distributed.checkpoint.metadata.Metadata`, with checksums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Tensors, sorted by name.
    pub tensors: Vec<TensorStorageMetadata>,
    /// The data files.
    pub files: Vec<FileMetadata>,
    /// The nesting of the state, and its values that are no tensors.
    pub tree: Node,
}

/// One saved tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorStorageMetadata {
    /// Its flattened name.
    pub fqn: String,
    /// Element type.
    pub dtype: DType,
    /// Global shape.
    pub shape: Vec<usize>,
    /// Where its parts lie: disjoint, together the whole tensor.
    pub chunks: Vec<ChunkStorageMetadata>,
}

/// One saved part of a tensor, row-major and contiguous in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkStorageMetadata {
    /// The part, in elements of the global tensor.
    pub bounds: TensorBox,
    /// Position in [`Metadata::files`].
    pub file: usize,
    /// Where it begins in the file.
    pub offset_bytes: u64,
}

/// One data file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMetadata {
    /// Name inside the checkpoint's directory; to a reader of another format, whatever it opens by it.
    pub name: String,
    /// Its length.
    pub len_bytes: u64,
    /// CRC32 of each block of [`BLOCK_BYTES`], the last of which may be short; `None` if the format has none.
    pub block_crcs: Option<Vec<u32>>,
}

impl Metadata {
    /// The tensor of that name.
    pub fn tensor(&self, fqn: &str) -> Option<&TensorStorageMetadata> {
        self.position(fqn).map(|at| &self.tensors[at])
    }

    /// The position in `tensors` of the tensor of that name.
    pub fn position(&self, fqn: &str) -> Option<usize> {
        self.tensors.binary_search_by(|tensor| tensor.fqn.as_str().cmp(fqn)).ok()
    }

    /// The tensors of which a part lies in a range of a file.
    pub(crate) fn names_within(&self, file: usize, range: Range<u64>) -> Vec<String> {
        let is_there = |tensor: &&TensorStorageMetadata| {
            tensor.chunks.iter().any(|chunk| {
                let len = (chunk.bounds.numel() * tensor.dtype.size_bytes()) as u64;
                let end = chunk.offset_bytes.saturating_add(len);
                chunk.file == file && chunk.offset_bytes < range.end && end > range.start
            })
        };
        self.tensors.iter().filter(is_there).map(|tensor| tensor.fqn.clone()).collect()
    }

    /// A number that two checkpoints share only by chance: of the files' checksums, of what lies where
    /// in them, and of the values that are no tensors.
    pub(crate) fn fingerprint(&self) -> Result<u32> {
        let mut hasher = crc32fast::Hasher::new();
        for file in &self.files {
            hasher.update(file.name.as_bytes());
            hasher.update(&file.len_bytes.to_le_bytes());
            file.block_crcs.iter().flatten().for_each(|crc| hasher.update(&crc.to_le_bytes()));
        }
        for tensor in &self.tensors {
            let mut places = tensor.fqn.clone().into_bytes();
            for ChunkStorageMetadata { bounds, file, offset_bytes } in &tensor.chunks {
                let numbers = bounds.offsets.iter().chain(&bounds.sizes).chain([file]);
                numbers.for_each(|n| places.extend_from_slice(&n.to_le_bytes()));
                places.extend_from_slice(&offset_bytes.to_le_bytes());
            }
            hasher.update(&places);
        }
        let tree = serde_json::to_vec(&self.tree);
        hasher.update(&tree.map_err(|e| Error::Tensor { fqn: String::new(), cause: e.to_string() })?);
        Ok(hasher.finalize())
    }

    /// The manifest of format 1 that says this.
    ///
    /// # Errors
    /// `Tensor` for what a manifest cannot say: a tensor of more than 255 dims, a name of 4 GiB, a file without checksums.
    pub fn to_manifest(&self) -> Result<Vec<u8>> {
        manifest::encode(self)
    }

    /// What a manifest says; `path` is its name in messages.
    ///
    /// # Errors
    /// `NotACheckpoint`, `Version`, `Corrupt`.
    pub fn from_manifest(path: &Path, bytes: &[u8]) -> Result<Metadata> {
        manifest::decode(path, bytes)
    }

    /// The layout of a save with the place of each chunk: `written` is what each rank reports, by rank.
    ///
    /// # Errors
    /// `Uncovered` if a rank did not write what its plan said.
    pub fn located(layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<Metadata> {
        let mut files = Vec::new();
        let mut places: Vec<Vec<Option<(usize, u64)>>> = Vec::with_capacity(written.len());
        for of_rank in written {
            let mut of_items = Vec::new();
            for WrittenFile { file, items, .. } in of_rank {
                for item in items {
                    of_items.resize(of_items.len().max(item.item + 1), None);
                    of_items[item.item] = Some((files.len(), item.offset_bytes));
                }
                files.push(file);
            }
            places.push(of_items);
        }
        let tensors = layout.tensors.into_iter().map(|tensor| locate(tensor, &places));
        Ok(Metadata { tensors: tensors.collect::<Result<_>>()?, files, tree: layout.tree })
    }
}

fn locate(tensor: TensorLayout, places: &[Vec<Option<(usize, u64)>>]) -> Result<TensorStorageMetadata> {
    let TensorLayout { fqn, dtype, shape, chunks } = tensor;
    let mut located = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let place = places.get(chunk.writer).and_then(|items| *items.get(chunk.item)?);
        let Some((file, offset_bytes)) = place else {
            return Err(Error::Uncovered { fqn, shape, missing: chunk.bounds.to_string() });
        };
        located.push(ChunkStorageMetadata { bounds: chunk.bounds, file, offset_bytes });
    }
    Ok(TensorStorageMetadata { fqn, dtype, shape, chunks: located })
}
