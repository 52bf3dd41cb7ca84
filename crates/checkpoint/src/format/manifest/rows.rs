//! Fixed-width rows of the manifest, little-endian, read where they lie whatever their alignment.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What precedes the head.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Prelude {
    pub(super) magic: [u8; 8],
    pub(super) major: U32,
    pub(super) minor: U32,
    pub(super) head_len: U64,
    pub(super) head_crc32: U32,
    /// Of all bytes before it.
    pub(super) crc32: U32,
}

/// One tensor; its shape and its chunks are consecutive rows of other columns.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct TensorRow {
    pub(super) name_start: U64,
    pub(super) name_len: U32,
    pub(super) dtype: u8,
    pub(super) ndim: u8,
    pub(super) reserved: [u8; 2],
    pub(super) shape_start: U64,
    pub(super) chunk_start: U64,
    pub(super) chunk_count: U64,
}

/// One chunk; its offsets and then its sizes are consecutive dims.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ChunkRow {
    pub(super) bounds_start: U64,
    pub(super) offset_bytes: U64,
    pub(super) file: U64,
}

/// One data file; its block checksums are consecutive.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct FileRow {
    pub(super) name_start: U64,
    pub(super) name_len: U32,
    pub(super) reserved: U32,
    pub(super) len_bytes: U64,
    pub(super) block_start: U64,
}
