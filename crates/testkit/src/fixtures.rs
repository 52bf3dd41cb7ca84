//! Files that PyTorch wrote, to compare with.

use std::path::PathBuf;

/// The path of a fixture below `fixtures/torch`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/torch").join(name)
}
