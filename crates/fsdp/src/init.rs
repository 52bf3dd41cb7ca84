//! Initial values, element by element: the same whatever the layout, so that each rank fills only its shard.

use candle_core::Shape;
use candle_nn::Init;
use candle_nn::init::NormalOrUniform;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Words of the random stream that one element uses.
const WORDS_PER_ELEMENT: u128 = 2;

/// Fills `out` with elements `start..start + out.len()` of parameter `fqn` under `init`.
///
/// Every element has its own place in a counter-based stream chosen by `seed` and `fqn`.
///
/// # Source
/// Distributions of `candle_nn::init`; the values differ from candle's, whose CPU generator cannot be seeded.
pub(crate) fn fill(init: Init, shape: &[usize], seed: u64, fqn: &str, start: usize, out: &mut [f32]) {
    let (mean_or_lo, spread, normal) = match init {
        Init::Const(value) => return out.fill(value as f32),
        Init::Randn { mean, stdev } => (mean, stdev, true),
        Init::Uniform { lo, up } => (lo, up - lo, false),
        Init::Kaiming { dist, fan, non_linearity } => {
            let fan = fan.for_shape(&Shape::from(shape)) as f64;
            let std = non_linearity.gain() / fan.sqrt();
            let bound = 3f64.sqrt() * std;
            match dist {
                NormalOrUniform::Uniform => (-bound, 2.0 * bound, false),
                NormalOrUniform::Normal => (0.0, std, true),
            }
        }
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(fnv1a(fqn));
    rng.set_word_pos(start as u128 * WORDS_PER_ELEMENT);
    for value in out {
        let draw = if normal { standard_normal(&mut rng) } else { unit_uniform(&mut rng) };
        *value = (mean_or_lo + spread * draw) as f32;
    }
}

/// In [0, 1), from 64 bits.
fn unit_uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Box and Muller's transform of two 32-bit words; the second value of the pair is not used, so that each element
/// stands alone.
fn standard_normal(rng: &mut ChaCha8Rng) -> f64 {
    let scale = 1.0 / (1u64 << 32) as f64;
    let radius = (-2.0 * ((rng.next_u32() as f64 + 1.0) * scale).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.next_u32() as f64 * scale).cos()
}

/// The 64-bit FNV-1a hash: a stable number for a name.
fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NORMAL: Init = Init::Randn { mean: 1.0, stdev: 2.0 };
    const KAIMING: Init = candle_nn::init::DEFAULT_KAIMING_UNIFORM;

    fn whole(init: Init, n: usize) -> Vec<f32> {
        let mut out = vec![0.0; n];
        fill(init, &[n / 10, 10], 7, "w", 0, &mut out);
        out
    }

    #[test]
    fn a_part_holds_the_values_of_the_whole() {
        for init in [NORMAL, KAIMING, Init::Uniform { lo: -1.0, up: 1.0 }, Init::Const(3.0)] {
            let whole = whole(init, 1000);
            let mut part = vec![0.0; 13];
            fill(init, &[100, 10], 7, "w", 501, &mut part);
            assert_eq!(part, whole[501..514], "{init:?}");
        }
    }

    #[test]
    fn moments_are_those_of_the_distribution() {
        let values = whole(NORMAL, 100_000);
        let mean = values.iter().sum::<f32>() / 1e5;
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 1e5;
        // Standard error of the mean is 2/sqrt(1e5) = 0.0063, of the variance 4·sqrt(2/1e5) = 0.018.
        assert!((mean - 1.0).abs() < 0.03 && (var - 4.0).abs() < 0.08, "{mean} {var}");
        let bound = (6.0f32 / 10.0).sqrt();
        assert!(whole(KAIMING, 10_000).iter().all(|v| v.abs() <= bound));
    }

    #[test]
    fn names_and_seeds_give_different_values() {
        let mut other = vec![0.0; 10];
        fill(NORMAL, &[1, 10], 7, "v", 0, &mut other);
        assert_ne!(other, whole(NORMAL, 10));
    }
}
