//! Softmax over the last dim, with a backward.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};

use super::composed::is_fused;
use super::kernel::{Kernel, on_storages, on_tensors};
use super::real::{Real, largest, sum, sum2};

/// exp(x) over its sum along the last dim.
///
/// # Errors
/// `x` is a scalar, or no float tensor on the CPU.
///
/// # Source
/// `candle_nn::ops::softmax_last_dim`, which has no backward; `torch.softmax(x, -1)`.
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if !is_fused(x) {
        return candle_nn::ops::softmax(x, D::Minus1);
    }
    x.contiguous()?.apply_op1(Softmax { width })
}

struct Softmax {
    width: usize,
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax-last-dim"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let [y] = on_storages(&Forward { width: self.width }, [(x, layout)])?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = on_tensors(&Backward { width: self.width }, [y, grad], [x.shape().clone()])?;
        Ok(Some(dx))
    }
}

struct Forward {
    width: usize,
}

impl Kernel<1, 1> for Forward {
    #[inline(always)]
    fn run<T: Real>(&self, [x]: [&[T]; 1]) -> [Vec<T>; 1] {
        let mut y = x.to_vec();
        y.chunks_exact_mut(self.width.max(1)).for_each(softmax_row);
        [y]
    }
}

/// Replaces a row by its softmax.
#[inline(always)]
pub(super) fn softmax_row<T: Real>(row: &mut [T]) {
    let most = largest(row);
    row.iter_mut().for_each(|x| *x = (*x - most).exp());
    let total = sum(row, |x| x);
    let scale = T::ONE / total;
    row.iter_mut().for_each(|x| *x *= scale);
}

struct Backward {
    width: usize,
}

impl Kernel<2, 1> for Backward {
    #[inline(always)]
    fn run<T: Real>(&self, [y, grad]: [&[T]; 2]) -> [Vec<T>; 1] {
        let mut dx = grad.to_vec();
        let rows = dx.chunks_exact_mut(self.width.max(1)).zip(y.chunks_exact(self.width.max(1)));
        rows.for_each(|(grad, y)| softmax_row_backward(grad, y));
        [dx]
    }
}

/// Replaces the gradient of a row's softmax `y` by the gradient of the row.
#[inline(always)]
pub(super) fn softmax_row_backward<T: Real>(grad: &mut [T], y: &[T]) {
    let along = sum2(grad, y, |grad, y| grad * y);
    grad.iter_mut().zip(y).for_each(|(grad, y)| *grad = *y * (*grad - along));
}
