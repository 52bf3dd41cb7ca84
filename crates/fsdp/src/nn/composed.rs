//! The fused modules' values out of candle's own ops: what runs on devices other than the CPU, where the fused passes are
//! not written. Gradients are candle's.

use candle_core::{D, DType, Result, Tensor};

/// Whether the fused passes can compute with `x`.
pub(super) fn is_fused(x: &Tensor) -> bool {
    x.device().is_cpu()
}

/// Normalizes over the last dim; halves are widened meanwhile.
pub(super) fn norm(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    (remove_mean, eps): (bool, f64),
) -> Result<Tensor> {
    let dtype = x.dtype();
    let wide = match dtype {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
        _ => x.clone(),
    };
    let centered = match remove_mean {
        true => wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?,
        false => wide,
    };
    let scale = (centered.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let scaled = centered.broadcast_div(&scale)?.to_dtype(dtype)?.broadcast_mul(weight)?;
    bias.map_or(Ok(scaled.clone()), |bias| scaled.broadcast_add(bias))
}

/// softmax(q·kᵀ/√d)·v of every head of packed projections.
pub(super) fn attention(qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (batch, context, packed) = qkv.dims3()?;
    let (width, head_dim) = (packed / 3, packed / 3 / heads);
    let part = |nth: usize| {
        let part = qkv.narrow(D::Minus1, nth * width, width)?;
        part.reshape((batch, context, heads, head_dim))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
    let seen = if causal { scores.broadcast_add(&unseen(context, &scores)?)? } else { scores };
    let weights = candle_nn::ops::softmax(&seen, D::Minus1)?;
    weights.matmul(&v)?.transpose(1, 2)?.reshape((batch, context, width))
}

/// −∞ where a position would see a later one.
fn unseen(context: usize, like: &Tensor) -> Result<Tensor> {
    let of = |row: usize| (0..context).map(move |column| if column > row { f32::NEG_INFINITY } else { 0.0 });
    let mask: Vec<f32> = (0..context).flat_map(of).collect();
    Tensor::from_vec(mask, (context, context), like.device())?.to_dtype(like.dtype())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Module, Var};

    use super::*;
    use crate::nn;

    fn random(shape: &[usize]) -> Var {
        Var::from_tensor(&Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()).unwrap()
    }

    /// Values and the gradient of the first input, which both ways must agree on.
    #[track_caller]
    fn check(
        x: &Var,
        fused: impl Fn(&Tensor) -> Result<Tensor>,
        composed: impl Fn(&Tensor) -> Result<Tensor>,
    ) {
        let of = |f: &dyn Fn(&Tensor) -> Result<Tensor>| {
            let y = f(x).unwrap();
            let loss = y.sqr().unwrap().sum_all().unwrap();
            let gradient = loss.backward().unwrap().get(x).unwrap().clone();
            [y, gradient].map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        };
        for (fused, composed) in of(&fused).iter().zip(&of(&composed)) {
            // Sums of up to 24 terms in another order.
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * (1.0 + a.abs());
            assert!(
                fused.len() == composed.len() && fused.iter().zip(composed).all(close),
                "{fused:?}\n{composed:?}"
            );
        }
    }

    #[test]
    fn norms_out_of_candles_ops_equal_the_fused_ones() {
        let (x, weight, bias) = (random(&[3, 2, 7]), random(&[7]), random(&[7]));
        let (w, b) = (weight.as_tensor(), bias.as_tensor());
        let layer = nn::LayerNorm::new(w.clone(), b.clone(), 1e-5);
        check(&x, |x| layer.forward(x), |x| norm(x, w, Some(b), (true, 1e-5)));
        let rms = nn::RmsNorm::new(w.clone(), 1e-5);
        check(&x, |x| rms.forward(x), |x| norm(x, w, None, (false, 1e-5)));
    }

    #[test]
    fn attention_out_of_candles_ops_equals_the_fused_one() {
        let qkv = random(&[2, 5, 24]);
        check(&qkv, |x| nn::attention(x, 4), |x| attention(x, 4, false));
        check(&qkv, |x| nn::causal_attention(x, 2), |x| attention(x, 2, true));
    }
}
