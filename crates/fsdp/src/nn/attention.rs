//! Attention of packed projections: the products, the softmax between them, and their backward in one op.
//!
//! ```text
//!   qkv [batch, context, 3·width] = | q: head 0, head 1, … | k: head 0, … | v: head 0, … |   as one projection writes it
//!   for each batch and head:  p = softmax(q·kᵀ/√d) [context, context],  out = p·v [context, d]
//!   out [batch, context, width]   = | head 0, head 1, … |                                     as the next one reads it
//! ```
//!
//! candle's way there and back takes three copies to split q, k and v, and in backward a zero-padded sum of the whole
//! for each of them.

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use super::composed::{self, is_fused};
use super::kernel::{Kernel, Lent, on_cpu, on_storages, tensor};
use super::real::Real;
use super::softmax::{softmax_row, softmax_row_backward};

/// softmax(q·kᵀ/√d)·v of every head, each position seeing all.
///
/// Shapes: `[batch, context, 3·width]`, the heads of q, then of k, then of v → `[batch, context, width]`.
///
/// # Errors
/// Other shapes, no float tensor on the CPU.
///
/// # Source
/// `torch.nn.functional.scaled_dot_product_attention`, on what one projection to q, k and v returns.
pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    apply(qkv, heads, false)
}

/// As [`attention`], each position seeing itself and those before it.
///
/// # Errors
/// As [`attention`].
///
/// # Source
/// `torch.nn.functional.scaled_dot_product_attention(is_causal=True)`.
pub fn causal_attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    apply(qkv, heads, true)
}

fn apply(qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (batch, context, packed) = qkv.dims3()?;
    if heads == 0 || !packed.is_multiple_of(3 * heads) {
        bail!("attention: {packed} columns are not q, k and v of {heads} heads");
    }
    let dims = Dims { batch, context, heads, head_dim: packed / 3 / heads };
    if !is_fused(qkv) {
        return composed::attention(qkv, heads, causal);
    }
    let op = Attention { dims, causal, weights: OnceLock::new() };
    match qkv.dtype() {
        dtype @ (DType::BF16 | DType::F16) => qkv.to_dtype(DType::F32)?.apply_op1(op)?.to_dtype(dtype),
        _ => qkv.contiguous()?.apply_op1(op),
    }
}

#[derive(Debug, Clone, Copy)]
struct Dims {
    batch: usize,
    context: usize,
    heads: usize,
    head_dim: usize,
}

impl Dims {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Part `nth` of `parts` side by side in batch element `b` of a contiguous tensor, as `[heads, context, head_dim]`.
    fn part(&self, whole: &Layout, b: usize, nth: usize, parts: usize) -> Layout {
        let row = parts * self.width();
        let start = whole.start_offset() + b * self.context * row + nth * self.width();
        Layout::new(self.by_head(), vec![self.head_dim, row, 1], start)
    }

    fn by_head(&self) -> Shape {
        Shape::from((self.heads, self.context, self.head_dim))
    }

    /// Of the weights of a batch element.
    fn square(&self) -> Layout {
        Layout::contiguous((self.heads, self.context, self.context))
    }

    /// Batch, m, n, k of the products whose result is `[heads, context, context]`.
    fn to_weights(self) -> (usize, usize, usize, usize) {
        (self.heads, self.context, self.context, self.head_dim)
    }

    /// And of those whose result is `[heads, context, head_dim]`.
    fn to_values(self) -> (usize, usize, usize, usize) {
        (self.heads, self.context, self.head_dim, self.context)
    }
}

struct Attention {
    dims: Dims,
    causal: bool,
    /// The softmax of each batch element, `[heads, context, context]`, from forward for backward.
    weights: OnceLock<Vec<CpuStorage>>,
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let dims = self.dims;
        let (mut weights, mut values) = (Vec::with_capacity(dims.batch), Vec::with_capacity(dims.batch));
        for b in 0..dims.batch {
            let (p, out) = self.forward((qkv, layout), b)?;
            weights.push(p);
            values.push([out]);
        }
        // The op is new in each forward, so nothing is there yet.
        let _ = self.weights.set(weights);
        let shape = Shape::from((dims.batch, dims.context, dims.width()));
        Ok((side_by_side(&values, dims, qkv.dtype())?, shape))
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some(weights) = self.weights.get() else { bail!("attention: backward before forward") };
        let grad = grad.contiguous()?;
        let (qkv_lent, grad_lent) = (qkv.storage_and_layout(), grad.storage_and_layout());
        let (qkv_lent, grad_lent) = (on_cpu(&qkv_lent)?, on_cpu(&grad_lent)?);
        let parts = weights.iter().enumerate().map(|(b, p)| self.backward(qkv_lent, p, grad_lent, b));
        let dqkv = side_by_side(&parts.collect::<Result<Vec<_>>>()?, self.dims, qkv.dtype())?;
        Ok(Some(tensor(dqkv, qkv.shape().clone())))
    }
}

