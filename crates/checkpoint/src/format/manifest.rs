//! The manifest: bytes to [`Metadata`] and back. Pure; every number is checked before it is used.

mod read;
mod rows;
mod write;

pub(crate) use read::decode;
pub(crate) use write::encode;

use serde::{Deserialize, Serialize};

use crate::tree::Node;

/// The first bytes of every manifest.
const MAGIC: [u8; 8] = *b"\x89SCONCE\n";

/// The JSON part: what is small, or has no fixed width.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    /// Who wrote it; for people.
    created_by: String,
    sections: Sections,
    tree: Node,
}

/// Where the columns lie, in the order in which they lie there.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sections {
    tensors: Section,
    chunks: Section,
    dims: Section,
    files: Section,
    blocks: Section,
    names: Section,
}

/// One column, from the end of the head on.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Section {
    len_bytes: u64,
    crc32: u32,
}

#[cfg(test)]
mod tests;
