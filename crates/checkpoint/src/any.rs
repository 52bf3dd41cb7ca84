//! A reader for whatever is at a path: the format is found by looking.

use std::path::Path;

use crate::storage::{Access, FileSystemReader, StorageReader};
use crate::{Error, MANIFEST_NAME, Result, hf};

/// The formats that are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Our own directory: safetensors and a manifest.
    Sconce,
    /// Safetensors alone: a file or a directory.
    Safetensors,
    /// A directory of `torch.distributed.checkpoint`.
    TorchDcp,
    /// A file of `torch.save`.
    TorchSave,
}

impl Format {
    /// The format of what is at `path`.
    ///
    /// # Errors
    /// `Missing`, `NotACheckpoint`.
    pub fn of(path: &Path) -> Result<Format> {
        let found = std::fs::metadata(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { path: path.to_owned() },
            _ => Error::io("look at", path, &e),
        })?;
        if found.is_file() {
            let is_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
            return Ok(if is_safetensors { Format::Safetensors } else { Format::TorchSave });
        }
        if path.join(MANIFEST_NAME).exists() {
            return Ok(Format::Sconce);
        }
        // The second is what rank 0 writes where each rank saves alone.
        if [".metadata", "__0.metadata"].iter().any(|name| std::fs::symlink_metadata(path.join(name)).is_ok())
        {
            return Ok(Format::TorchDcp);
        }
        let has_safetensors = std::fs::read_dir(path)
            .map_err(|e| Error::io("list", path, &e))?
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().ends_with(".safetensors"));
        if has_safetensors {
            return Ok(Format::Safetensors);
        }
        let reason = format!("it has no {MANIFEST_NAME}, no .metadata and no *.safetensors");
        Err(Error::NotACheckpoint { path: path.to_owned(), reason })
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Sconce => "sconce",
            Format::Safetensors => "safetensors",
            Format::TorchDcp => "torch",
            Format::TorchSave => "torch.save",
        }
    }
}

/// A reader of whatever checkpoint is at `path`.
///
/// # Errors
/// `Missing`, `NotACheckpoint`; torch's formats need the feature `torch`.
pub fn open(path: impl AsRef<Path>) -> Result<Box<dyn StorageReader>> {
    let path = path.as_ref();
    match Format::of(path)? {
        Format::Sconce => Ok(Box::new(FileSystemReader::new(path, Access::positional()))),
        Format::Safetensors => Ok(Box::new(hf::Reader::new(path))),
        torch => open_torch(path, torch),
    }
}

#[cfg(feature = "torch")]
fn open_torch(path: &Path, format: Format) -> Result<Box<dyn StorageReader>> {
    Ok(match format {
        Format::TorchDcp => Box::new(crate::torch::Reader::new(path)),
        _ => Box::new(crate::torch::PtReader::new(path)),
    })
}

#[cfg(not(feature = "torch"))]
fn open_torch(path: &Path, _: Format) -> Result<Box<dyn StorageReader>> {
    let reason =
        "it may be one of torch's, which this build does not read: its feature `torch` is off".to_owned();
    Err(Error::NotACheckpoint { path: path.to_owned(), reason })
}
