//! The storage writer of object stores: every rank puts its files, the coordinator the manifest.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher};

use bytes::Bytes;
use sconce_dtensor::StateDict;

use super::prefix::Prefix;
use super::upload::put_file;
use crate::format::{MANIFEST_NAME, manifest, shard};
use crate::metadata::Metadata;
use crate::plan::{Layout, WritePlan, WrittenFile};
use crate::save::SaveReport;
use crate::storage::{StorageWriter, shards};
use crate::{Error, ObjectFailure, Result};

/// Saves a checkpoint in an object store.
///
/// Data objects get names that no other save has, and the manifest is put last, whole, by one request: until then, and
/// after any failure, an earlier checkpoint at the place is what it was, and after it the new one is there. The objects
/// that only the earlier one had are removed then.
///
/// What a store without locks cannot promise: of two savers at one place the later manifest wins, whole (with
/// `overwrite` off the second is refused, where the store has conditional puts); and who reads a checkpoint that is
/// replaced meanwhile gets an error. A place for each step, as [`Prefix::child`] makes them, knows neither.
///
/// A killed save leaves objects that no manifest names, and parts of uploads that are no objects. [`Writer::sweep`]
/// removes the former, the store's own rules for unfinished uploads the latter.
///
/// ```
/// use std::sync::Arc;
/// use sconce_checkpoint::object::{Options, Prefix, Reader, Writer, object_store::memory::InMemory};
/// use sconce_checkpoint::{DefaultSavePlanner, LoadOptions, load_new_from, save_to};
/// use sconce_dtensor::{DType, StateDict, TensorBuf};
///
/// let runs = Prefix::new(Arc::new(InMemory::new()), "runs/a", Options::default())?;
/// let place = runs.child("step-000100")?;
/// let mut state = StateDict::new();
/// state.insert_tensor("w", TensorBuf::new(DType::U8, &[2], vec![1, 2])?);
/// save_to(&mut Writer::new(place.clone(), false), &mut DefaultSavePlanner, &state, None)?;
/// let loaded = load_new_from(&Reader::new(place), LoadOptions::default())?;
/// assert_eq!(loaded.tensor::<TensorBuf>("w").map(|w| w.bytes()), Some(&[1, 2][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Source
/// `torch.distributed.checkpoint.FsspecWriter`, which puts the metadata last too, under names that every save has.
#[derive(Debug)]
pub struct Writer {
    prefix: Prefix,
    overwrite: bool,
    /// On the coordinator, while a save runs.
    save: Option<Save>,
}

/// What the coordinator knows of the save that runs.
#[derive(Debug)]
struct Save {
    /// What its objects have in their names.
    id: String,
    /// Names of the objects of the checkpoint that is replaced.
    replaced: Vec<String>,
}

impl Writer {
    /// A writer for a place; `overwrite`: whether a checkpoint there is replaced.
    pub fn new(prefix: Prefix, overwrite: bool) -> Self {
        Self { prefix, overwrite, save: None }
    }

    /// Removes data objects at the place that its checkpoint does not have: what killed saves left. The caller knows that
    /// nobody saves there now. The number of objects removed.
    ///
    /// # Errors
    /// `ObjectStore`, `Version`, `Corrupt`.
    pub fn sweep(&self) -> Result<usize> {
        let named: HashSet<String> = self.named()?.unwrap_or_default().into_iter().collect();
        let found = self.prefix.names()?;
        let stale = found.iter().filter(|name| shard::is_file_name(name) && !named.contains(*name));
        stale.map(|name| self.prefix.delete(name)).try_fold(0, |n, removed| removed.map(|()| n + 1))
    }

