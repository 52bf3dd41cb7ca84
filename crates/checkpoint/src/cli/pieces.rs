//! Tensors of a checkpoint as they lie there, read in pieces of bounded size through the ordinary load.

use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{channel, sync_channel};

use sconce_dtensor::{DType, LocalTensor, StateDict, TensorBox, run_boxes};

use crate::metadata::{ChunkStorageMetadata, FileMetadata, Metadata, TensorStorageMetadata};
use crate::plan::{LoadPlan, LoadReport, ReadItem};
use crate::storage::{DataFile, StorageReader};
use crate::tree::Node;
use crate::{Error, LoadOptions, LoadPlanner, Result, load_by};

/// What is held of a tensor at a time.
const PIECE_BYTES: usize = 2 << 20;

/// A checkpoint that was opened, and what it holds.
pub(super) struct Source {
    reader: Box<dyn StorageReader>,
    pub(super) metadata: Metadata,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::of(crate::open(path)?)
    }

    pub(super) fn of(reader: Box<dyn StorageReader>) -> Result<Self> {
        let metadata = reader.read_metadata()?;
        metadata.check_ranges(reader.path())?;
        Ok(Self { reader, metadata })
    }

    /// The row-major bytes of a box of a tensor, piece by piece, checked on the way.
    pub(super) fn read(
        &self,
        saved: &TensorStorageMetadata,
        bounds: &TensorBox,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        self.read_range(saved, bounds, 0..bounds.numel(), take)
    }

    /// A range of the elements of a box.
    fn read_range(
        &self,
        saved: &TensorStorageMetadata,
        bounds: &TensorBox,
        elements: Range<usize>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        let step = PIECE_BYTES / saved.dtype.size_bytes();
        let pieces = Pieces { one: One::new(self, saved), saved, bounds };
        let starts = elements.clone().step_by(step).map(|at| (at, step.min(elements.end - at)));
        if elements.len() <= step {
            let mut bytes = Vec::new();
            return starts.into_iter().try_for_each(|(start, len)| {
                pieces.read(start, len, &mut bytes)?;
                take(&bytes);
                Ok(())
            });
        }
        // The next piece is read and checked while the one before it is used.
        std::thread::scope(|scope| {
            let (full, pieces_read) = sync_channel::<Result<Vec<u8>>>(1);
            let (empty, used) = channel::<Vec<u8>>();
            scope.spawn(move || {
                for (start, len) in starts {
                    let mut bytes = used.try_recv().unwrap_or_default();
                    let outcome = pieces.read(start, len, &mut bytes).map(|()| bytes);
                    let failed = outcome.is_err();
                    if full.send(outcome).is_err() || failed {
                        return;
                    }
                }
            });
            for bytes in pieces_read {
                let bytes = bytes?;
                take(&bytes);
                // Only a reader that is done takes none.
                let _ = empty.send(bytes);
            }
            Ok(())
        })
    }
}

/// A box of a tensor, of which pieces are read.
struct Pieces<'s> {
    one: One<'s>,
    saved: &'s TensorStorageMetadata,
    bounds: &'s TensorBox,
}

impl Pieces<'_> {
    /// `len` elements of the box from `start` on, into `bytes`.
    fn read(&self, start: usize, len: usize, bytes: &mut Vec<u8>) -> Result<()> {
        let mut boxes = run_boxes(&self.bounds.sizes, start, len);
        for part in &mut boxes {
            part.offsets.iter_mut().zip(&self.bounds.offsets).for_each(|(at, offset)| *at += offset);
        }
        bytes.resize(len * self.saved.dtype.size_bytes(), 0);
        let mut state = StateDict::new();
        state.insert_tensor("piece", Buffer { saved: self.saved, boxes, bytes });
        load_by(&self.one, &mut Piece, &mut state, LoadOptions { strict: false, ..LoadOptions::default() })?;
        Ok(())
    }
}

/// Memory for some boxes of a tensor, used again and again.
struct Buffer<'b> {
    saved: &'b TensorStorageMetadata,
    boxes: Vec<TensorBox>,
    bytes: &'b mut Vec<u8>,
}

impl Buffer<'_> {
    fn range(&self, index: usize) -> Range<usize> {
        let size = self.saved.dtype.size_bytes();
        let start = self.boxes[..index].iter().map(TensorBox::numel).sum::<usize>() * size;
        start..start + self.boxes[index].numel() * size
    }
}

impl LocalTensor for Buffer<'_> {
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
        read(&self.bytes[self.range(index)]);
        Ok(())
    }

    fn write_box(&mut self, index: usize, write: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        let range = self.range(index);
        write(&mut self.bytes[range]);
        Ok(())
    }

    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        Err(sconce_dtensor::Error::ReadOnly { what: format!("a piece of {}", self.saved.fqn) })
    }
}

/// A reader of one tensor of a checkpoint: the files that it lies in and no others, so that a piece costs what it
/// reads, however large the checkpoint is.
struct One<'s> {
    source: &'s Source,
    metadata: Metadata,
}

impl<'s> One<'s> {
    fn new(source: &'s Source, saved: &TensorStorageMetadata) -> Self {
        let mut files: Vec<FileMetadata> = Vec::new();
        let mut places = std::collections::HashMap::new();
        let chunk = |chunk: &ChunkStorageMetadata| {
            let file = *places.entry(chunk.file).or_insert_with(|| {
                files.push(source.metadata.files[chunk.file].clone());
                files.len() - 1
            });
            ChunkStorageMetadata { file, ..chunk.clone() }
        };
        let chunks = saved.chunks.iter().map(chunk).collect();
        let tensors = vec![TensorStorageMetadata { fqn: "piece".to_owned(), chunks, ..saved.clone() }];
        Self { source, metadata: Metadata { tensors, files, tree: Node::Map(Vec::new()) } }
    }
}

impl StorageReader for One<'_> {
    fn read_metadata(&self) -> Result<Metadata> {
        Ok(self.metadata.clone())
    }

    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        self.source.reader.open(file)
    }

    fn path(&self) -> &Path {
        self.source.reader.path()
    }
}

/// Reads the boxes of the only tensor.
struct Piece;

impl LoadPlanner for Piece {
    fn local_plan(&mut self, state: &StateDict<'_>, metadata: &Metadata) -> Result<LoadPlan> {
        let tensors = state.flat_tensors().map_err(|e| Error::tensor("", &e))?;
        let (Some((fqn, tensor)), Some(saved)) = (tensors.iter().next(), metadata.tensors.first()) else {
            return Ok(LoadPlan::default());
        };
        let mut items = Vec::new();
        for (index, wanted) in tensor.local_boxes().iter().enumerate() {
            let mut found = 0;
            for (chunk, held) in saved.chunks.iter().enumerate() {
                if let Some(part) = held.bounds.intersect(wanted) {
                    found += part.numel();
                    items.push(ReadItem { fqn: fqn.0.clone(), index, saved: 0, chunk, part });
                }
            }
            // Readers refuse chunks that overlap, so the count is the coverage.
            if found != wanted.numel() {
                let (shape, missing) = (saved.shape.clone(), wanted.to_string());
                return Err(Error::Uncovered { fqn: saved.fqn.clone(), shape, missing });
            }
        }
        Ok(LoadPlan { items, values: Vec::new(), report: LoadReport::default() })
    }
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
        let outcome = self.source.read_range(self.saved, &self.boxes[index], elements, &mut |bytes| {
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
