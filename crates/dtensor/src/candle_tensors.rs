//! candle tensors as state: a whole tensor, and a run of a flat parameter.

use std::any::Any;
use std::ops::Range;

use candle_core::Tensor;
use sconce_mesh::DType;

use crate::candle_bytes::{deep_copy, dtype_of, read_bytes, read_range, write_bytes, zeros};
use crate::error::CandleContext;
use crate::{Error, LocalTensor, Result, TensorBox, TensorBuf, Value, run_boxes};

/// Boxes of a global tensor whose elements lie one box after the other in a 1-D candle tensor.
///
/// A piece of a flat parameter is one: the run of a parameter's elements that the rank's shard holds.
#[derive(Debug, Clone)]
pub struct FlatTensor {
    flat: Tensor,
    dtype: DType,
    shape: Vec<usize>,
    boxes: Vec<TensorBox>,
}

impl FlatTensor {
    /// A whole tensor; a contiguous one shares its storage, another is copied.
    ///
    /// # Errors
    /// `Mesh` for a dtype that nothing here carries.
    pub fn whole(tensor: &Tensor) -> Result<Self> {
        let shape = tensor.dims().to_vec();
        let boxes = vec![TensorBox::whole(&shape)];
        Self::new(tensor.clone(), shape, boxes)
    }

    /// The run that begins at element `start` of a row-major tensor of `shape`; it shares `flat`'s storage.
    ///
    /// # Errors
    /// `Mesh` for a dtype that nothing here carries.
    pub fn run(flat: Tensor, shape: &[usize], start: usize) -> Result<Self> {
        let boxes = run_boxes(shape, start, flat.elem_count());
        Self::new(flat, shape.to_vec(), boxes)
    }

    /// Boxes of a tensor of `shape`, each row-major, one after the other.
    pub(crate) fn boxes(tensor: &Tensor, shape: &[usize], held: Vec<TensorBox>) -> Result<Self> {
        Self::new(tensor.clone(), shape.to_vec(), held)
    }

    fn new(tensor: Tensor, shape: Vec<usize>, boxes: Vec<TensorBox>) -> Result<Self> {
        let dtype = dtype_of(&tensor)?;
        let flat = tensor.flatten_all().and_then(|t| t.contiguous());
        let flat = flat.during(|| format!("flattening a tensor of shape {shape:?}"))?;
        Ok(Self { flat, dtype, shape, boxes })
    }

    /// The elements of all boxes, in order: `[Σ numel]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    fn part(&self, index: usize) -> Result<Tensor> {
        let start: usize = self.boxes[..index].iter().map(TensorBox::numel).sum();
        let part = self.flat.narrow(0, start, self.boxes[index].numel());
        part.during(|| format!("box {} of a tensor of shape {:?}", self.boxes[index], self.shape))
    }
}

impl LocalTensor for FlatTensor {
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
        read_bytes(&self.part(index)?, read)
    }
    fn read_box_range(&self, index: usize, range: Range<usize>, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        read_range(&self.part(index)?, range, read)
    }
    fn write_box(&mut self, index: usize, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        write_bytes(&self.part(index)?, write)
    }
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>> {
        Ok(Box::new(Self { flat: deep_copy(&self.flat)?, ..self.clone() }))
    }
    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl<'a> TryFrom<&Tensor> for Value<'a> {
    type Error = Error;

    /// A whole tensor that shares its storage with the value: loading into the value is seen by the tensor.
    fn try_from(tensor: &Tensor) -> Result<Self> {
        Ok(Value::Tensor(Box::new(FlatTensor::whole(tensor)?)))
    }
}

impl TryFrom<&TensorBuf> for Tensor {
    type Error = Error;

    /// A copy of a buffer that holds a whole tensor, such as `load_new` of `sconce-checkpoint` makes.
    ///
    /// # Errors
    /// `ShapeMismatch` for a buffer that holds a part of a tensor, `Mesh` for a dtype that candle lacks.
    fn try_from(buffer: &TensorBuf) -> Result<Self> {
        let tensor = zeros(buffer.global_shape(), buffer.dtype())?;
        if buffer.bytes().len() != tensor.elem_count() * buffer.dtype().size_bytes() {
            let got = buffer.local_boxes().iter().flat_map(|part| part.sizes.clone()).collect();
            let what = "a buffer that should hold a whole tensor".to_owned();
            return Err(Error::ShapeMismatch { what, expected: buffer.global_shape().to_vec(), got });
        }
        write_bytes(&tensor, &mut |bytes| bytes.copy_from_slice(buffer.bytes()))?;
        Ok(tensor)
    }
}
