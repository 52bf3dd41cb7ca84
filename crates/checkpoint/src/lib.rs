//! Distributed checkpoints: all ranks save together, any other layout loads, and what is loaded is what was saved, bit
//! for bit, or an error says where it is not.

mod coordinate;
mod error;
mod format;
mod load;
mod metadata;
mod plan;
mod planner;
mod save;
mod storage;
mod tree;

pub use error::{Error, RankFailure, Result};
pub use format::{MAJOR_VERSION, MANIFEST_NAME};
pub use load::{LoadOptions, LoadReport, load, load_new, load_with, read_metadata};
pub use metadata::{BLOCK_BYTES, ChunkStorageMetadata, FileMetadata, Metadata, TensorStorageMetadata};
pub use save::{SaveOptions, SaveReport, save, save_with};
pub use storage::Access;
pub use tree::Node;
