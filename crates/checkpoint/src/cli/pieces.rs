//! Tensors of a checkpoint as they lie there, read in pieces of bounded size.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use sconce_dtensor::{DType, LocalTensor, TensorBox, run_boxes};

use super::args::Values;
use crate::metadata::{Metadata, TensorStorageMetadata};
use crate::read::{BoxReader, OpenTensor, Verified};
use crate::storage::StorageReader;
use crate::{Format, Result, torch};

/// What is held of a tensor at a time: a block, and what is left of the one before it if that is short.
const PIECE_BYTES: usize = crate::BLOCK_BYTES as usize;
const SHORT_BYTES: usize = PIECE_BYTES / 4;

/// A checkpoint that was opened, and what it holds.
pub(super) struct Source {
    reader: Box<dyn StorageReader>,
    pub(super) metadata: Arc<Metadata>,
    /// The tensor that was opened last: what of it is compressed or out of order is made row-major once.
    last: Mutex<Option<Arc<OpenTensor>>>,
    /// Of the threads that read a moment ago.
    spare: Mutex<Vec<Buffers>>,
}

/// What one thread reads with: memory that was touched, and blocks that the next tensor may share.
#[derive(Default)]
struct Buffers {
    verified: Verified,
    piece: Vec<u8>,
}

impl Source {
    pub(super) fn open(path: &Path, Values { tensors_only }: Values) -> Result<Self> {
        let reader: Box<dyn StorageReader> = match Format::of(path)? {
            Format::TorchDcp if tensors_only => Box::new(torch::Reader::tensors_only(path)),
            Format::TorchSave if tensors_only => Box::new(torch::PtReader::tensors_only(path)),
            _ => crate::open(path)?,
        };
        let mut metadata = reader.read_metadata()?;
        if tensors_only {
            metadata.tree = metadata.tree.tensors_only();
        }
        metadata.check_ranges(reader.path())?;
        let metadata = Arc::new(metadata);
        Ok(Self { reader, metadata, last: Mutex::default(), spare: Mutex::default() })
    }

    /// A tensor of the metadata, its files open.
    pub(super) fn tensor(&self, saved: &TensorStorageMetadata) -> Result<Arc<OpenTensor>> {
        let Some(position) = self.metadata.position(&saved.fqn) else {
            unreachable!("the tensor is one of this metadata");
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = last.as_ref().filter(|open| open.position == position) {
            return Ok(open.clone());
        }
        let open = Arc::new(OpenTensor::open(self.reader.as_ref(), &self.metadata, position)?);
        *last = Some(open.clone());
        Ok(open)
    }

    /// The row-major bytes of a range of the elements of a box, piece by piece, checked on the way.
    pub(super) fn read(
        &self,
        saved: &TensorStorageMetadata,
        bounds: &TensorBox,
        elements: Range<usize>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        let tensor = self.tensor(saved)?;
        let spare = || self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let Buffers { verified, mut piece } = spare().pop().unwrap_or_default();
        let mut reader = tensor.reader(verified);
        let Range { start: mut at, end } = elements;
        while at < end {
            let left_of_block =
                boxes_within(bounds, at, 1).first().map_or(0, |e| tensor.elements_in_block(e));
            let is_short = left_of_block * saved.dtype.size_bytes() < SHORT_BYTES;
            let len = left_of_block + if is_short { PIECE_BYTES / saved.dtype.size_bytes() } else { 0 };
            let len = len.min(end - at);
            piece.resize(len * saved.dtype.size_bytes(), 0);
            read_elements(&mut reader, bounds, at, &mut piece, saved.dtype)?;
            take(&piece);
            at += len;
        }
        spare().push(Buffers { verified: reader.into_verified(), piece });
        Ok(())
    }
}

/// The elements of a box from one on, which fill `bytes`.
fn read_elements(
    reader: &mut BoxReader<'_>,
    bounds: &TensorBox,
    start: usize,
    bytes: &mut [u8],
    dtype: DType,
) -> Result<()> {
    let mut rest = bytes;
    for part in boxes_within(bounds, start, rest.len() / dtype.size_bytes()) {
        let (now, later) = rest.split_at_mut(part.numel() * dtype.size_bytes());
        reader.read(&part, now)?;
        rest = later;
    }
    Ok(())
}

/// Boxes that together are the elements of a box from one on.
fn boxes_within(bounds: &TensorBox, start: usize, len: usize) -> Vec<TensorBox> {
    let mut boxes = run_boxes(&bounds.sizes, start, len);
    for part in &mut boxes {
        part.offsets.iter_mut().zip(&bounds.offsets).for_each(|(at, offset)| *at += offset);
    }
    boxes
}

/// A tensor of a checkpoint as a rank would hold it that saves it again: read when it is asked for, in pieces.
pub(super) struct Lazy<'s> {
    pub(super) source: &'s Source,
    pub(super) saved: &'s TensorStorageMetadata,
    pub(super) boxes: Vec<TensorBox>,
    /// Told of every piece.
    pub(super) progress: &'s indicatif::ProgressBar,
}

impl LocalTensor for Lazy<'_> {
    fn dtype(&self) -> DType {
        self.saved.dtype
    }

    fn global_shape(&self) -> &[usize] {
        &self.saved.shape
    }

    fn local_boxes(&self) -> &[TensorBox] {
        &self.boxes
    }

    fn read_box(&self, index: usize, read: &mut dyn FnMut(&[u8])) -> sconce_dtensor::Result<()> {
        let mut all = Vec::new();
        let len = sconce_dtensor::box_len_bytes(self, index);
        self.read_box_range(index, 0..len, &mut |bytes| all.extend_from_slice(bytes))?;
        read(&all);
        Ok(())
    }

    fn read_box_range(
        &self,
        index: usize,
        range: Range<usize>,
        read: &mut dyn FnMut(&[u8]),
    ) -> sconce_dtensor::Result<()> {
        let size = self.saved.dtype.size_bytes();
        // Elements that lie in the range, and what of the first and the last does not.
        let elements = range.start / size..range.end.div_ceil(size);
        let mut at = elements.start * size;
        let outcome = self.source.read(self.saved, &self.boxes[index], elements, &mut |bytes| {
            let from = range.start.max(at) - at;
            let to = range.end.min(at + bytes.len()) - at;
            at += bytes.len();
            self.progress.inc((to - from) as u64);
            read(&bytes[from..to]);
        });
        outcome.map_err(|e| sconce_dtensor::Error::Unreadable {
            what: self.saved.fqn.clone(),
            cause: e.to_string(),
        })
    }

    fn write_box(&mut self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        Err(sconce_dtensor::Error::ReadOnly { what: format!("{} of a checkpoint", self.saved.fqn) })
    }

    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        Err(sconce_dtensor::Error::ReadOnly { what: format!("{} of a checkpoint", self.saved.fqn) })
    }
}
