//! Reductions over tensor dims: sums of split dims stay pending, extremes are found at once.

use candle_core::Tensor;
use sconce_mesh::ReduceOp;

use super::{Rule, apply};
use crate::error::CandleContext;
use crate::grad::{attach, grad_placements, of_all};
use crate::placement::tensor_dim;
use crate::{DTensor, DTensorSpec, Error, Placement, Result};

impl DTensor {
    /// The sum over `dims`, which stay with length 1. Dims that are split give a pending sum, and no communication.
    ///
    /// # Errors
    /// `ShapeMismatch` for a dim that the tensor lacks; what candle reports.
    pub fn sum_keepdim(&self, dims: &[isize]) -> Result<DTensor> {
        let dims = resolve(self, dims)?;
        let mut shape = self.shape().to_vec();
        dims.iter().for_each(|dim| shape[*dim] = 1);
        let linear = [ReduceOp::Sum, ReduceOp::Avg].map(Placement::Partial).into_iter();
        let shards = (0..shape.len()).map(|dim| Placement::Shard(dim as isize));
        let output = |input: Placement| match input.shard_dim(shape.len()) {
            Some(dim) if dims.contains(&dim) => Placement::Partial(ReduceOp::Sum),
            _ => input,
        };
        let inputs = shards.chain(linear).chain([Placement::Replicate]);
        let rules: Vec<Rule> = inputs.map(|input| Rule::new([input], output(input))).collect();
        apply("sum", &[self], &shape, &rules, |parts| parts[0].sum_keepdim(dims.as_slice()))
    }

    /// The mean over `dims`, which stay with length 1. Dims that are split give a pending sum, and no communication.
    ///
    /// # Errors
    /// `ShapeMismatch` for a dim that the tensor lacks; what candle reports.
    pub fn mean_keepdim(&self, dims: &[isize]) -> Result<DTensor> {
        let n: usize = resolve(self, dims)?.iter().map(|dim| self.shape()[*dim]).product();
        self.sum_keepdim(dims)?.scale(1.0 / n as f64)
    }

    /// The sum of all elements, of shape `[]`.
    ///
    /// # Errors
    /// What candle reports.
    pub fn sum_all(&self) -> Result<DTensor> {
        let dims: Vec<isize> = (0..self.shape().len() as isize).collect();
        self.sum_keepdim(&dims)?.reshape(&[])
    }

    /// The mean of all elements, of shape `[]`.
    ///
    /// # Errors
    /// What candle reports.
    pub fn mean_all(&self) -> Result<DTensor> {
        let dims: Vec<isize> = (0..self.shape().len() as isize).collect();
        self.mean_keepdim(&dims)?.reshape(&[])
    }

    /// The largest element along `dim`, which stays with length 1. Along mesh dims that split it, the ranks compare
    /// theirs, and all have the result.
    ///
    /// The gradient goes to every element that is the largest, as in candle.
    ///
    /// # Errors
    /// `ShapeMismatch` for a dim that the tensor lacks or that is empty; what the collectives and candle report.
    pub fn max_keepdim(&self, dim: isize) -> Result<DTensor> {
        self.extreme(dim, ReduceOp::Max)
    }

    /// The smallest element along `dim`, as [`DTensor::max_keepdim`].
    ///
    /// # Errors
    /// As [`DTensor::max_keepdim`].
    pub fn min_keepdim(&self, dim: isize) -> Result<DTensor> {
        self.extreme(dim, ReduceOp::Min)
    }

    /// The softmax along `dim`, which may be split.
    ///
    /// # Errors
    /// `ShapeMismatch` for a dim that the tensor lacks or that is empty; what the collectives and candle report.
    pub fn softmax(&self, dim: isize) -> Result<DTensor> {
        let whole = self.redistribute(&grad_placements(self.placements()))?;
        let fixed = DTensor::of_part(&whole.to_local().detach(), whole.spec().clone())?;
        let exp = whole.sub(&fixed.max_keepdim(dim)?)?.exp()?;
        exp.div(&exp.sum_keepdim(&[dim])?)
    }

    fn extreme(&self, dim: isize, op: ReduceOp) -> Result<DTensor> {
        let dim = resolve(self, &[dim])?[0];
        if self.shape()[dim] == 0 {
            let (what, got) = (format!("{op} along dim {dim}, which is empty"), self.shape().to_vec());
            return Err(Error::ShapeMismatch { what, expected: vec![1], got });
        }
        let whole = self.redistribute(&grad_placements(self.placements()))?;
        let split = Placement::Shard(dim as isize);
        let (mut shape, local) = (self.shape().to_vec(), whole.to_local());
        shape[dim] = 1;
        let with = |instead: Placement| {
            whole.placements().iter().map(|p| if *p == split { instead } else { *p }).collect::<Vec<_>>()
        };
        let spec = |placements| DTensorSpec { placements, shape: shape.clone(), ..whole.spec().clone() };
        if !whole.placements().contains(&split) {
            let mut result = own_extreme(local, dim, op).during(|| format!("{op} along dim {dim}"))?;
            if result.elem_count() == 0 {
                result = of_all(result, std::slice::from_ref(local))?;
            }
            return DTensor::of_part(&result, spec(whole.placements().to_vec()));
        }
        let own = own_extreme(&local.detach(), dim, op).during(|| format!("{op} along dim {dim}"))?;
        let pending = DTensor::of_part(&own, spec(with(Placement::Partial(op))))?;
        let (found, spec) = pending.redistribute(&with(Placement::Replicate))?.into_parts();
        let is_it = local.detach().broadcast_eq(&found).and_then(|is_it| is_it.to_dtype(found.dtype()));
        let is_it = is_it.during(|| format!("{op} along dim {dim}"))?;
        let backward = move |grad: &Tensor| {
            is_it.broadcast_mul(grad).during(|| format!("gradient of {op} along dim {dim}"))
        };
        DTensor::of_part(&attach(local, found, backward)?, spec)
    }
}

/// The extreme of what this rank holds along `dim`; of nothing, what any element surpasses.
fn own_extreme(local: &Tensor, dim: usize, op: ReduceOp) -> candle_core::Result<Tensor> {
    if local.dims()[dim] > 0 && local.elem_count() > 0 {
        return if op == ReduceOp::Max { local.max_keepdim(dim) } else { local.min_keepdim(dim) };
    }
    let mut shape = local.dims().to_vec();
    shape[dim] = 1;
    let least = if op == ReduceOp::Max { f64::NEG_INFINITY } else { f64::INFINITY };
    Tensor::full(least, shape, local.device())?.to_dtype(local.dtype())
}

fn resolve(tensor: &DTensor, dims: &[isize]) -> Result<Vec<usize>> {
    let ndim = tensor.shape().len();
    let one = |dim: &isize| {
        tensor_dim(*dim, ndim).ok_or_else(|| Error::ShapeMismatch {
            what: format!("dim {dim} of a tensor with {ndim} dims"),
            expected: vec![],
            got: tensor.shape().to_vec(),
        })
    };
    dims.iter().map(one).collect()
}
