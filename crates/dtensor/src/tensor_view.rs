//! Raw typed bytes as tensors: for callers without candle (burn, tch, ndarray, C).

use std::any::Any;

use crate::{Error, LocalTensor, Result, TensorBox};
use sconce_mesh::DType;

/// A borrowed, whole tensor that can be saved.
#[derive(Debug)]
pub struct TensorView<'a> {
    shape: Vec<usize>,
    boxes: [TensorBox; 1],
    dtype: DType,
    bytes: &'a [u8],
}

/// A borrowed, whole tensor that can be saved and loaded in place.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    shape: Vec<usize>,
    boxes: [TensorBox; 1],
    dtype: DType,
    bytes: &'a mut [u8],
}

/// An owned part of a tensor: one or several boxes, their bytes one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorBuf {
    shape: Vec<usize>,
    boxes: Vec<TensorBox>,
    dtype: DType,
    bytes: Vec<u8>,
}

impl<'a> TensorView<'a> {
    /// A tensor over row-major `bytes`.
    ///
    /// # Errors
    /// `ShapeMismatch` (in bytes) if `bytes` is not as long as `shape` says.
    pub fn new(dtype: DType, shape: &[usize], bytes: &'a [u8]) -> Result<Self> {
        check_len(dtype, shape, bytes.len())?;
        Ok(Self { shape: shape.to_vec(), boxes: [TensorBox::whole(shape)], dtype, bytes })
    }
}

impl<'a> TensorViewMut<'a> {
    /// A tensor over row-major `bytes`.
    ///
    /// # Errors
    /// `ShapeMismatch` (in bytes) if `bytes` is not as long as `shape` says.
    pub fn new(dtype: DType, shape: &[usize], bytes: &'a mut [u8]) -> Result<Self> {
        check_len(dtype, shape, bytes.len())?;
        Ok(Self { shape: shape.to_vec(), boxes: [TensorBox::whole(shape)], dtype, bytes })
    }
}

impl TensorBuf {
    /// A whole tensor over row-major `bytes`.
    ///
    /// # Errors
    /// `ShapeMismatch` (in bytes) if `bytes` is not as long as `shape` says.
    pub fn new(dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Result<Self> {
        Self::from_boxes(dtype, shape, vec![TensorBox::whole(shape)], bytes)
    }

    /// The given boxes of a global tensor, their bytes one after the other.
    ///
    /// # Errors
    /// `ShapeMismatch` if a box lies outside `global_shape`, or (in bytes) if `bytes` is not as long as the boxes.
    pub fn from_boxes(
        dtype: DType,
        global_shape: &[usize],
        boxes: Vec<TensorBox>,
        bytes: Vec<u8>,
    ) -> Result<Self> {
        if let Some(outside) = boxes.iter().find(|b| !b.fits(global_shape)) {
            let what = format!("box {outside} of a tensor buffer");
            return Err(Error::ShapeMismatch {
                what,
                expected: global_shape.to_vec(),
                got: outside.sizes.clone(),
            });
        }
        check_len(dtype, &[boxes.iter().map(TensorBox::numel).sum()], bytes.len())?;
        Ok(Self { shape: global_shape.to_vec(), boxes, dtype, bytes })
    }

    /// The bytes of all boxes, in order.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn range(&self, index: usize) -> std::ops::Range<usize> {
        let before: usize = self.boxes[..index].iter().map(TensorBox::numel).sum();
        let size = self.dtype.size_bytes();
        before * size..(before + self.boxes[index].numel()) * size
    }
}

fn check_len(dtype: DType, shape: &[usize], len_bytes: usize) -> Result<()> {
    let expected = shape.iter().try_fold(dtype.size_bytes(), |n, d| n.checked_mul(*d));
    if expected == Some(len_bytes) {
        return Ok(());
    }
    let what = format!("bytes of a {dtype} tensor of shape {shape:?}");
    Err(Error::ShapeMismatch { what, expected: vec![expected.unwrap_or(usize::MAX)], got: vec![len_bytes] })
}

impl LocalTensor for TensorView<'_> {
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn global_shape(&self) -> &[usize] {
        &self.shape
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.boxes
    }
    fn read_box(&self, _index: usize, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        read(self.bytes);
        Ok(())
    }
    fn write_box(&mut self, _index: usize, _write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        Err(Error::ReadOnly { what: format!("a TensorView of shape {:?}", self.shape) })
    }
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>> {
        Ok(Box::new(TensorBuf::new(self.dtype, &self.shape, self.bytes.to_vec())?))
    }
}

impl LocalTensor for TensorViewMut<'_> {
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn global_shape(&self) -> &[usize] {
        &self.shape
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.boxes
    }
    fn read_box(&self, _index: usize, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        read(self.bytes);
        Ok(())
    }
    fn write_box(&mut self, _index: usize, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        write(self.bytes);
        Ok(())
    }
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>> {
        Ok(Box::new(TensorBuf::new(self.dtype, &self.shape, self.bytes.to_vec())?))
    }
}

impl LocalTensor for TensorBuf {
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn global_shape(&self) -> &[usize] {
        &self.shape
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.boxes
    }
    fn read_box(&self, index: usize, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        read(&self.bytes[self.range(index)]);
        Ok(())
    }
    fn write_box(&mut self, index: usize, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let range = self.range(index);
        write(&mut self.bytes[range]);
        Ok(())
    }
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>> {
        Ok(Box::new(self.clone()))
    }
    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}
