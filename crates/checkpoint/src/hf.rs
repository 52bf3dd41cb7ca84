//! Plain safetensors: files and directories of Hugging Face's, of candle's `VarMap`, and of torch's
//! `HuggingFaceStorageWriter`, sharded or whole. Knows no manifest: what it reads has no checksums.

pub(crate) mod header;
mod reader;
mod writer;

pub use reader::Reader;
pub use writer::Writer;

/// The file that says which tensor is in which file of a directory.
const INDEX_NAME: &str = "model.safetensors.index.json";

/// The key of a file's metadata under which values that are no tensors, and the nesting, are kept. Other programs
/// ignore it.
const TREE_KEY: &str = "SCONCE_TREE";
