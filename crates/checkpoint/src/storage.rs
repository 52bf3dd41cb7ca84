//! Files of a checkpoint: how they are written, read and published. Knows no tensors.

pub(crate) mod commit;
mod file;
#[cfg(feature = "mmap")]
mod mmap;
mod reader;

pub(crate) use file::BlockWriter;
pub use reader::Access;
pub(crate) use reader::ShardReader;
