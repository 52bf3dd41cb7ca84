//! Linear: y = x·wᵀ + b, whose backward writes the gradient of w once, as w lies.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Module, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder};

use super::composed::is_fused;
use super::kernel::{Kernel, Lent, on_storages, on_tensors};
use super::param::Param;
use super::real::Real;

/// Up to so many rows the products are computed as their transposes: a product packs the operand on its right, and what
/// packing the weight takes is paid back by many rows only. 32 rows of 1024 took 0.92 ms instead of 1.43 through a weight
/// `[1024, 1024]`, and 0.97 instead of 2.06 backward, where it pays for half as many rows.
const FEW_ROWS: usize = 64;

/// Elements of a weight from which on that holds backward: smaller ones stay in a cache.
const LARGE_WEIGHT: usize = 512 << 10;

/// A linear layer over the last dim.
///
/// Shapes: `[…, in]` → `[…, out]`, weight `[out, in]`, bias `[out]`.
///
/// # Source
/// `candle_nn::Linear`; `torch.nn.Linear`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
}

impl Linear {
    /// A layer of the given parameters; tied ones may be shared with other modules.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight: Param::new(weight), bias: bias.map(Param::new) }
    }

    /// `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        self.weight.tensor()
    }

    /// `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref().map(Param::tensor)
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !is_fused(x) {
            let bias = self.bias.as_ref().map(|bias| bias.tensor().clone());
            return candle_nn::Linear::new(self.weight.tensor().clone(), bias).forward(x);
        }
        let (x, weight, bias) = (x.contiguous()?, self.weight.argument(), self.bias.as_ref());
        let op = Product { weight: self.weight.clone(), bias: self.bias.clone() };
        match bias {
            None => x.apply_op2(weight, op),
            Some(bias) => x.apply_op3(weight, bias.argument(), op),
        }
    }
}

/// A layer with `weight` and `bias` of `vb`, initialized as candle_nn's.
///
/// # Errors
/// What `vb` answers.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder<'_>) -> Result<Linear> {
    let weight = weight(in_dim, out_dim, &vb)?;
    let bound = 1.0 / (in_dim as f64).sqrt();
    let bias = vb.get_with_hints(out_dim, "bias", Init::Uniform { lo: -bound, up: bound })?;
    Ok(Linear::new(weight, Some(bias)))
}

/// A layer with `weight` of `vb` and no bias.
///
/// # Errors
/// What `vb` answers.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder<'_>) -> Result<Linear> {
    Ok(Linear::new(weight(in_dim, out_dim, &vb)?, None))
}

/// [`linear`] or [`linear_no_bias`], as `bias` says.
///
/// # Errors
/// What `vb` answers.
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder<'_>) -> Result<Linear> {
    if bias { linear(in_dim, out_dim, vb) } else { linear_no_bias(in_dim, out_dim, vb) }
}

fn weight(in_dim: usize, out_dim: usize, vb: &VarBuilder<'_>) -> Result<Tensor> {
    vb.get_with_hints((out_dim, in_dim), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)
}

/// The op; it holds the parameters because its arguments may be their tokens.
struct Product {
    weight: Param,
    bias: Option<Param>,
}

impl Product {
    fn product(&self, (x, x_layout): Lent<'_>, weight: Lent<'_>) -> Result<(CpuStorage, Shape)> {
        self.weight.lend(weight, |(w, w_layout)| {
            let (n_out, n_in) = w_layout.shape().dims2()?;
            let dims = x_layout.dims();
            let Some((&last, outer)) = dims.split_last().filter(|(last, _)| **last == n_in) else {
                bail!("linear: weight is [{n_out}, {n_in}], x is {dims:?}");
            };
            let rows = outer.iter().product();
            let x_layout = Layout::contiguous_with_offset((rows, last), x_layout.start_offset());
            let y = if rows <= FEW_ROWS {
                let columns = w.matmul(x, (1, n_out, rows, n_in), w_layout, &x_layout.transpose(0, 1)?)?;
                let layout = Layout::contiguous((n_out, rows));
                let [y] = on_storages(&Transpose { n_columns: rows }, [(&columns, &layout)])?;
                y
            } else {
                x.matmul(w, (1, rows, n_out, n_in), &x_layout, &w_layout.transpose(0, 1)?)?
            };
            let mut shape = outer.to_vec();
            shape.push(n_out);
            Ok((y, Shape::from(shape)))
        })
    }

