//! Verifying: every byte of a checkpoint against its checksums.

use std::path::Path;

use crate::read::Verified;
use crate::storage::{Access, FileSystemReader, StorageReader};
use crate::{Error, FileMetadata, Result};

/// What verifying a checkpoint found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// Number of data files.
    pub n_files: usize,
    /// Their bytes, all of which were read.
    pub data_bytes: u64,
    /// Every block that is damaged and every file that is missing or has another length.
    pub damage: Vec<Error>,
}

/// Reads every byte of a checkpoint and compares all checksums.
///
/// A load verifies what it reads by itself; this is for a checkpoint that is to be kept, copied or trusted as a whole.
///
/// # Errors
/// `Missing`, `NotACheckpoint`, `Version`, `Corrupt`, `Busy` and `Io` of the manifest. Damage of data files is in the
/// report.
pub fn verify(path: impl AsRef<Path>) -> Result<VerifyReport> {
    verify_from(&FileSystemReader::new(path.as_ref(), Access::positional()))
}

/// As [`verify`], of any storage. A file without checksums is opened only.
///
/// # Errors
/// Those of the storage's metadata.
pub fn verify_from(reader: &dyn StorageReader) -> Result<VerifyReport> {
    let metadata = reader.read_metadata()?;
    let data_bytes = metadata.files.iter().map(|file| file.len_bytes).sum();
    let damage = metadata.files.iter().flat_map(|file| file_damage(reader, file));
    let damage = damage.map(|error| error.naming_tensors(&metadata)).collect();
    Ok(VerifyReport { n_files: metadata.files.len(), data_bytes, damage })
}

fn file_damage(reader: &dyn StorageReader, meta: &FileMetadata) -> Vec<Error> {
    let file = match reader.open(meta) {
        Ok(file) => file,
        Err(error) => return vec![error],
    };
    file.will_read(std::iter::once(0..meta.len_bytes).collect());
    let n_blocks = meta.block_crcs.as_ref().map_or(0, Vec::len);
    let mut verified = Verified::default();
    (0..n_blocks).filter_map(|block| verified.block(0, block, meta, file.as_ref()).err()).collect()
}
