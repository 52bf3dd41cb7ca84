//! Format 1 in a directory of the local file system, or of one that all ranks mount.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sconce_dtensor::StateDict;

use super::commit::Staging;
use super::file::write_file;
use super::held::Held;
use super::place::Place;
use super::shards::{self, Shard};
use super::unchanged::{Division, Earlier};
use super::{Access, DataFile, LocalFile, StorageReader, StorageWriter, commit};
use crate::coordinate::Message as _;
use crate::format::{self, MANIFEST_NAME, manifest};
use crate::metadata::{FileMetadata, Metadata};
use crate::plan::{Layout, WritePlan, WrittenFile};
use crate::save::SaveReport;
use crate::{Error, Result};

/// Writes a checkpoint of format 1 beside its place and publishes it by one rename.
#[derive(Debug)]
pub struct FileSystemWriter {
    path: PathBuf,
    overwrite: bool,
    sync: bool,
    since: Option<PathBuf>,
    /// On the coordinator, while a save runs.
    staging: Option<Staging>,
    /// On the coordinator, while a save runs: so that nobody removes what the ranks link.
    earlier: Option<Earlier>,
}

/// Reads a checkpoint of format 1.
///
/// From its first call on it holds the checkpoint that is there then: nobody removes its files while the reader lives,
/// and when another takes its name, this one is read on.
#[derive(Debug, Clone)]
pub struct FileSystemReader {
    path: PathBuf,
    access: Access,
    held: OnceLock<Arc<Held>>,
}

impl FileSystemWriter {
    /// A writer for `path`; `overwrite` and `sync` as in [`SaveOptions`](crate::SaveOptions).
    pub fn new(path: impl Into<PathBuf>, overwrite: bool, sync: bool) -> Self {
        Self { path: path.into(), overwrite, sync, since: None, staging: None, earlier: None }
    }

    /// Links files of the earlier checkpoint at a path, of the same file system, that would be written again as they
    /// are. What did not change between two saves is written to files of its own, so that the saves after them link it.
    ///
    /// A file is linked only after every byte of it was read and compared with memory: a damaged one is written anew.
    /// Checkpoints that share a file share later damage to it, too. Where the file system has no hard links, and where
    /// the earlier checkpoint cannot be read, everything is written. Either may be removed without the other.
    pub fn since(self, earlier: impl Into<PathBuf>) -> Self {
        Self { since: Some(earlier.into()), ..self }
    }
}

impl FileSystemReader {
    /// A reader of the checkpoint at `path`.
    pub fn new(path: impl Into<PathBuf>, access: Access) -> Self {
        Self { path: path.into(), access, held: OnceLock::new() }
    }

    fn held(&self) -> Result<&Held> {
        if let Some(held) = self.held.get() {
            return Ok(held);
        }
        let held = Arc::new(Held::open(&self.path)?);
        Ok(self.held.get_or_init(|| held))
    }
}

impl StorageWriter for FileSystemWriter {
    fn prepare(&mut self, layout: &Layout) -> Result<Vec<u8>> {
        let staging = self.staging.insert(commit::prepare(&self.path, self.overwrite, self.sync)?);
        self.earlier = self.since.as_deref().and_then(Earlier::open);
        let since = self.since.as_deref().filter(|_| self.earlier.is_some());
        Place::encoded(staging, layout, since)
    }

    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>> {
        let place = Place::decode(place)?;
        let dir = place.dir();
        let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let earlier = place.since().and_then(|path| Earlier::open(&path));
        let Division { same, written } = match &earlier {
            Some(earlier) => earlier.divide(plan, &tensors)?,
            None => Division { same: Vec::new(), written: shards::split(plan, &tensors)? },
        };
        let n_files = same.len() + written.len();
        let mut names = (0..n_files).map(|nth| format::shard::file_name(plan.writer, nth, n_files));
        let write = |name: String, shard: &Shard<'_>| {
            let written = write_file(&dir.join(&name), &shard.contents, place.threads(), self.sync)?;
            Ok::<_, Error>(shard.written(name, written))
        };
        let mut files = Vec::with_capacity(n_files);
        if let Some(earlier) = &earlier {
            for ((nth, shard), name) in same.iter().zip(&mut names) {
                let is_linked = earlier.link(*nth, &dir.join(&name), self.sync)?;
                files.push(if is_linked {
                    shard.linked(name, earlier.file(*nth))
                } else {
                    write(name, shard)?
                });
            }
        }
        for (shard, name) in written.iter().zip(names) {
            files.push(write(name, shard)?);
        }
        Ok(files)
    }

    fn finish(&mut self, layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<SaveReport> {
        let Some(mut staging) = self.staging.take() else {
            unreachable!("the coordinator prepared the place before it finishes");
        };
        self.earlier = None;
        let linked = written.iter().flatten().filter(|file| file.is_linked);
        let linked_bytes = linked.map(|file| file.file.len_bytes).sum();
        let filled = Metadata::located(layout, written).and_then(|metadata| {
            staging.write_manifest(&manifest::encode(&metadata)?, self.sync)?;
            Ok(metadata)
        });
        let metadata = match filled {
            Ok(metadata) => metadata,
            Err(error) => {
                commit::abandon(staging);
                return Err(error);
            }
        };
        commit::publish(staging, &self.path, self.sync)?;
        let data_bytes = metadata.files.iter().map(|file| file.len_bytes).sum();
        Ok(SaveReport { data_bytes, n_files: metadata.files.len(), linked_bytes })
    }

    fn discard(&mut self) {
        self.earlier = None;
        if let Some(staging) = self.staging.take() {
            commit::abandon(staging);
        }
    }
}

impl StorageReader for FileSystemReader {
    /// # Errors
    /// `Missing`, `NotACheckpoint`, `Version`, `Corrupt`, `Busy`, `Io`.
    fn read_metadata(&self) -> Result<Metadata> {
        let file = self.path.join(MANIFEST_NAME);
        let bytes = self.held()?.manifest().map_err(|e| Error::io("read", &file, &e))?;
        manifest::decode(&file, &bytes)
    }

    /// # Errors
    /// `Io`, `Length`.
    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        let path = self.path.join(&file.name);
        let open = self.held()?.file(&file.name).map_err(|e| Error::io("open", &path, &e))?;
        Ok(Box::new(LocalFile::of(open, path, file.len_bytes, self.access)?))
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
