//! Random numbers by index: the value of an element follows from the seed and its place in the global tensor, so that no
//! layout changes it. No communication.

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sconce_mesh::DType;

use crate::error::CandleContext;
use crate::{Result, TensorBox, copy_runs};

/// What the values are drawn from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Distribution {
    /// From `lo` up to `up`.
    Uniform { lo: f64, up: f64 },
    /// The normal distribution.
    Normal { mean: f64, std: f64 },
}

/// Words of the generator's stream for each element: two numbers of 64 bits.
const WORDS: u128 = 4;

/// The values that `held` has of a tensor of `shape`.
pub(crate) fn values(
    distribution: Distribution,
    seed: u64,
    shape: &[usize],
    held: &TensorBox,
    dtype: DType,
) -> Result<Tensor> {
    let what = || format!("random values of shape {:?} and dtype {dtype}", held.sizes);
    let candle_dtype = candle_core::DType::try_from(dtype)?;
    if !candle_dtype.is_float() {
        let refused = candle_core::Error::UnsupportedDTypeForOp(candle_dtype, "random values");
        return Err(refused).during(what);
    }
    let precision = precision(dtype);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut values = Vec::with_capacity(held.numel());
    for run in copy_runs(held, &TensorBox::whole(shape), held) {
        rng.set_word_pos(run.src as u128 * WORDS);
        values.extend((0..run.len).map(|_| distribution.draw(&mut rng, precision)));
    }
    let tensor = Tensor::from_vec(values, held.sizes.as_slice(), &Device::Cpu);
    tensor.and_then(|t| t.to_dtype(candle_dtype)).during(what)
}

impl Distribution {
    fn draw(self, rng: &mut ChaCha8Rng, precision: u32) -> f64 {
        let (first, second) = (rng.next_u64(), rng.next_u64());
        match self {
            Distribution::Uniform { lo, up } => lo + (up - lo) * unit(first, precision),
            // Box and Muller's transform, of which the sine is left unused: an element must not depend on its neighbour.
            Distribution::Normal { mean, std } => {
                let radius = (-2.0 * (1.0 - unit(first, 53)).ln()).sqrt();
                mean + std * radius * (std::f64::consts::TAU * unit(second, 53)).cos()
            }
        }
    }
}

/// Bits of a dtype's significand: numbers in steps of so many bits are not rounded, so that none becomes 1.
fn precision(dtype: DType) -> u32 {
    match dtype {
        DType::BF16 => 8,
        DType::F16 => 11,
        DType::F32 => 24,
        _ => 53,
    }
}

/// From 0 up to, but without, 1, in steps of 2^-precision.
fn unit(bits: u64, precision: u32) -> f64 {
    (bits >> (64 - precision)) as f64 / (1u64 << precision) as f64
}
