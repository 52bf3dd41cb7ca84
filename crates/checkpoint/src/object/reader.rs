//! The storage reader of object stores.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::prefix::{Prefix, Request};
use super::segments::{Segments, Source, Window};
use crate::format::{MANIFEST_NAME, manifest};
use crate::metadata::{FileMetadata, Metadata};
use crate::storage::{DataFile, StorageReader};
use crate::{Error, ObjectFailure, Result};

/// Loads a checkpoint of format 1 from an object store, or from any HTTP server that serves its directory.
///
/// Only what a rank wants is got: the blocks that it verifies, joined to ranges of up to [`Options::part_bytes`], several
/// at a time and ahead of the threads that wait for them.
///
/// [`Options::part_bytes`]: super::Options::part_bytes
#[derive(Debug, Clone)]
pub struct Reader {
    prefix: Prefix,
    window: Arc<Window>,
}

/// A data object.
struct ObjectFile {
    prefix: Prefix,
    name: String,
    path: PathBuf,
    len_bytes: u64,
    segments: Segments,
}

impl Reader {
    /// A reader of the checkpoint at a place.
    pub fn new(prefix: Prefix) -> Self {
        let window = Arc::new(Window::new(prefix.options().in_flight));
        Self { prefix, window }
    }
}

impl StorageReader for Reader {
    /// # Errors
    /// `Missing`, `ObjectStore`, `Version`, `Corrupt`, `NotACheckpoint`.
    fn read_metadata(&self) -> Result<Metadata> {
        metadata(&self.prefix)
    }

    /// Asks nothing of the store: what is missing or has another length is an error of the first read.
    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        Ok(Box::new(ObjectFile {
            prefix: self.prefix.clone(),
            name: file.name.clone(),
            path: self.prefix.url().join(&file.name),
            len_bytes: file.len_bytes,
            segments: Segments::new(Arc::clone(&self.window)),
        }))
    }

    fn path(&self) -> &Path {
        self.prefix.url()
    }
}

impl ObjectFile {
    /// Stores answer to a range beyond the end of an object in words of their own: that it has another length says more.
    fn explained(&self, error: Error) -> Error {
        if !matches!(error, Error::ObjectStore { failure: ObjectFailure::Broken, .. }) {
            return error;
        }
        match self.prefix.len_bytes(&self.name) {
            Ok(got) if got != self.len_bytes => {
                Error::Length { path: self.path.clone(), expected: self.len_bytes, got }
            }
            _ => error,
        }
    }
}

impl Source for ObjectFile {
    fn get(&self, range: Range<u64>) -> Request<(Bytes, u64)> {
        self.prefix.begin_get(&self.name, Some(range))
    }

    fn accept(&self, wanted: u64, (bytes, len_bytes): (Bytes, u64)) -> Result<Bytes> {
        let (path, expected, got) = (self.path.clone(), self.len_bytes, len_bytes);
        if got != expected {
            return Err(Error::Length { path, expected, got });
        }
        if bytes.len() as u64 != wanted {
            return Err(Error::Length { path, expected: wanted, got: bytes.len() as u64 });
        }
        Ok(bytes)
    }
}

/// The metadata of the checkpoint at a place.
pub(super) fn metadata(prefix: &Prefix) -> Result<Metadata> {
    let (bytes, _) = prefix.begin_get(MANIFEST_NAME, None).wait().map_err(|error| match error {
        Error::ObjectStore { failure: ObjectFailure::NotFound, .. } => {
            Error::Missing { path: prefix.url().to_owned() }
        }
        error => error,
    })?;
    manifest::decode(&prefix.url().join(MANIFEST_NAME), &bytes)
}

impl DataFile for ObjectFile {
    /// # Errors
    /// `ObjectStore`, `Length`.
    fn read_at(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()> {
        let piece_bytes = self.prefix.options().part_bytes;
        self.segments.read(offset_bytes, to, piece_bytes, self).map_err(|error| self.explained(error))
    }

    fn will_read(&self, ranges_bytes: Vec<Range<u64>>) {
        self.segments.expect(ranges_bytes, self.prefix.options().part_bytes);
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