    /// The names of the data objects of the checkpoint at the place; `None` if there is no checkpoint.
    fn named(&self) -> Result<Option<Vec<String>>> {
        match super::reader::metadata(&self.prefix) {
            Ok(metadata) => Ok(Some(metadata.files.into_iter().map(|file| file.name).collect())),
            Err(Error::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is at the place, if it may be replaced.
    fn replaced(&self) -> Result<Vec<String>> {
        match self.named() {
            Ok(None) => Ok(Vec::new()),
            _ if !self.overwrite => {
                Err(Error::AlreadyExists { path: self.prefix.url().to_owned(), is_checkpoint: true })
            }
            Ok(Some(names)) => Ok(names),
            // A damaged manifest is replaced, and names nothing that could be removed.
            Err(error) if error.is_damage() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn put_manifest(&self, bytes: Vec<u8>) -> Result<()> {
        let bytes = Bytes::from(bytes);
        if self.overwrite {
            return self.prefix.put(MANIFEST_NAME, bytes);
        }
        match self.prefix.create(MANIFEST_NAME, bytes.clone()) {
            Ok(true) => Ok(()),
            // The answer to a first attempt may be lost, and the second then finds what the first put.
            Ok(false) => {
                let (there, _) = self.prefix.begin_get(MANIFEST_NAME, None).wait()?;
                let path = || self.prefix.url().to_owned();
                let is_mine = there == bytes;
                is_mine
                    .then_some(())
                    .ok_or_else(|| Error::AlreadyExists { path: path(), is_checkpoint: true })
            }
            // Not every store has conditional puts; `prepare` looked.
            Err(Error::ObjectStore { failure: ObjectFailure::Unsupported, .. }) => {
                self.prefix.put(MANIFEST_NAME, bytes)
            }
            Err(error) => Err(error),
        }
    }
}

impl StorageWriter for Writer {
    /// # Errors
    /// `AlreadyExists`, `ObjectStore`, `Version`.
    fn prepare(&mut self, _: &Layout) -> Result<Vec<u8>> {
        let replaced = self.replaced()?;
        let id = new_id();
        self.save = Some(Save { id: id.clone(), replaced });
        Ok(id.into_bytes())
    }

    /// # Errors
    /// `ObjectStore`, `Tensor`.
    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>> {
        let id = String::from_utf8_lossy(place);
        let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let files = shards::split(plan, &tensors)?;
        let write = |(nth, shard): (usize, &shards::Shard<'_>)| {
            let name = named_for(&shard::file_name(plan.writer, nth, files.len()), &id);
            let written = put_file(&self.prefix, &name, &shard.contents)?;
            Ok(shard.written(name, written))
        };
        files.iter().enumerate().map(write).collect()
    }

    /// # Errors
    /// `AlreadyExists` if another saver was faster; `ObjectStore`.
    fn finish(&mut self, layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<SaveReport> {
        let metadata = Metadata::located(layout, written)?;
        self.put_manifest(manifest::encode(&metadata)?)?;
        let replaced = self.save.take().map(|save| save.replaced).unwrap_or_default();
        // Best effort: the checkpoint is there, and `sweep` finds what is left.
        replaced.iter().for_each(|name| drop(self.prefix.delete(name)));
        let data_bytes = metadata.files.iter().map(|file| file.len_bytes).sum();
        Ok(SaveReport { data_bytes, n_files: metadata.files.len(), linked_bytes: 0 })
    }

    fn discard(&mut self) {
        let Some(Save { id, .. }) = self.save.take() else { return };
        // The put of the manifest may have succeeded though its answer was lost: then the objects are a checkpoint's.
        let Ok(named) = self.named() else { return };
        let named = named.unwrap_or_default();
        let suffix = named_for(".safetensors", &id);
        if let Ok(names) = self.prefix.names() {
            let mine = names.iter().filter(|name| name.ends_with(&suffix) && !named.contains(name));
            mine.for_each(|name| drop(self.prefix.delete(name)));
        }
    }
}

/// `shard-….safetensors` as `shard-….<id>.safetensors`.
fn named_for(name: &str, id: &str) -> String {
    let stem = name.strip_suffix(".safetensors").unwrap_or(name);
    format!("{stem}.{id}.safetensors")
}

/// 128 bits that no other save has: of the time, the process and the system's randomness.
fn new_id() -> String {
    let half = || {
        let mut hasher = std::hash::RandomState::new().build_hasher();
        hasher.write_u32(std::process::id());
        hasher.write_u128(std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos()));
        hasher.finish()
    };
    format!("{:016x}{:016x}", half(), half())
}
