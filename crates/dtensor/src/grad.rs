//! How gradients flow through what candle cannot see: a tensor that was computed elsewhere stands in the graph as a
//! function of one that candle knows.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::{BackendDevice as _, BackendStorage as _};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, InplaceOp1, Layout, Shape, Tensor};

use crate::error::CandleContext;
use crate::{Placement, Result};

/// The placements that the gradient of a tensor has: its own, but whole where the tensor has pending terms, since each
/// term's gradient is that of their sum.
///
/// # Source
/// `_normalize_placements_for_grad` of `torch/distributed/tensor/_api.py`.
pub(crate) fn grad_placements(placements: &[Placement]) -> Vec<Placement> {
    let whole = |p: &Placement| if p.is_partial() { Placement::Replicate } else { *p };
    placements.iter().map(whole).collect()
}

/// `value`, a fresh tensor, as a function of `arg` whose gradient is what `backward` makes of the gradient of `value`.
pub(crate) fn attach(
    arg: &Tensor,
    value: Tensor,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !arg.track_op() {
        return Ok(value);
    }
    let shape = value.shape().clone();
    let op = Attached { storage: Mutex::new(take_storage(&value)?), shape, backward };
    arg.apply_op1(op).during(|| "entering a redistributed tensor in the graph".to_owned())
}

/// `arg` itself, whose gradient passes through `backward`.
pub(crate) fn with_backward(
    arg: &Tensor,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !arg.track_op() {
        return Ok(arg.clone());
    }
    let copy = arg.detach().force_contiguous().during(|| "marking a tensor in the graph".to_owned())?;
    attach(arg, copy, backward)
}

/// `result`, which is empty, as a function of all `args`.
///
/// candle drops operands of ops on nothing; but the backward passes of operands may be collective, so that a rank that
/// holds nothing must run them too.
pub(crate) fn of_all(result: Tensor, args: &[Tensor]) -> Result<Tensor> {
    let tracked = args.iter().filter(|arg| arg.track_op());
    tracked.into_iter().try_fold(result, |result, arg| {
        result.apply_op2(arg, Nothing).during(|| "entering an empty tensor in the graph".to_owned())
    })
}

/// The first operand, which is empty; the second only gets a gradient of zeros.
struct Nothing;

impl CustomOp2 for Nothing {
    fn name(&self) -> &'static str {
        "sconce-nothing"
    }

    fn cpu_fwd(
        &self,
        first: &CpuStorage,
        layout: &Layout,
        _second: &CpuStorage,
        _second_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let empty = candle_core::cpu_backend::CpuDevice.zeros_impl(layout.shape(), first.dtype())?;
        Ok((empty, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _first: &Tensor,
        second: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad_res.clone()), Some(second.zeros_like()?)))
    }
}

struct Attached<F> {
    /// Until the op has run; absent for an empty tensor.
    storage: Mutex<Option<CpuStorage>>,
    shape: Shape,
    backward: F,
}

impl<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync> CustomOp1 for Attached<F> {
    fn name(&self) -> &'static str {
        "sconce-redistribute"
    }

    fn cpu_fwd(&self, arg: &CpuStorage, _layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let ready = self.storage.lock().unwrap_or_else(PoisonError::into_inner).take();
        let storage = match ready {
            Some(storage) => storage,
            None => candle_core::cpu_backend::CpuDevice.zeros_impl(&self.shape, arg.dtype())?,
        };
        Ok((storage, self.shape.clone()))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad_res: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = (self.backward)(grad_res).map_err(candle_core::Error::wrap)?;
        Ok(Some(grad.reshape(arg.shape())?))
    }
}

/// The storage of a tensor that nobody else holds; `None` if it is empty.
fn take_storage(value: &Tensor) -> Result<Option<CpuStorage>> {
    if value.elem_count() == 0 {
        return Ok(None);
    }
    let taken = Take(Mutex::new(None));
    value.inplace_op1(&taken).during(|| format!("taking a tensor of shape {:?}", value.dims()))?;
    Ok(taken.0.into_inner().unwrap_or_else(PoisonError::into_inner))
}

struct Take(Mutex<Option<CpuStorage>>);

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "sconce-take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _layout: &Layout) -> candle_core::Result<()> {
        let taken = std::mem::replace(storage, CpuStorage::U8(Vec::new()));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(taken);
        Ok(())
    }
}
