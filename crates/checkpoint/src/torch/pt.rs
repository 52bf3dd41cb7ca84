//! `.pt` and `.pth` files: a state dict that `torch.save` wrote.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::pickle::Unlisted;
use super::saved::{self, Saved, StoredTensor};
use super::tensors::{TensorFile, tensor_metadata};
use crate::metadata::{FileMetadata, Metadata};
use crate::region::Region;
use crate::storage::{DataFile, StorageReader};
use crate::tree::Node;
use crate::{Error, Result};

/// Reads a file that `torch.save` wrote: a dict of tensors, numbers, text, and nested dicts and lists of them.
///
/// # Source
/// `torch.load(path, weights_only=True)`.
#[derive(Debug)]
pub struct PtReader {
    path: PathBuf,
    unlisted: Unlisted,
    /// Tensors that do not lie in row-major order, by the names of their files.
    strided: Mutex<HashMap<String, StoredTensor>>,
}

impl PtReader {
    /// A reader of the file at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), unlisted: Unlisted::Refused, strided: Mutex::default() }
    }

    /// A reader of the tensors alone: other values, whatever their classes, are not there. Nothing of them runs.
    pub fn tensors_only(path: impl Into<PathBuf>) -> Self {
        Self { unlisted: Unlisted::Opaque, ..Self::new(path) }
    }
}

impl StorageReader for PtReader {
    /// # Errors
    /// `Missing`, `NotACheckpoint`, `Refused`, `Corrupt`, `Io`.
    fn read_metadata(&self) -> Result<Metadata> {
        if !self.path.exists() {
            return Err(Error::Missing { path: self.path.clone() });
        }
        let file = Region::open(&self.path, true)?;
        let len_bytes = file.len();
        let Saved { tree, tensors: stored } = saved::read(file, "", self.unlisted)?;
        if !matches!(tree, Node::Map(_)) {
            let reason = "it holds no dict".to_owned();
            return Err(Error::NotACheckpoint { path: self.path.clone(), reason });
        }
        let tree = if self.unlisted == Unlisted::Opaque { tree.tensors_only() } else { tree };
        let name = self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut files = vec![FileMetadata { name: name.clone(), len_bytes, block_crcs: None }];
        let (mut tensors, mut strided) = (Vec::with_capacity(stored.len()), HashMap::new());
        for (fqn, stored) in stored {
            if stored.is_contiguous() {
                tensors.push(tensor_metadata(fqn, &stored, 0, stored.storage().start()));
                continue;
            }
            let name = format!("{name}#{}", files.len());
            tensors.push(tensor_metadata(fqn, &stored, files.len(), 0));
            files.push(FileMetadata { name: name.clone(), len_bytes: stored.len_bytes(), block_crcs: None });
            strided.insert(name, stored);
        }
        tensors.sort_by(|a, b| a.fqn.cmp(&b.fqn));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].fqn == pair[1].fqn) {
            return Err(Error::refused(&self.path, 0, format!("two tensors of the name {}", pair[0].fqn)));
        }
        *self.strided.lock().unwrap_or_else(PoisonError::into_inner) = strided;
        Ok(Metadata { tensors, files, tree })
    }

    /// # Errors
    /// `Io`.
    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        let strided = self.strided.lock().unwrap_or_else(PoisonError::into_inner);
        match strided.get(&file.name) {
            Some(stored) => Ok(Box::new(TensorFile::new(stored.clone()))),
            None => Ok(Box::new(crate::storage::LocalFile::open(
                &self.path,
                file.len_bytes,
                crate::storage::Access::positional(),
            )?)),
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
