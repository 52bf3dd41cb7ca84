//! ShardPiece: what a flat shard holds of one parameter, as a value of a state dict.

use sconce_dtensor::{DType, LocalTensor, TensorBox, run_boxes};

use crate::shard::Shard;

/// A run of a row-major parameter that lies in a shard, sharing its storage.
#[derive(Debug, Clone)]
pub(crate) struct ShardPiece {
    shard: Shard,
    /// Where each box begins in the shard.
    starts: Vec<usize>,
    boxes: Vec<TensorBox>,
    shape: Vec<usize>,
}

impl ShardPiece {
    /// Elements `param_start..param_start + len` of a parameter of `shape`, which lie from `start` on in `shard`.
    pub(crate) fn new(shard: Shard, start: usize, shape: &[usize], param_start: usize, len: usize) -> Self {
        let boxes = run_boxes(shape, param_start, len);
        let mut next = start;
        let place = |held: &TensorBox| {
            next += held.numel();
            next - held.numel()
        };
        let starts = boxes.iter().map(place).collect();
        Self { shard, starts, boxes, shape: shape.to_vec() }
    }

    fn range(&self, index: usize) -> std::ops::Range<usize> {
        self.starts[index]..self.starts[index] + self.boxes[index].numel()
    }
}

impl LocalTensor for ShardPiece {
    fn dtype(&self) -> DType {
        DType::F32
    }

    fn global_shape(&self) -> &[usize] {
        &self.shape
    }

    fn local_boxes(&self) -> &[TensorBox] {
        &self.boxes
    }

    fn read_box(&self, index: usize, read: &mut dyn FnMut(&[u8])) -> sconce_dtensor::Result<()> {
        read(bytemuck::cast_slice(&self.shard.values()[self.range(index)]));
        Ok(())
    }

    fn write_box(&mut self, index: usize, write: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        self.shard.write(|values| write(bytemuck::cast_slice_mut(&mut values[self.range(index)])));
        Ok(())
    }

    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        let numel: usize = self.boxes.iter().map(TensorBox::numel).sum();
        let first = self.starts.first().copied().unwrap_or(0);
        let own = self.shard.values()[first..first + numel].to_vec();
        let starts = self.starts.iter().map(|start| start - first).collect();
        Ok(Box::new(Self { shard: Shard::from_vec(own), starts, ..self.clone() }))
    }

    /// Without a copy: optimizers write the next values beside those that a snapshot holds.
    fn snapshot(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        Ok(Box::new(Self { shard: self.shard.snapshot(), ..self.clone() }))
    }

    fn has_free_snapshots(&self) -> bool {
        true
    }
}
