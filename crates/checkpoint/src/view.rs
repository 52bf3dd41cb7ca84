//! Views: tensors of a checkpoint where they lie in its mapped files, verified before they are lent, copied nowhere.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use sconce_dtensor::{DType, LocalTensor, StateDict, TensorBox, TensorBuf, Value};

use crate::metadata::{BLOCK_BYTES, Metadata, TensorStorageMetadata};
use crate::read::check_block;
use crate::storage::{DataFile, FileSystemReader, StorageReader};
use crate::threads::deal;
use crate::tree::{self, Node};
use crate::{Error, Result};

/// A checkpoint whose files are mapped, for whoever reads tensors and changes none: inference, tools.
///
/// A tensor is lent as its file has it. The blocks that it lies in are compared with their checksums when it is first
/// asked for, once. Opening reads the manifest only, and processes of one host share the memory.
///
/// Tensors begin at multiples of their elements' size, in files whose data begin at multiples of 4096 bytes, so that
/// `bytemuck::try_cast_slice` makes numbers of them without a copy. candle's tensors own their memory: of a view a candle
/// tensor is made by one copy, `Tensor::from_raw_buffer`.
///
/// ```
/// use sconce_checkpoint::{MappedCheckpoint, save};
/// use sconce_dtensor::{DType, StateDict, TensorBuf};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("step-1");
/// let mut state = StateDict::new();
/// let bytes: Vec<u8> = [1f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
/// state.insert_tensor("w", TensorBuf::new(DType::F32, &[2], bytes)?);
/// save(&path, &state)?;
///
/// // SAFETY: nobody changes the files of the checkpoint in place.
/// let mapped = unsafe { MappedCheckpoint::open(&path) }?;
/// let w = mapped.tensor("w")?;
/// let numbers: &[f32] = bytemuck::try_cast_slice(w.bytes().expect("saved in one piece")).expect("aligned");
/// assert_eq!(numbers, [1.0, 2.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Source
/// `safetensors.safe_open`, which checks no bytes; `torch.load(mmap=True)`.
pub struct MappedCheckpoint {
    reader: FileSystemReader,
    metadata: Metadata,
    files: Vec<OnceLock<Mapped>>,
}

/// A mapped file and which of its blocks were verified.
struct Mapped {
    file: Box<dyn DataFile>,
    is_verified: Vec<AtomicBool>,
}

/// A tensor of a [`MappedCheckpoint`]: the parts in which it was saved, each where it lies.
///
/// As a [`LocalTensor`] it is the whole tensor, in boxes, and read-only: it can be saved and copied from like any other.
#[derive(Debug, Clone)]
pub struct MappedTensor<'m> {
    dtype: DType,
    shape: &'m [usize],
    boxes: Vec<TensorBox>,
    bytes: Vec<&'m [u8]>,
}

/// Blocks that one thread takes at a time.
const JOB_BLOCKS: usize = 16;

impl MappedCheckpoint {
    /// The checkpoint of a reader that maps files.
    pub(crate) fn of(reader: FileSystemReader) -> Result<Self> {
        let metadata = reader.read_metadata()?;
        metadata.check_ranges(reader.path())?;
        let files = metadata.files.iter().map(|_| OnceLock::new()).collect();
        Ok(Self { reader, metadata, files })
    }

