//! gelu: its tanh form in one pass forward and one backward; candle's backward takes fifteen, three of them `powf`.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::composed::is_fused;
use super::kernel::{Kernel, on_storages, on_tensors};
use super::real::Real;

/// The Gaussian error linear unit in its tanh form: x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³))).
///
/// # Errors
/// `x` is no float tensor on the CPU.
///
/// # Source
/// `Tensor::gelu` of candle; `torch.nn.functional.gelu(approximate="tanh")`.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if !is_fused(x) {
        return x.gelu();
    }
    x.contiguous()?.apply_op1(Gelu)
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let [y] = on_storages(&Forward, [(x, layout)])?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = on_tensors(&Backward, [x, grad], [x.shape().clone()])?;
        Ok(Some(dx))
    }
}

/// With u = √(2/π)·(x + c·x³), (1 + tanh u)/2 is the logistic function of 2u: here it and x² are returned.
#[inline(always)]
fn gate<T: Real>(x: T) -> (T, T) {
    let (slope, cubic) = (T::from_real(2.0 * SQRT_2_OVER_PI), T::from_real(2.0 * SQRT_2_OVER_PI * CUBIC));
    let square = x * x;
    let twice_u = x * (slope + cubic * square);
    (T::ONE / (T::ONE + (-twice_u).exp()), square)
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044715;

struct Forward;

impl Kernel<1, 1> for Forward {
    #[inline(always)]
    fn run<T: Real>(&self, [x]: [&[T]; 1]) -> [Vec<T>; 1] {
        [x.iter().map(|x| *x * gate(*x).0).collect()]
    }
}

struct Backward;

impl Kernel<2, 1> for Backward {
    #[inline(always)]
    fn run<T: Real>(&self, [x, grad]: [&[T]; 2]) -> [Vec<T>; 1] {
        let slope = T::from_real(2.0 * SQRT_2_OVER_PI);
        let cubic = T::from_real(6.0 * SQRT_2_OVER_PI * CUBIC);
        let of = |x: T, grad: T| {
            let (gate, square) = gate(x);
            grad * (gate + x * gate * (T::ONE - gate) * (slope + cubic * square))
        };
        [x.iter().zip(grad).map(|(x, grad)| of(*x, *grad)).collect()]
    }
}
