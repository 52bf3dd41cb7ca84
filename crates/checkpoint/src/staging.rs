//! Staging: the state as it is now, held still while a save writes it in the background.
//!
//! A tensor whose snapshots cost nothing is not copied: whoever writes it writes beside what the snapshot holds. Any
//! other is copied into a buffer that the next save uses again. So the memory bound is one copy of the tensors of the
//! second kind, as long as the stage lives, and, of the first kind, what is rewritten while a save runs.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sconce_dtensor::{DType, Fqn, LocalTensor, StateDict, TensorBox, Value, box_len_bytes};

use crate::tree::child;
use crate::{Error, Result};

/// Buffers of copied tensors, by name, kept from save to save.
#[derive(Default)]
pub(crate) struct Stage {
    buffers: HashMap<String, Arc<Vec<u8>>>,
}

/// A copied tensor.
struct Staged {
    dtype: DType,
    shape: Vec<usize>,
    boxes: Vec<TensorBox>,
    bytes: Arc<Vec<u8>>,
}

/// One thread copies this much at a time.
const PART_BYTES: usize = 8 << 20;

impl Stage {
    /// The state as it is now, in memory that no writer changes.
    ///
    /// # Errors
    /// `Tensor` if one cannot be read.
    pub(crate) fn stage(&mut self, state: &StateDict<'_>, threads: usize) -> Result<StateDict<'static>> {
        let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let copied = tensors.iter().filter(|(_, tensor)| !tensor.has_free_snapshots());
        let copied: Vec<(&Fqn, &dyn LocalTensor)> = copied.map(|(fqn, tensor)| (fqn, *tensor)).collect();
        self.buffers.retain(|name, _| copied.iter().any(|(fqn, _)| fqn.as_str() == name));
        let take =
            |(fqn, tensor): &(&Fqn, &dyn LocalTensor)| self.take_buffer(fqn.as_str(), len_bytes(*tensor));
        let mut buffers: Vec<Vec<u8>> = copied.iter().map(take).collect();
        copy_all(&copied, &mut buffers, threads)?;
        for ((fqn, _), bytes) in copied.iter().zip(buffers) {
            self.buffers.insert(fqn.as_str().to_owned(), Arc::new(bytes));
        }
        self.state(state, "")
    }

    /// The buffer of the last save, if nobody holds it any more.
    fn take_buffer(&mut self, fqn: &str, len: usize) -> Vec<u8> {
        let old = self.buffers.remove(fqn).and_then(|old| Arc::try_unwrap(old).ok());
        old.filter(|old| old.len() == len).unwrap_or_else(|| vec![0; len])
    }

    fn state(&self, state: &StateDict<'_>, at: &str) -> Result<StateDict<'static>> {
        let mut staged = StateDict::new();
        for (key, value) in state.iter() {
            staged.insert(key, self.value(value, &child(at, key))?);
        }
        Ok(staged)
    }

    fn value(&self, value: &Value<'_>, at: &str) -> Result<Value<'static>> {
        Ok(match value {
            Value::Tensor(tensor) => match self.buffers.get(at) {
                Some(bytes) => Value::Tensor(Box::new(Staged::new(tensor.as_ref(), bytes))),
                None => Value::Tensor(tensor.snapshot().map_err(|error| Error::tensor(at, &error))?),
            },
            Value::Map(map) => Value::Map(self.state(map, at)?),
            Value::List(items) => {
                let numbered = items.iter().enumerate();
                let item = |(nth, item): (usize, &Value<'_>)| self.value(item, &child(at, &nth.to_string()));
                Value::List(numbered.map(item).collect::<Result<_>>()?)
            }
            Value::Int(int) => Value::Int(*int),
            Value::Float(float) => Value::Float(*float),
            Value::Bool(truth) => Value::Bool(*truth),
            Value::Str(text) => Value::Str(text.clone()),
            Value::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Value::None => Value::None,
        })
    }
}

/// A part of a box and where it is copied to.
struct Part<'p> {
    fqn: &'p str,
    tensor: &'p dyn LocalTensor,
    index: usize,
    start: usize,
    to: &'p mut [u8],
}

fn copy_all(tensors: &[(&Fqn, &dyn LocalTensor)], buffers: &mut [Vec<u8>], threads: usize) -> Result<()> {
    let mut parts = Vec::new();
    for ((fqn, tensor), buffer) in tensors.iter().zip(buffers) {
        let mut rest = buffer.as_mut_slice();
        for index in 0..tensor.local_boxes().len() {
            let (mine, later) = rest.split_at_mut(box_len_bytes(*tensor, index));
            rest = later;
            let cut = mine.chunks_mut(PART_BYTES).enumerate();
            parts.extend(cut.map(|(nth, to)| Part {
                fqn: fqn.as_str(),
                tensor: *tensor,
                index,
                start: nth * PART_BYTES,
                to,
            }));
        }
    }
    let threads = threads.min(parts.len()).max(1);
    let queue = Mutex::new(parts.into_iter());
    let work = || loop {
        let part = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some(part) = part else { return Ok(()) };
        part.copy()?;
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mine = work();
        let died = || Error::Tensor { fqn: String::new(), cause: "a thread of the save panicked".to_owned() };
        let others = others.into_iter().map(|other| other.join().unwrap_or_else(|_| Err(died())));
        std::iter::once(mine).chain(others).collect()
    })
}

impl Part<'_> {
    fn copy(self) -> Result<()> {
        let Part { fqn, tensor, index, start, to } = self;
        let mut copied = 0;
        let lent = tensor.read_box_range(index, start..start + to.len(), &mut |bytes| {
            if let Some(to) = to.get_mut(copied..copied + bytes.len()) {
                to.copy_from_slice(bytes);
                copied += bytes.len();
            }
        });
        lent.map_err(|error| Error::tensor(fqn, &error))?;
        if copied == to.len() {
            return Ok(());
        }
        let cause = format!("box {index} lends fewer bytes than it has");
        Err(Error::Tensor { fqn: fqn.to_owned(), cause })
    }
}

fn len_bytes(tensor: &dyn LocalTensor) -> usize {
    (0..tensor.local_boxes().len()).map(|index| box_len_bytes(tensor, index)).sum()
}

impl Staged {
    fn new(tensor: &dyn LocalTensor, bytes: &Arc<Vec<u8>>) -> Self {
        let (shape, boxes) = (tensor.global_shape().to_vec(), tensor.local_boxes().to_vec());
        Self { dtype: tensor.dtype(), shape, boxes, bytes: Arc::clone(bytes) }
    }
}

impl LocalTensor for Staged {
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn global_shape(&self) -> &[usize] {
        &self.shape
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.boxes
    }
    fn read_box(&self, index: usize, read: &mut dyn FnMut(&[u8])) -> sconce_dtensor::Result<()> {
        let start: usize = (0..index).map(|before| box_len_bytes(self, before)).sum();
        read(&self.bytes[start..start + box_len_bytes(self, index)]);
        Ok(())
    }
    fn write_box(&mut self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        Err(sconce_dtensor::Error::ReadOnly { what: "a staged tensor".to_owned() })
    }
    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        let own = Arc::new(self.bytes.to_vec());
        Ok(Box::new(Self { bytes: own, shape: self.shape.clone(), boxes: self.boxes.clone(), ..*self }))
    }
    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}
