//! LocalTensor: what one rank holds of a global tensor, as boxes of bytes. No tensor library needed.

use std::any::Any;
use std::ops::Range;

use crate::{Error, Result, TensorBox};
use sconce_mesh::DType;

/// The part of a global tensor that this rank holds.
///
/// Bytes are native little-endian, each box row-major and contiguous on its own. A checkpoint reads and writes
/// through this trait only; whole tensors, [`DTensor`](crate::DTensor)s and pieces of flat parameters implement it.
pub trait LocalTensor: Send + Sync {
    /// Element type.
    fn dtype(&self) -> DType;

    /// Shape of the global tensor.
    fn global_shape(&self) -> &[usize];

    /// The boxes held here: disjoint, inside `global_shape`, possibly none.
    fn local_boxes(&self) -> &[TensorBox];

    /// Lends the bytes of box `index` to `read`, in one piece.
    ///
    /// # Errors
    /// The device could not be read.
    fn read_box(&self, index: usize, read: &mut dyn FnMut(&[u8])) -> Result<()>;

    /// Lends a range of the bytes of box `index` to `read`, in one piece or in several in order: tensors that do not lie
    /// in memory, and are larger than it, have this for saves.
    ///
    /// # Errors
    /// The device could not be read; `Unreadable` for a range that leaves the box.
    fn read_box_range(&self, index: usize, range: Range<usize>, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut outcome = Ok(());
        self.read_box(index, &mut |bytes| {
            outcome = check_range(&range, bytes.len()).map(|()| read(&bytes[range.clone()]));
        })?;
        outcome
    }

    /// Lends the bytes of box `index` to `write`, in place: aliases of the tensor see the new values.
    ///
    /// # Errors
    /// The device could not be written.
    fn write_box(&mut self, index: usize, write: &mut dyn FnMut(&mut [u8])) -> Result<()>;

    /// Lends a range of the bytes of box `index` to `write`, in place and in one piece: loads whose bytes arrive piece by
    /// piece write so. Tensors whose bytes do not lie in memory need not fetch the rest of the box then.
    ///
    /// # Errors
    /// The device could not be written; `Unreadable` for a range that leaves the box.
    fn write_box_range(
        &mut self,
        index: usize,
        range: Range<usize>,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<()> {
        let mut outcome = Ok(());
        self.write_box(index, &mut |bytes| {
            outcome = check_range(&range, bytes.len()).map(|()| write(&mut bytes[range.clone()]));
        })?;
        outcome
    }

    /// A copy that shares no memory with this one.
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>>;

    /// A value that keeps what this one holds now, whatever is written to this one later.
    ///
    /// It is a copy, unless whoever writes the tensor leaves old values alone while a snapshot holds them.
    fn snapshot(&self) -> Result<Box<dyn LocalTensor>> {
        self.deep_copy()
    }

    /// Whether [`LocalTensor::snapshot`] copies nothing, so that a save in the background needs no memory of its own.
    fn has_free_snapshots(&self) -> bool {
        false
    }

    /// This value for downcasting, where its type is `'static`.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }
}

/// Size in bytes of box `index`.
pub fn box_len_bytes(tensor: &dyn LocalTensor, index: usize) -> usize {
    tensor.local_boxes()[index].numel() * tensor.dtype().size_bytes()
}

/// Refuses a range that leaves a box of `len` bytes.
pub(crate) fn check_range(range: &Range<usize>, len: usize) -> Result<()> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(Error::Unreadable { what: format!("bytes {range:?} of a box"), cause: format!("it has {len}") })
}
