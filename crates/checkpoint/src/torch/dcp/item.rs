//! One item of a `.distcp` file: found, decompressed and put in order when it is first read.

use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use sconce_dtensor::{DType, TensorBox};

use super::metadata::Place;
use crate::hf::header;
use crate::region::{Region, Sequential};
use crate::storage::DataFile;
use crate::torch::pickle::Unlisted;
use crate::torch::saved::{self, Saved, StoredTensor};
use crate::tree::Node;
use crate::{Error, Result};

/// The descriptor of torch's own extension, up to its version.
const ZSTD: &str = "stream.zstd/1";
/// What an archive may take beside its tensor.
const ARCHIVE_BYTES: u64 = 1 << 20;
/// The longest value that is decompressed.
pub(super) const MAX_VALUE_BYTES: u64 = 1 << 30;

/// A chunk that is to be read.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub(super) fqn: String,
    pub(super) dtype: DType,
    pub(super) bounds: TensorBox,
    pub(super) place: Place,
}

/// A chunk's bytes in row-major order.
pub(super) enum ChunkFile {
    /// They lie so in the file.
    InPlace(Region),
    /// They are made when they are read, and kept until the last of them was.
    Made { chunk: Chunk, file: Region, bytes: Mutex<Option<Region>> },
}

impl Chunk {
    pub(super) fn len_bytes(&self) -> u64 {
        (self.bounds.numel() * self.dtype.size_bytes()) as u64
    }

    /// How long its archive may be.
    pub(super) fn most_archive_bytes(&self) -> u64 {
        self.len_bytes() + ARCHIVE_BYTES
    }

    /// Finds the chunk in its file.
    ///
    /// # Errors
    /// `Refused`, `Corrupt`, `Io`; `ShapeMismatch`, `DTypeMismatch` if the file holds another tensor.
    pub(super) fn open(&self, file: &Region) -> Result<ChunkFile> {
        if !self.place.transforms.is_empty() {
            return Ok(ChunkFile::Made { chunk: self.clone(), file: file.clone(), bytes: Mutex::new(None) });
        }
        if let Some(image) = safetensors_image(file, &self.place)? {
            return self.in_image(&image).map(ChunkFile::InPlace);
        }
        let stored = self.in_archive(part(file, &self.place)?)?;
        if stored.is_contiguous() {
            return Ok(ChunkFile::InPlace(stored.storage().clone()));
        }
        let bytes = Mutex::new(None);
        Ok(ChunkFile::Made { chunk: self.clone(), file: file.clone(), bytes })
    }

    fn in_archive(&self, region: Region) -> Result<StoredTensor> {
        let path = region.owned_path();
        let Saved { tree, mut tensors } = saved::read(region, "", Unlisted::Refused)?;
        let Some((_, stored)) = tensors.pop().filter(|_| tree == Node::Tensor) else {
            return Err(Error::refused(
                &path,
                self.place.offset_bytes,
                format!("{}: an item that is no tensor", self.fqn),
            ));
        };
        self.check(stored.dtype, &stored.shape)?;
        Ok(stored)
    }

    fn in_image(&self, image: &Region) -> Result<Region> {
        let entries = header::read(image)?;
        let Some(entry) = entries.tensors.iter().find(|entry| entry.fqn == self.fqn) else {
            return Err(Error::refused(
                image.path(),
                image.start(),
                format!("{}: not in the safetensors image", self.fqn),
            ));
        };
        self.check(entry.dtype, &entry.shape)?;
        // Torch keeps one chunk of a tensor in each image, the last that it was given.
        if entry.offsets.as_ref().is_some_and(|offsets| *offsets != self.bounds.offsets) {
            let what = format!(
                "{}: its chunk {} was lost when torch wrote another under its name",
                self.fqn, self.bounds
            );
            return Err(Error::refused(image.path(), image.start(), what));
        }
        Ok(entry.data.clone())
    }

    fn check(&self, dtype: DType, shape: &[usize]) -> Result<()> {
        if dtype != self.dtype {
            return Err(Error::dtypes(&self.fqn, self.dtype, dtype));
        }
        if shape != self.bounds.sizes {
            let (expected, got) = (self.bounds.sizes.clone(), shape.to_vec());
            return Err(Error::ShapeMismatch { fqn: self.fqn.clone(), expected, got });
        }
        Ok(())
    }

