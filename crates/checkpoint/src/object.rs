//! Checkpoints in object stores (feature `object-store`): S3, GCS, Azure, anything that the crate `object_store` reaches,
//! and plain HTTP servers to read from.
//!
//! ```text
//! s3://bucket/runs/a/step-000100/
//!   shard-00001-model-00001-of-00001.8c1f….safetensors    what rank 0 wrote in this save: no other save has the name
//!   shard-00002-model-00001-of-00001.8c1f….safetensors    what rank 1 wrote
//!   manifest.sconce                                       put last, whole: the commit
//! ```
//!
//! The objects are format 1: copied into a directory they are a checkpoint there, and a directory that is copied into a
//! store is one here. A store has no locks and no rename: what a save promises without them is said at [`Writer`].
//!
//! Everything else of this crate is synchronous; each [`Prefix`] has two threads of its own for its requests.

mod failure;
mod prefix;
mod reader;
mod segments;
mod upload;
mod writer;

pub use object_store;

pub use prefix::{Options, Prefix};
pub use reader::Reader;
pub use writer::Writer;