    /// Gradients of x and of what stands for the weight.
    fn backward(&self, x: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let weight = self.weight.values();
        let (n_out, n_in) = weight.dims2()?;
        let grad = grad.contiguous()?.reshape(((), n_out))?.detach();
        let dx = match x.track_op() {
            true => Some(backward_rows(&grad, &weight)?.reshape(x.shape())?),
            false => None,
        };
        let dw = self.weight.backward(|| grad.t()?.matmul(&x.detach().reshape(((), n_in))?))?;
        Ok((dx, dw))
    }
}

/// `grad`·`weight`: the gradient of the rows that came in.
fn backward_rows(grad: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, n_in) = (grad.dim(0)?, weight.dim(1)?);
    if rows > FEW_ROWS / 2 || weight.elem_count() < LARGE_WEIGHT {
        return grad.matmul(weight);
    }
    let columns = weight.t()?.matmul(&grad.t()?)?;
    let [dx] = on_tensors(&Transpose { n_columns: rows }, [&columns], [Shape::from((rows, n_in))])?;
    Ok(dx)
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.product((x, xl), (w, wl))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(x, grad)
    }
}

impl CustomOp3 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, shape) = self.product((x, xl), (w, wl))?;
        let Some(bias) = &self.bias else { bail!("linear: three arguments without a bias") };
        let y_layout = Layout::contiguous(&shape);
        let [y] = bias.lend((b, bl), |bias| on_storages(&AddBias, [(&y, &y_layout), bias]))?;
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _w: &Tensor,
        _b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = self.backward(x, grad)?;
        let Some(bias) = &self.bias else { bail!("linear: three arguments without a bias") };
        let n_out = bias.tensor().dims1()?;
        let db = bias.backward(|| {
            let [sums] = on_tensors(&ColumnSums { n_columns: n_out }, [grad], [Shape::from(n_out)])?;
            Ok(sums)
        })?;
        Ok((dx, dw, db))
    }
}

/// A matrix with its rows and columns exchanged.
struct Transpose {
    /// Of the input.
    n_columns: usize,
}

impl Kernel<1, 1> for Transpose {
    #[inline(always)]
    fn run<T: Real>(&self, [values]: [&[T]; 1]) -> [Vec<T>; 1] {
        /// Rows of the input that make one run of the output: a cache line of it in f32.
        const RUN: usize = 16;
        let n_rows = values.len() / self.n_columns.max(1);
        let mut transposed = vec![T::ZERO; values.len()];
        for (nth, rows) in values.chunks(RUN * self.n_columns.max(1)).enumerate() {
            for column in 0..self.n_columns {
                let run = &mut transposed[column * n_rows + nth * RUN..];
                for (to, row) in run.iter_mut().zip(rows.chunks_exact(self.n_columns)) {
                    *to = row[column];
                }
            }
        }
        [transposed]
    }
}

/// y + b in every row.
struct AddBias;

impl Kernel<2, 1> for AddBias {
    #[inline(always)]
    fn run<T: Real>(&self, [y, bias]: [&[T]; 2]) -> [Vec<T>; 1] {
        let mut sum = Vec::with_capacity(y.len());
        for row in y.chunks_exact(bias.len().max(1)) {
            sum.extend(row.iter().zip(bias).map(|(y, b)| *y + *b));
        }
        [sum]
    }
}

/// The sum of every column.
struct ColumnSums {
    n_columns: usize,
}

impl Kernel<1, 1> for ColumnSums {
    #[inline(always)]
    fn run<T: Real>(&self, [values]: [&[T]; 1]) -> [Vec<T>; 1] {
        let mut sums = vec![T::ZERO; self.n_columns];
        for row in values.chunks_exact(self.n_columns.max(1)) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += *value;
            }
        }
        [sums]
    }
}