    fn make(&self, file: &Region) -> Result<Region> {
        let region = decompressed(part(file, &self.place)?, &self.place, self.most_archive_bytes())?;
        let path = region.owned_path();
        let stored = self.in_archive(region)?;
        if stored.is_contiguous() {
            return Ok(stored.storage().clone());
        }
        Ok(Region::of_memory(stored.row_major()?, &path))
    }
}

/// A value that is no tensor, and the tensors that it holds all the same.
///
/// # Errors
/// `Refused`, `Corrupt`, `Io`.
pub(super) fn read_value(file: &Region, fqn: &str, place: &Place) -> Result<Saved> {
    saved::read(decompressed(part(file, place)?, place, MAX_VALUE_BYTES)?, fqn, Unlisted::Refused)
}

/// An item's bytes as they lie in the file; `None` if it is part of a safetensors image.
pub(in crate::torch) fn item_region(file: &Region, place: &Place) -> Result<Option<Region>> {
    if place.transforms.is_empty() && safetensors_image(file, place)?.is_some() {
        return Ok(None);
    }
    part(file, place).map(Some)
}

fn part(file: &Region, place: &Place) -> Result<Region> {
    file.part(place.offset_bytes, place.len_bytes).ok_or_else(|| Error::Length {
        path: file.owned_path(),
        expected: place.offset_bytes.saturating_add(place.len_bytes),
        got: file.len(),
    })
}

/// The safetensors image that begins where the item does, if one does.
fn safetensors_image(file: &Region, place: &Place) -> Result<Option<Region>> {
    let Some(rest) = file.len().checked_sub(place.offset_bytes).filter(|rest| *rest >= 10) else {
        return Ok(None);
    };
    let mut first = [0; 9];
    file.read(place.offset_bytes, &mut first)?;
    let is_image = first[8] == b'{' && !first.starts_with(b"PK");
    Ok(file.part(place.offset_bytes, rest).filter(|_| is_image))
}

/// An item's bytes as they were before they were compressed, `limit` at most.
pub(in crate::torch) fn decompressed(region: Region, place: &Place, limit: u64) -> Result<Region> {
    match &place.transforms[..] {
        [] => return Ok(region),
        [only] if only == ZSTD || only.starts_with("stream.zstd/1.") => {}
        others => {
            return Err(Error::refused(
                region.path(),
                region.start(),
                format!("items transformed by {others:?}"),
            ));
        }
    }
    let path = region.owned_path();
    let bad = |got: String| Error::Corrupt {
        path: path.clone(),
        what: "a zstd stream".to_owned(),
        offset_bytes: place.offset_bytes,
        fqns: Vec::new(),
        expected: format!("at most {limit} bytes"),
        got,
    };
    let mut bytes = Vec::new();
    let mut source = Sequential { region: region.clone(), at: 0 };
    // Writers that flush leave several frames.
    while source.at < region.len() {
        let frame = ruzstd::decoding::StreamingDecoder::new(&mut source).map_err(|e| bad(e.to_string()))?;
        let room = (limit + 1).saturating_sub(bytes.len() as u64);
        frame.take(room).read_to_end(&mut bytes).map_err(|e| bad(e.to_string()))?;
        if bytes.len() as u64 > limit {
            return Err(bad("more".to_owned()));
        }
    }
    Ok(Region::of_memory(bytes, &path))
}

impl DataFile for ChunkFile {
    fn read_at(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()> {
        match self {
            ChunkFile::InPlace(region) => region.read(offset_bytes, to),
            ChunkFile::Made { chunk, file, bytes } => {
                let mut kept = bytes.lock().unwrap_or_else(PoisonError::into_inner);
                let made = match kept.take() {
                    Some(made) => made,
                    None => chunk.make(file)?,
                };
                made.read(offset_bytes, to)?;
                if offset_bytes + (to.len() as u64) < made.len() {
                    *kept = Some(made);
                }
                Ok(())
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            ChunkFile::InPlace(region) => region.path(),
            ChunkFile::Made { file, .. } => file.path(),
        }
    }
}
