//! Format 1 in a directory of the local file system, or of one that all ranks mount.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use sconce_dtensor::{Fqn, LocalTensor, StateDict};

use super::file::BlockWriter;
use super::local_file::open_regular;
use super::{Access, DataFile, LocalFile, StorageReader, StorageWriter, commit};
use crate::format::{MANIFEST_NAME, manifest, shard};
use crate::metadata::{FileMetadata, Metadata};
use crate::plan::{Layout, WriteItem, WritePlan, WrittenFile, WrittenItem};
use crate::save::SaveReport;
use crate::{Error, Result};

/// Writes a checkpoint of format 1 beside its place and publishes it by one rename.
#[derive(Debug, Clone)]
pub struct FileSystemWriter {
    path: PathBuf,
    overwrite: bool,
    sync: bool,
    /// On the coordinator, while a save runs.
    staging: Option<PathBuf>,
}

/// Reads a checkpoint of format 1.
#[derive(Debug, Clone)]
pub struct FileSystemReader {
    path: PathBuf,
    access: Access,
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
        Self { path: path.into(), access }
    }
}

impl StorageWriter for FileSystemWriter {
    fn prepare(&mut self, _: &Layout) -> Result<Vec<u8>> {
        let staging = self.staging.insert(commit::prepare(&self.path, self.overwrite)?);
        Ok(staging.as_os_str().as_bytes().to_vec())
    }

    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>> {
        let staging = Path::new(OsStr::from_bytes(place));
        let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let files = split_by_file(&plan.items);
        let write = |(nth, items): (usize, &Vec<usize>)| {
            let name = shard::file_name(plan.writer, nth, files.len());
            write_shard(staging, name, &plan.items, items, &tensors, self.sync)
        };
        files.iter().enumerate().map(write).collect()
    }

    fn finish(&mut self, layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<SaveReport> {
        let Some(staging) = &self.staging else {
            unreachable!("the coordinator prepared the place before it finishes");
        };
        let metadata = Metadata::located(layout, written)?;
        let mut writer = BlockWriter::create(&staging.join(MANIFEST_NAME))?;
        writer.write(&manifest::encode(&metadata)?)?;
        writer.finish(self.sync)?;
        commit::publish(staging, &self.path, self.sync)?;
        self.staging = None;
        let data_bytes = metadata.files.iter().map(|file| file.len_bytes).sum();
        Ok(SaveReport { data_bytes, n_files: metadata.files.len() })
    }

    fn discard(&mut self) {
        if let Some(staging) = self.staging.take() {
            commit::discard(&staging);
        }
    }
}

impl StorageReader for FileSystemReader {
    /// # Errors
    /// `Missing`, `NotACheckpoint`, `Version`, `Corrupt`, `Io`.
    fn read_metadata(&self) -> Result<Metadata> {
        let file = self.path.join(MANIFEST_NAME);
        match read_regular(&file) {
            Ok(bytes) => manifest::decode(&file, &bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !self.path.exists() => {
                Err(Error::Missing { path: self.path.clone() })
            }
            Err(e)
                if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
            {
                let reason =
                    format!("it has no {MANIFEST_NAME}: it was never committed, or is something else");
                Err(Error::NotACheckpoint { path: self.path.clone(), reason })
            }
            Err(e) => Err(Error::io("read", &file, &e)),
        }
    }

    /// # Errors
    /// `Io`, `Length`.
    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        Ok(Box::new(LocalFile::open(self.path.join(&file.name), file.len_bytes, self.access)?))
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

fn read_regular(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = open_regular(path)?;
    let mut bytes = Vec::with_capacity(usize::try_from(file.metadata()?.len()).unwrap_or(0));
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
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

fn write_shard(
    staging: &Path,
    name: String,
    plan: &[WriteItem],
    positions: &[usize],
    tensors: &Tensors<'_, '_>,
    sync: bool,
) -> Result<WrittenFile> {
    let mut items = positions
        .iter()
        .map(|item| tensor_of(tensors, &plan[*item]).map(|tensor| (*item, tensor)))
        .collect::<Result<Vec<_>>>()?;
    shard::order(&mut items, |(_, tensor)| tensor.dtype());
    let entry = |(item, tensor): &(usize, &dyn LocalTensor)| shard::Entry {
        fqn: plan[*item].fqn.clone(),
        dtype: tensor.dtype(),
        bounds: tensor.local_boxes()[plan[*item].index].clone(),
    };
    let (header, starts) = shard::header(&items.iter().map(entry).collect::<Vec<_>>())?;
    let mut writer = BlockWriter::create(&staging.join(&name))?;
    writer.write(&header)?;
    for (item, tensor) in &items {
        let WriteItem { fqn, index } = &plan[*item];
        let mut outcome = Ok(());
        let lent = tensor.read_box(*index, &mut |bytes| outcome = writer.write(bytes));
        lent.map_err(|error| Error::tensor(fqn, &error))?;
        outcome?;
    }
    let (len_bytes, block_crcs) = writer.finish(sync)?;
    let items = items.iter().zip(starts);
    let items = items.map(|((item, _), offset_bytes)| WrittenItem { item: *item, offset_bytes }).collect();
    Ok(WrittenFile { file: FileMetadata { name, len_bytes, block_crcs: Some(block_crcs) }, items })
}

fn tensor_of<'t>(tensors: &'t Tensors<'_, '_>, item: &WriteItem) -> Result<&'t dyn LocalTensor> {
    let tensor = tensors.get(&Fqn(item.fqn.clone())).copied();
    tensor.filter(|tensor| item.index < tensor.local_boxes().len()).ok_or_else(|| Error::Tensor {
        fqn: item.fqn.clone(),
        cause: format!("the plan asks for box {}, which this rank does not hold", item.index),
    })
}
