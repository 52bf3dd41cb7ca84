//! Cross entropy of logits, in one pass forward and one backward.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use super::composed::is_fused;
use super::kernel::{Kernel, on_storages, on_tensors};
use super::real::{Real, largest, sum};
use super::softmax::softmax_row;

/// The mean over rows of −ln softmax(logits) at the target class.
///
/// Shapes: logits `[n, classes]`, targets `[n]`, u32 → a scalar.
///
/// # Errors
/// Other shapes, a target that is no class.
///
/// # Source
/// `candle_nn::loss::cross_entropy`; `torch.nn.functional.cross_entropy`.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (n, n_classes) = logits.dims2()?;
    if targets.dims1()? != n {
        bail!("cross entropy: logits are [{n}, {n_classes}], targets {:?}", targets.dims());
    }
    let by_class = targets;
    let targets = targets.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    if let Some(target) = targets.iter().find(|target| **target as usize >= n_classes) {
        bail!("cross entropy: target {target} of {n_classes} classes");
    }
    if !is_fused(logits) {
        return candle_nn::loss::cross_entropy(logits, by_class);
    }
    logits.contiguous()?.apply_op1(CrossEntropy { targets, n_classes })
}

struct CrossEntropy {
    targets: Vec<u32>,
    n_classes: usize,
}

impl CrossEntropy {
    /// The rows of `values`, each with its target.
    #[inline(always)]
    fn rows<'a, T>(&'a self, values: &'a [T]) -> impl Iterator<Item = (&'a [T], usize)> {
        values.chunks_exact(self.n_classes.max(1)).zip(self.targets.iter().map(|target| *target as usize))
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let [loss] = on_storages(&Forward(self), [(logits, layout)])?;
        Ok((loss, Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = on_tensors(&Backward(self), [logits, grad], [logits.shape().clone()])?;
        Ok(Some(dx))
    }
}

struct Forward<'a>(&'a CrossEntropy);

impl Kernel<1, 1> for Forward<'_> {
    #[inline(always)]
    fn run<T: Real>(&self, [logits]: [&[T]; 1]) -> [Vec<T>; 1] {
        let mut total = T::ZERO;
        for (row, target) in self.0.rows(logits) {
            let most = largest(row);
            total += sum(row, |x| (x - most).exp()).ln() + most - row[target];
        }
        [vec![total / T::from_real(self.0.targets.len() as f64)]]
    }
}

struct Backward<'a>(&'a CrossEntropy);

impl Kernel<2, 1> for Backward<'_> {
    #[inline(always)]
    fn run<T: Real>(&self, [logits, grad]: [&[T]; 2]) -> [Vec<T>; 1] {
        let scale = grad[0] / T::from_real(self.0.targets.len() as f64);
        let mut dx = logits.to_vec();
        for (row, target) in dx.chunks_exact_mut(self.0.n_classes.max(1)).zip(&self.0.targets) {
            softmax_row(row);
            row[*target as usize] += -T::ONE;
            row.iter_mut().for_each(|x| *x *= scale);
        }
        [dx]
    }
}
