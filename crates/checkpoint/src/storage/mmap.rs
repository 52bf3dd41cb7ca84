//! Memory-mapped data files: the only unsafe file of this crate.
//!
//! A mapping is sound as long as nobody changes or shortens the file. No code can check that, so whoever wants mapped
//! reads says it ([`Access::mapped`]); the default is positional reads.

use std::fs::File;
use std::io::{Error, ErrorKind};

use memmap2::{Advice, Mmap};

use super::{Access, FileSystemReader};
use crate::view::MappedCheckpoint;

impl Access {
    /// Reads through a memory map: one copy fewer for the checksums.
    ///
    /// # Safety
    /// - Nobody writes to, truncates or replaces in place a file of the checkpoint while it is being loaded. Sconce
    ///   itself never does: it publishes new directories by renaming.
    pub unsafe fn mapped() -> Self {
        Self::of_mapped_files()
    }
}

impl MappedCheckpoint {
    /// Opens the checkpoint at `path`.
    ///
    /// # Safety
    /// - Nobody writes to, truncates or replaces in place a file of the checkpoint while this value lives. Sconce itself
    ///   never does: it publishes new directories by renaming, and removes none that is open here.
    ///
    /// # Errors
    /// `Missing`, `NotACheckpoint`, `Version`, `Corrupt`, `Busy`, `Io`.
    pub unsafe fn open(path: impl AsRef<std::path::Path>) -> crate::Result<Self> {
        Self::of(FileSystemReader::new(path.as_ref(), Access::of_mapped_files()))
    }
}

/// A whole file, mapped.
pub(super) struct Mapping(Mmap);

/// Maps a file for an [`Access`] that only [`Access::mapped`] and [`MappedCheckpoint::open`] make.
pub(super) fn map_as_promised(file: &File) -> std::io::Result<Mapping> {
    // SAFETY: the file is not modified or truncated while it is mapped: the caller of `Access::mapped` or
    // `MappedCheckpoint::open`, without which no code gets here, has promised it for the length of the load or the life
    // of the checkpoint, and the map is dropped with the load's reader or with the checkpoint.
    let map = unsafe { Mmap::map(file) }?;
    // A hint; without it the same bytes are read.
    let _ = map.advise(Advice::Sequential);
    Ok(Mapping(map))
}

impl Mapping {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn read(&self, offset_bytes: u64, to: &mut [u8]) -> std::io::Result<()> {
        let start = usize::try_from(offset_bytes).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(to.len())?));
        let bytes = range.and_then(|range| self.0.get(range));
        to.copy_from_slice(bytes.ok_or_else(|| Error::from(ErrorKind::UnexpectedEof))?);
        Ok(())
    }
}
