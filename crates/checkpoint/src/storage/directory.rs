//! Format 1 in a directory of the local file system, or of one that all ranks mount.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use indexmap::IndexMap;
use sconce_dtensor::{Fqn, LocalTensor, StateDict, box_len_bytes};

use super::commit::Staging;
use super::file::{Contents, Piece, write_file};
use super::held::Held;
use super::{Access, DataFile, LocalFile, StorageReader, StorageWriter, commit};
use crate::format::{MANIFEST_NAME, manifest, shard};
use crate::metadata::{FileMetadata, Metadata};
use crate::plan::{Layout, WriteItem, WritePlan, WrittenFile, WrittenItem};
use crate::save::SaveReport;
use crate::{Error, Result};

/// Writes a checkpoint of format 1 beside its place and publishes it by one rename.
#[derive(Debug)]
pub struct FileSystemWriter {
    path: PathBuf,
    overwrite: bool,
    sync: bool,
    /// On the coordinator, while a save runs.
    staging: Option<Staging>,
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
        Self { path: path.into(), overwrite, sync, staging: None }
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
        let writers: HashSet<usize> =
            layout.tensors.iter().flat_map(|t| &t.chunks).map(|c| c.writer).collect();
        let n_writers = (writers.len() as u64).to_le_bytes();
        Ok([&n_writers[..], staging.dir().as_os_str().as_bytes()].concat())
    }

    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>> {
        let Some((n_writers, staging)) = place.split_first_chunk() else {
            unreachable!("the place is what `prepare` returned");
        };
        let threads = threads_of(u64::from_le_bytes(*n_writers));
        let staging = Path::new(OsStr::from_bytes(staging));
        let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let files = split_by_file(&plan.items);
        let write = |(nth, items): (usize, &Vec<usize>)| {
            let name = shard::file_name(plan.writer, nth, files.len());
            let shard = Shard { plan: &plan.items, positions: items, tensors: &tensors };
            shard.write(staging, name, threads, self.sync)
        };
        files.iter().enumerate().map(write).collect()
    }

    fn finish(&mut self, layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<SaveReport> {
        let Some(mut staging) = self.staging.take() else {
            unreachable!("the coordinator prepared the place before it finishes");
        };
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
        Ok(SaveReport { data_bytes, n_files: metadata.files.len() })
    }

    fn discard(&mut self) {
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

/// Positions of the items of each file: the k-th box of a tensor goes to the k-th file.
fn split_by_file(items: &[WriteItem]) -> Vec<Vec<usize>> {
    let mut files: Vec<Vec<usize>> = Vec::new();
    let mut seen = HashMap::<&str, usize>::new();
    for (item, WriteItem { fqn, .. }) in items.iter().enumerate() {
        let nth = seen.entry(fqn).or_default();
        if *nth == files.len() {
            files.push(Vec::new());
        }
        files[*nth].push(item);
        *nth += 1;
    }
    files
}

type Tensors<'s, 'a> = IndexMap<Fqn, &'s (dyn LocalTensor + 'a)>;

/// One data file of this rank.
struct Shard<'p> {
    plan: &'p [WriteItem],
    /// Its items' positions in the plan.
    positions: &'p [usize],
    tensors: &'p Tensors<'p, 'p>,
}

impl Shard<'_> {
    fn write(&self, staging: &Path, name: String, threads: usize, sync: bool) -> Result<WrittenFile> {
        let of = |item: &usize| tensor_of(self.tensors, &self.plan[*item]).map(|tensor| (*item, tensor));
        let mut items = self.positions.iter().map(of).collect::<Result<Vec<_>>>()?;
        shard::order(&mut items, |(_, tensor)| tensor.dtype());
        let entry = |(item, tensor): &(usize, &dyn LocalTensor)| shard::Entry {
            fqn: self.plan[*item].fqn.clone(),
            dtype: tensor.dtype(),
            bounds: tensor.local_boxes()[self.plan[*item].index].clone(),
        };
        let (header, starts) = shard::header(&items.iter().map(entry).collect::<Vec<_>>())?;
        let piece = |((item, tensor), start): (&(usize, _), &u64)| {
            let (tensor, WriteItem { fqn, index }): (&dyn LocalTensor, _) = (*tensor, &self.plan[*item]);
            let bytes = *start..start + box_len_bytes(tensor, *index) as u64;
            Piece { fqn, tensor, index: *index, bytes }
        };
        let pieces = items.iter().zip(&starts).map(piece).collect();
        let written = write_file(&staging.join(&name), &Contents { header, pieces }, threads, sync)?;
        let (len_bytes, block_crcs) = written;
        let items = items.iter().zip(starts);
        let items =
            items.map(|((item, _), offset_bytes)| WrittenItem { item: *item, offset_bytes }).collect();
        Ok(WrittenFile { file: FileMetadata { name, len_bytes, block_crcs: Some(block_crcs) }, items })
    }
}

/// This rank's share of the cores, as if all that write were on one host.
fn threads_of(n_writers: u64) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / n_writers.max(1) as usize).clamp(1, 8)
}

fn tensor_of<'t>(tensors: &'t Tensors<'_, '_>, item: &WriteItem) -> Result<&'t dyn LocalTensor> {
    let tensor = tensors.get(&Fqn(item.fqn.clone())).copied();
    tensor.filter(|tensor| item.index < tensor.local_boxes().len()).ok_or_else(|| Error::Tensor {
        fqn: item.fqn.clone(),
        cause: format!("the plan asks for box {}, which this rank does not hold", item.index),
    })
}
