//! Metadata: what a checkpoint holds and where. Values only; how they lie in the manifest is `format::manifest`.

use sconce_dtensor::{DType, TensorBox};

use crate::tree::Node;

/// Bytes that one checksum covers.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// Everything a manifest says.
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMetadata {
    /// Name inside the checkpoint's directory.
    pub name: String,
    /// Its length.
    pub len_bytes: u64,
    /// CRC32 of each block of [`BLOCK_BYTES`]; the last may be short.
    pub block_crcs: Vec<u32>,
}

impl Metadata {
    /// The tensor of that name.
    pub fn tensor(&self, fqn: &str) -> Option<&TensorStorageMetadata> {
        self.tensors.binary_search_by(|tensor| tensor.fqn.as_str().cmp(fqn)).ok().map(|at| &self.tensors[at])
    }
}
