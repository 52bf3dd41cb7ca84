//! Real: the element types that fused kernels compute in, with functions that vectorize.

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use candle_core::WithDType;

/// Partial sums of a reduction: enough to fill a vector register, in an order that does not depend on the machine.
const LANES: usize = 16;

/// A float that kernels compute in.
pub(super) trait Real:
    WithDType
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    fn from_real(value: f64) -> Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;
    /// The larger one; NaN if either is.
    fn larger(self, other: Self) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn from_real(value: f64) -> Self {
        value as f32
    }

    /// Within 2 units in the last place; results below the smallest normal number are 0.
    ///
    /// # Source
    /// `expf` of the Cephes library: eˣ = 2ⁿ · eʳ with |r| ≤ ln 2 / 2, and a polynomial of degree 6 for eʳ. The standard
    /// library's is a call that cannot be vectorized.
    #[inline(always)]
    #[allow(clippy::excessive_precision, reason = "the constants as Cephes gives them")]
    fn exp(self) -> Self {
        // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        const LN_2_HIGH: f32 = 0.693_359_375;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        let x = self.clamp(-87.0, 88.5);
        let rounded = x * std::f32::consts::LOG2_E + ROUND;
        let n = rounded - ROUND;
        let r = x - n * LN_2_HIGH - n * LN_2_LOW;
        let mut p = 1.987_569_15e-4;
        for coefficient in [1.398_199_95e-3, 8.333_451_9e-3, 4.166_579_6e-2, 1.666_666_55e-1, 5.000_000_1e-1]
        {
            p = p * r + coefficient;
        }
        let p = p * r * r + r + 1.0;
        let result = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
        let result = if self < -87.0 { 0.0 } else { result };
        let result = if self > 88.5 { f32::INFINITY } else { result };
        if self.is_nan() { self } else { result }
    }

    #[inline(always)]
    fn ln(self) -> Self {
        f32::ln(self)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if other > self || other.is_nan() { other } else { self }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn from_real(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if other > self || other.is_nan() { other } else { self }
    }
}

/// Folds `f` of every pair of elements into `LANES` partial results, and those into one.
#[inline(always)]
fn fold<T: Real>(start: T, a: &[T], b: &[T], f: impl Fn(T, T, T) -> T, join: impl Fn(T, T) -> T) -> T {
    let mut lanes = [start; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] = f(lanes[lane], a[lane], b[lane]);
        }
    }
    let mut rest = start;
    for (a, b) in a_rest.iter().zip(b_rest) {
        rest = f(rest, *a, *b);
    }
    lanes.into_iter().fold(rest, join)
}

/// The sum of `f` over pairs of elements.
#[inline(always)]
pub(super) fn sum2<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    fold(T::ZERO, a, b, |sum, a, b| sum + f(a, b), |a, b| a + b)
}

/// The sum of `f` over elements.
#[inline(always)]
pub(super) fn sum<T: Real>(a: &[T], f: impl Fn(T) -> T) -> T {
    sum2(a, a, |a, _| f(a))
}

/// The largest element, minus infinity of none; NaN if one is.
#[inline(always)]
pub(super) fn largest<T: Real>(a: &[T]) -> T {
    fold(T::NEG_INFINITY, a, a, |most, a, _| most.larger(a), T::larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_standard_library_within_two_units_in_the_last_place() {
        let mut worst: f64 = 0.0;
        for step in -870_000..=885_000 {
            let x = step as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(Real::exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.4e-7, "{worst}");
        assert_eq!(Real::exp(0f32), 1.0);
        assert_eq!(
            [f32::NEG_INFINITY, -1e4, f32::INFINITY, 1e4].map(Real::exp),
            [0.0, 0.0, f32::INFINITY, f32::INFINITY]
        );
        assert!(Real::exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_element_whatever_the_length() {
        for n in 0..50 {
            let values: Vec<f32> = (0..n).map(|i| (i * 7 % 50) as f32).collect();
            assert_eq!(sum(&values, |v| v), values.iter().sum::<f32>());
            assert_eq!(sum2(&values, &values, |a, b| a * b), values.iter().map(|v| v * v).sum::<f32>());
            assert_eq!(largest(&values), values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        for at in 0..20 {
            let mut values = [1f32; 20];
            values[at] = f32::NAN;
            assert!(largest(&values).is_nan(), "{at}");
        }
    }
}
