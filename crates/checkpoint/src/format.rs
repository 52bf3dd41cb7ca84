//! Format 1: a directory of safetensors files and one manifest. Byte by byte in `docs/FORMAT.md`.
//!
//! ```text
//! step-000100/
//!   shard-00001-model-00001-of-00001.safetensors    what rank 0 wrote
//!   shard-00002-model-00001-of-00002.safetensors    what rank 1 wrote; a second box of one tensor goes to
//!   shard-00002-model-00002-of-00002.safetensors    its next file
//!   manifest.sconce                                 the index and the mark of the commit: written last
//! ```

pub(crate) mod manifest;
pub(crate) mod shard;

/// The manifest's name inside a checkpoint.
pub const MANIFEST_NAME: &str = "manifest.sconce";
/// Major version: a reader refuses a later one.
pub const MAJOR_VERSION: u32 = 1;

/// A name that stays inside the checkpoint's directory.
pub(crate) fn is_confined(name: &str) -> bool {
    let mut parts = std::path::Path::new(name).components();
    let only = matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None));
    only && !name.contains(['/', '\\', '\0'])
}