    /// What the checkpoint holds.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// A tensor, verified.
    ///
    /// # Errors
    /// `KeyMismatch` if there is none of that name; `Corrupt`, `Length`, `Io`.
    pub fn tensor(&self, fqn: &str) -> Result<MappedTensor<'_>> {
        let saved = self.metadata.tensor(fqn).ok_or_else(|| Error::KeyMismatch {
            path: self.reader.path().to_owned(),
            missing: vec![fqn.to_owned()],
            unexpected: Vec::new(),
        })?;
        self.view(saved)
    }

    /// All tensors and values, nested as they were saved. All of it is verified.
    ///
    /// # Errors
    /// As [`MappedCheckpoint::tensor`].
    pub fn state(&self) -> Result<StateDict<'_>> {
        self.nested(&self.metadata.tree, "")
    }

    fn nested(&self, tree: &Node, at: &str) -> Result<StateDict<'_>> {
        let Node::Map(entries) = tree else { return Ok(StateDict::new()) };
        let mut state = StateDict::new();
        for (key, node) in entries {
            state.insert(key.clone(), self.value(node, &tree::child(at, key))?);
        }
        Ok(state)
    }

    fn value(&self, node: &Node, at: &str) -> Result<Value<'_>> {
        Ok(match node {
            Node::Map(_) => Value::Map(self.nested(node, at)?),
            Node::List(items) => {
                let item = |(nth, node): (usize, &Node)| self.value(node, &tree::child(at, &nth.to_string()));
                Value::List(items.iter().enumerate().map(item).collect::<Result<_>>()?)
            }
            Node::Tensor => Value::Tensor(Box::new(self.tensor(at)?)),
            plain => plain.plain_value().unwrap_or(Value::None),
        })
    }

    fn view<'m>(&'m self, saved: &'m TensorStorageMetadata) -> Result<MappedTensor<'m>> {
        let (mut boxes, mut bytes) = (Vec::new(), Vec::new());
        for chunk in &saved.chunks {
            let len = chunk.bounds.numel() * saved.dtype.size_bytes();
            boxes.push(chunk.bounds.clone());
            bytes.push(self.verified(chunk.file, chunk.offset_bytes..chunk.offset_bytes + len as u64)?);
        }
        if boxes.is_empty() {
            // A tensor without elements has no chunks.
            boxes.push(TensorBox::whole(&saved.shape));
            bytes.push(&[]);
        }
        Ok(MappedTensor { dtype: saved.dtype, shape: &saved.shape, boxes, bytes })
    }

    /// A range of a file, all blocks of which are as they were saved.
    fn verified(&self, nth: usize, range: Range<u64>) -> Result<&[u8]> {
        let meta = &self.metadata.files[nth];
        let mapped = self.mapped(nth)?;
        let Some(bytes) = mapped.file.mapped() else {
            unreachable!("the reader was made to map files");
        };
        if range.is_empty() {
            return Ok(&[]);
        }
        let blocks = (range.start / BLOCK_BYTES) as usize..range.end.div_ceil(BLOCK_BYTES) as usize;
        let unseen = |block: &usize| !mapped.is_verified[*block].load(Ordering::Acquire);
        let unseen: Vec<usize> = blocks.filter(unseen).collect();
        in_parallel(&unseen, |block| {
            let start = block as u64 * BLOCK_BYTES;
            let end = (start + BLOCK_BYTES).min(meta.len_bytes);
            check_block(meta, block, &bytes[start as usize..end as usize], mapped.file.path())
                .map_err(|error| error.naming_tensors(&self.metadata))?;
            mapped.is_verified[block].store(true, Ordering::Release);
            Ok(())
        })?;
        Ok(&bytes[range.start as usize..range.end as usize])
    }

    fn mapped(&self, nth: usize) -> Result<&Mapped> {
        if let Some(mapped) = self.files[nth].get() {
            return Ok(mapped);
        }
        let meta = &self.metadata.files[nth];
        let is_verified = meta.block_crcs.iter().flatten().map(|_| AtomicBool::new(false)).collect();
        let mapped = Mapped { file: self.reader.open(meta)?, is_verified };
        Ok(self.files[nth].get_or_init(|| mapped))
    }
}

/// Does something for each block, on as many threads as are worth starting.
fn in_parallel(blocks: &[usize], act: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs: Vec<&[usize]> = blocks.chunks(JOB_BLOCKS).collect();
    deal(jobs.len(), cores, |nth| jobs[nth].iter().try_for_each(|block| act(*block))).map(drop)
}

impl<'m> MappedTensor<'m> {
    /// The bytes of the whole tensor, row-major, if it was saved in one piece.
    pub fn bytes(&self) -> Option<&'m [u8]> {
        let is_whole = self.boxes.len() == 1 && self.boxes[0] == TensorBox::whole(self.shape);
        is_whole.then(|| self.bytes[0])
    }

    /// The pieces in which it was saved: disjoint, together the whole tensor, each row-major.
    pub fn pieces(&self) -> impl Iterator<Item = (&TensorBox, &'m [u8])> {
        self.boxes.iter().zip(self.bytes.iter().copied())
    }
}

impl LocalTensor for MappedTensor<'_> {
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn global_shape(&self) -> &[usize] {
        self.shape
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.boxes
    }
    fn read_box(&self, index: usize, read: &mut dyn FnMut(&[u8])) -> sconce_dtensor::Result<()> {
        read(self.bytes[index]);
        Ok(())
    }
    fn write_box(&mut self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        Err(sconce_dtensor::Error::ReadOnly { what: "a mapped tensor".to_owned() })
    }
    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        let copied = TensorBuf::from_boxes(self.dtype, self.shape, self.boxes.clone(), self.bytes.concat())?;
        Ok(Box::new(copied))
    }
}
