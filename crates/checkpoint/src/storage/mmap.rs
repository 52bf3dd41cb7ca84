//! Memory-mapped data files: the only unsafe file of this crate.
//!
//! A mapping is sound as long as nobody changes or shortens the file. No code can check that, so whoever wants mapped
//! reads says it ([`Access::mapped`]); the default is positional reads.

use std::fs::File;
use std::io::{Error, ErrorKind};

use memmap2::{Advice, Mmap};

use super::Access;

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

/// A whole file, mapped.
pub(super) struct Mapping(Mmap);

/// Maps a file for an [`Access`] that only [`Access::mapped`] makes.
pub(super) fn map_as_promised(file: &File) -> std::io::Result<Mapping> {
    // SAFETY: the file is not modified or truncated while it is mapped: the caller of `Access::mapped`, without which
    // no code gets here, has promised it for the length of the load, and the map is dropped with the load's reader.
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
