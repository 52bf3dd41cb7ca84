//! Shard: this rank's flat f32 elements of a unit, lent as slices. Holds no layout and communicates nothing.

use candle_core::{Device, Tensor};
use sconce_dtensor::{FlatTensor, LocalTensor};

use crate::Result;
use crate::error::CandleContext;

/// A 1-D f32 tensor whose storage state dicts may share.
#[derive(Debug, Clone)]
pub(crate) struct Shard {
    tensor: Tensor,
    lent: FlatTensor,
}

impl Shard {
    pub(crate) fn zeros(numel: usize) -> Result<Self> {
        Self::from_vec(vec![0.0; numel])
    }

    pub(crate) fn from_vec(values: Vec<f32>) -> Result<Self> {
        let numel = values.len();
        let tensor =
            Tensor::from_vec(values, numel, &Device::Cpu).during(|| format!("a shard of {numel}"))?;
        Ok(Self { lent: FlatTensor::whole(&tensor)?, tensor })
    }

    /// Elements `start..start + len`, sharing this shard's storage.
    pub(crate) fn view(&self, start: usize, len: usize) -> Result<Tensor> {
        self.tensor.narrow(0, start, len).during(|| format!("elements {start}+{len} of a shard"))
    }

    pub(crate) fn read<R>(&self, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let (mut f, mut out) = (Some(f), None);
        self.lent.read_box(0, &mut |bytes| out = f.take().map(|f| f(bytemuck::cast_slice(bytes))))?;
        Ok(out.unwrap_or_else(|| unreachable!("read_box lends exactly once when it succeeds")))
    }

    pub(crate) fn write<R>(&self, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        let (mut f, mut out) = (Some(f), None);
        let mut lent = self.lent.clone();
        lent.write_box(0, &mut |bytes| out = f.take().map(|f| f(bytemuck::cast_slice_mut(bytes))))?;
        Ok(out.unwrap_or_else(|| unreachable!("write_box lends exactly once when it succeeds")))
    }
}