impl Attention {
    /// The softmax of batch element `b`, and its product with v, `[heads, context, head_dim]`.
    fn forward(&self, (qkv, layout): Lent<'_>, b: usize) -> Result<(CpuStorage, CpuStorage)> {
        let (dims, square) = (self.dims, self.dims.square());
        let [q, k, v] = [0, 1, 2].map(|nth| dims.part(layout, b, nth, 3));
        let scores = qkv.matmul(qkv, dims.to_weights(), &q, &k.transpose(1, 2)?)?;
        let [p] = on_storages(&self.softmax(), [(&scores, &square)])?;
        let values = p.matmul(qkv, dims.to_values(), &square, &v)?;
        Ok((p, values))
    }

    /// Gradients of q, k and v, each `[heads, context, head_dim]`, of batch element `b`.
    fn backward(
        &self,
        (qkv, layout): Lent<'_>,
        p: &CpuStorage,
        (grad, grad_layout): Lent<'_>,
        b: usize,
    ) -> Result<[CpuStorage; 3]> {
        let (dims, square) = (self.dims, self.dims.square());
        let [q, k, v] = [0, 1, 2].map(|nth| dims.part(layout, b, nth, 3));
        let (out, turned) = (dims.part(grad_layout, b, 0, 1), square.transpose(1, 2)?);
        let dv = p.matmul(grad, dims.to_values(), &turned, &out)?;
        let dp = grad.matmul(qkv, dims.to_weights(), &out, &v.transpose(1, 2)?)?;
        let [ds] = on_storages(&self.softmax(), [(&dp, &square), (p, &square)])?;
        let dq = ds.matmul(qkv, dims.to_values(), &square, &k)?;
        let dk = ds.matmul(qkv, dims.to_values(), &turned, &q)?;
        Ok([dq, dk, dv])
    }

    fn softmax(&self) -> ScaledSoftmax {
        let scale = 1.0 / (self.dims.head_dim as f64).sqrt();
        ScaledSoftmax { context: self.dims.context, scale, causal: self.causal }
    }
}

/// The softmax of scaled scores, row by row; a causal one sees the first `i + 1` columns of row `i`.
struct ScaledSoftmax {
    context: usize,
    scale: f64,
    causal: bool,
}

impl ScaledSoftmax {
    /// How many columns row `nth` of a batch element sees.
    #[inline(always)]
    fn seen(&self, nth: usize) -> usize {
        if self.causal { nth % self.context + 1 } else { self.context }
    }
}

impl Kernel<1, 1> for ScaledSoftmax {
    #[inline(always)]
    fn run<T: Real>(&self, [scores]: [&[T]; 1]) -> [Vec<T>; 1] {
        let scale = T::from_real(self.scale);
        let mut p = Vec::with_capacity(scores.len());
        for (nth, row) in scores.chunks_exact(self.context.max(1)).enumerate() {
            let (start, seen) = (p.len(), self.seen(nth));
            p.extend(row[..seen].iter().map(|score| *score * scale));
            softmax_row(&mut p[start..]);
            p.resize(start + self.context, T::ZERO);
        }
        [p]
    }
}

/// Gradient of the weights and the weights to the gradient of the scores.
impl Kernel<2, 1> for ScaledSoftmax {
    #[inline(always)]
    fn run<T: Real>(&self, [grad, p]: [&[T]; 2]) -> [Vec<T>; 1] {
        let scale = T::from_real(self.scale);
        let mut ds = grad.to_vec();
        let rows = ds.chunks_exact_mut(self.context.max(1)).zip(p.chunks_exact(self.context.max(1)));
        for (nth, (row, p)) in rows.enumerate() {
            let (row, unseen) = row.split_at_mut(self.seen(nth));
            softmax_row_backward(row, &p[..row.len()]);
            row.iter_mut().for_each(|x| *x *= scale);
            unseen.fill(T::ZERO);
        }
        [ds]
    }
}

/// `PARTS` of `[heads, context, head_dim]` a batch element as one `[batch, context, PARTS·width]`.
fn side_by_side<const PARTS: usize>(
    batch: &[[CpuStorage; PARTS]],
    dims: Dims,
    dtype: DType,
) -> Result<CpuStorage> {
    match dtype {
        DType::F32 => packed::<f32, PARTS>(batch, dims).map(CpuStorage::F32),
        DType::F64 => packed::<f64, PARTS>(batch, dims).map(CpuStorage::F64),
        other => bail!("attention takes float tensors, got storage of {other:?}"),
    }
}

fn packed<T: Real, const PARTS: usize>(batch: &[[CpuStorage; PARTS]], dims: Dims) -> Result<Vec<T>> {
    let mut packed = Vec::with_capacity(batch.len() * dims.context * PARTS * dims.width());
    for parts in batch {
        let mut slices = [[].as_slice(); PARTS];
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = T::cpu_storage_as_slice(part)?;
        }
        for position in 0..dims.context {
            for (part, head) in slices.iter().flat_map(|part| (0..dims.heads).map(move |head| (part, head))) {
                let start = (head * dims.context + position) * dims.head_dim;
                packed.extend_from_slice(&part[start..start + dims.head_dim]);
            }
        }
    }
    Ok(packed)
}
