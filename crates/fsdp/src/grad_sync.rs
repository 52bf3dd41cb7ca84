//! Gradients of a unit to the mean gradient of a shard: reduce-scatter in the shard group, all-reduce over replicas.

use std::sync::Arc;

use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};
use sconce_mesh::ReduceOp;

#[cfg(feature = "cuda")]
use crate::error::CandleContext;
use crate::flat_param::FlatParameter;
use crate::mixed_precision::{Float, cast, slice_of};
use crate::pass::Pass;
use crate::strategy::Groups;
use crate::{Error, Result};

/// The complete gradients of a unit on this rank, ready to be reduced by any thread.
pub(crate) struct Reduction {
    pub(crate) flat: Arc<FlatParameter>,
    pub(crate) groups: Groups,
    pub(crate) pass: Arc<Pass>,
    /// Contiguous, in the dtype to reduce in, one for each trainable parameter; a missing one is zero.
    pub(crate) gradients: Vec<Option<Tensor>>,
    /// Where a device reduces to; nothing on the CPU.
    room: Option<Storage>,
}

impl Reduction {
    pub(crate) fn new(
        flat: &Arc<FlatParameter>,
        groups: &Groups,
        pass: &Arc<Pass>,
        gradients: Vec<Option<Tensor>>,
    ) -> Result<Self> {
        let dtype = pass.precision.reduce_dtype;
        let named = flat.trainable().iter().zip(gradients);
        let cast = |(param, gradient): (&crate::ParamLayout, Option<Tensor>)| {
            gradient.map(|g| cast(&g, dtype, || format!("gradient of {}", param.fqn))).transpose()
        };
        let gradients = named.map(cast).collect::<Result<Vec<_>>>()?;
        let room = room(flat, pass, &gradients)?;
        Ok(Self { flat: flat.clone(), groups: groups.clone(), gradients, pass: pass.clone(), room })
    }

    /// The mean over all ranks of the mesh of this rank's shard of the gradients.
    ///
    /// Ranks: collective over the shard group, then over the replicate group.
    ///
    /// # Source
    /// `_reduce_grad` of `torch/distributed/fsdp/_runtime_utils.py`. torch divides by about the square root before and
    /// by the rest after; in f32 one division after the sums gives the same bits for world sizes that are powers of two.
    pub(crate) fn run(self) -> Result<Vec<f32>> {
        match self.pass.precision.reduce_dtype {
            DType::F16 => self.averaged::<f16>(),
            DType::BF16 => self.averaged::<bf16>(),
            _ => self.summed(),
        }
    }

    fn summed(mut self) -> Result<Vec<f32>> {
        let mut reduced = self.reduced::<f32>(ReduceOp::Sum)?;
        let n_ranks = self.groups.n_ranks();
        if n_ranks > 1 {
            reduced.iter_mut().for_each(|g| *g /= n_ranks as f32);
        }
        Ok(reduced)
    }

    /// In a short dtype a sum might overflow where the mean does not.
    fn averaged<T: Float>(mut self) -> Result<Vec<f32>> {
        self.reduced::<T>(ReduceOp::Avg).map(T::into_f32)
    }

    /// This rank's shard, reduced in the shard group and over replicas.
    #[cfg(feature = "cuda")]
    fn reduced<T: Float>(&mut self, op: ReduceOp) -> Result<Vec<T>> {
        match self.room.take() {
            Some(Storage::Cuda(room)) => crate::cuda::reduce(self, room, op),
            _ => self.reduced_on_cpu(op),
        }
    }

    /// This rank's shard, reduced in the shard group and over replicas.
    #[cfg(not(feature = "cuda"))]
    fn reduced<T: Float>(&mut self, op: ReduceOp) -> Result<Vec<T>> {
        debug_assert!(self.room.is_none(), "the CPU needs no room");
        self.reduced_on_cpu(op)
    }

    fn reduced_on_cpu<T: Float>(&self, op: ReduceOp) -> Result<Vec<T>> {
        let mut reduced = self.scattered::<T>(op)?;
        self.groups.replicate.all_reduce(&mut reduced, op)?;
        Ok(reduced)
    }

    fn scattered<T: Float>(&self, op: ReduceOp) -> Result<Vec<T>> {
        let numel = self.flat.trainable_shard_numel();
        let zeros = vec![T::default(); self.zeros_needed()];
        let lent: Vec<_> =
            self.gradients.iter().map(|g| g.as_ref().map(Tensor::storage_and_layout)).collect();
        let mut parts: Vec<&[T]> = Vec::with_capacity(lent.len());
        for (param, lent) in self.flat.trainable().iter().zip(&lent) {
            parts.push(match lent {
                None => &zeros[..param.numel],
                Some((storage, layout)) => slice_of(storage, layout).ok_or_else(|| {
                    let got = format!("a gradient that lies {layout:?} on {:?}", storage.device().location());
                    Error::UnsupportedDType { fqn: param.fqn.clone(), got }
                })?,
            });
        }
        if self.groups.shard.size() == 1 {
            // What one rank scatters is what it has, end to end; zeroing memory for it first would be a pass more.
            let mut whole = Vec::with_capacity(numel);
            parts.iter().for_each(|part| whole.extend_from_slice(part));
            return Ok(whole);
        }
        let mut reduced = vec![T::default(); numel];
        self.groups.shard.reduce_scatter_vectored(&parts, &mut reduced, op)?;
        Ok(reduced)
    }

    /// Length of the longest parameter without gradient.
    fn zeros_needed(&self) -> usize {
        let missing = self.flat.trainable().iter().zip(&self.gradients).filter(|(_, g)| g.is_none());
        missing.map(|(param, _)| param.numel).max().unwrap_or(0)
    }
}

/// Takes room on a device for what is reduced, and notes there that the gradients are written by now.
#[cfg(feature = "cuda")]
fn room(flat: &FlatParameter, pass: &Pass, gradients: &[Option<Tensor>]) -> Result<Option<Storage>> {
    let candle_core::Device::Cuda(device) = &pass.device else { return Ok(None) };
    for (param, gradient) in flat.trainable().iter().zip(gradients) {
        let marked = gradient.as_ref().map_or(Ok(()), crate::cuda::mark_written);
        marked.during(|| format!("gradient of {}", param.fqn))?;
    }
    crate::cuda::reduced_room(flat, pass.precision.reduce_dtype, device).map(Some)
}

/// The CPU needs none.
#[cfg(not(feature = "cuda"))]
fn room(_flat: &FlatParameter, _pass: &Pass, _gradients: &[Option<Tensor>]) -> Result<Option<Storage>> {
    Ok(None)
}
