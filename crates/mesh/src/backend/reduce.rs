//! Reduction kernels: several buffers of one dtype into one, always in the order given. Pure.
//!
//! f16 and bf16 are accumulated in f32 and rounded once; bf16 by bit operations, which vectorize where the
//! conversions of `half` do not (18.9 GB/s against 1.5).

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;
use multiversion::multiversion;

use crate::{DType, ReduceOp};

/// Elements reduced at a time: what all ranks contribute to a block passes through the first-level cache.
const BLOCK: usize = 2048;

/// Reduces `sources`, in their order, into `out`. All have equal lengths and are aligned for `dtype`.
pub(crate) fn reduce(dtype: DType, op: ReduceOp, sources: &[&[u8]], out: &mut [u8]) {
    match dtype {
        DType::U8 => native(op, sources, out, fold_u8, divide_u8),
        DType::I8 => native(op, sources, out, fold_i8, divide_i8),
        DType::I16 => native(op, sources, out, fold_i16, divide_i16),
        DType::I32 => native(op, sources, out, fold_i32, divide_i32),
        DType::I64 => native(op, sources, out, fold_i64, divide_i64),
        DType::U32 => native(op, sources, out, fold_u32, divide_u32),
        DType::F32 => native(op, sources, out, fold_f32, divide_f32),
        DType::F64 => native(op, sources, out, fold_f64, divide_f64),
        DType::F16 => widened(op, sources, out, widen_f16, narrow_f16),
        DType::BF16 => widened(op, sources, out, widen_bf16, narrow_bf16),
        stored => unreachable!("{stored} is no `Element`, and calls are made of elements"),
    }
}

/// Accumulates in `out` itself.
fn native<T: Pod>(
    op: ReduceOp,
    sources: &[&[u8]],
    out: &mut [u8],
    fold: fn(ReduceOp, &mut [T], &[T]),
    divide: fn(&mut [T], usize),
) {
    let out: &mut [T] = bytemuck::cast_slice_mut(out);
    for (index, out) in out.chunks_mut(BLOCK).enumerate() {
        let len = out.len();
        let mut blocks = sources.iter().map(|source| block(source, index, len));
        out.copy_from_slice(blocks.next().unwrap_or(&[]));
        blocks.for_each(|block| fold(op, out, block));
        if op == ReduceOp::Avg {
            divide(out, sources.len());
        }
    }
}

/// Accumulates in f32 and narrows each element once.
fn widened<T: Pod>(
    op: ReduceOp,
    sources: &[&[u8]],
    out: &mut [u8],
    widen: fn(&[T], &mut [f32]),
    narrow: fn(&[f32], &mut [T]),
) {
    let (mut sum, mut next) = ([0.0; BLOCK], [0.0; BLOCK]);
    let out: &mut [T] = bytemuck::cast_slice_mut(out);
    for (index, out) in out.chunks_mut(BLOCK).enumerate() {
        let (sum, next) = (&mut sum[..out.len()], &mut next[..out.len()]);
        for (g, source) in sources.iter().enumerate() {
            let to = if g == 0 { &mut *sum } else { &mut *next };
            widen(block(source, index, out.len()), to);
            if g > 0 {
                fold_f32(op, sum, next);
            }
        }
        if op == ReduceOp::Avg {
            divide_f32(sum, sources.len());
        }
        narrow(sum, out);
    }
}

/// Block `index` of a source, `len` elements long.
fn block<T: Pod>(source: &[u8], index: usize, len: usize) -> &[T] {
    let begin = index * BLOCK;
    &bytemuck::cast_slice(source)[begin..begin + len]
}

#[inline(always)]
fn each<T: Copy>(sum: &mut [T], next: &[T], combine: impl Fn(T, T) -> T) {
    for (sum, next) in sum.iter_mut().zip(next) {
        *sum = combine(*sum, *next);
    }
}

macro_rules! integer_kernels {
    ($($element:ty: $fold:ident, $divide:ident;)*) => {$(
        #[multiversion(targets("x86_64+avx2"))]
        fn $fold(op: ReduceOp, sum: &mut [$element], next: &[$element]) {
            match op {
                ReduceOp::Sum | ReduceOp::Avg => each(sum, next, <$element>::wrapping_add),
                ReduceOp::Prod => each(sum, next, <$element>::wrapping_mul),
                ReduceOp::Min => each(sum, next, Ord::min),
                ReduceOp::Max => each(sum, next, Ord::max),
            }
        }

        fn $divide(sum: &mut [$element], ranks: usize) {
            // Through i128, as the group size need not fit the element type.
            sum.iter_mut().for_each(|sum| *sum = (i128::from(*sum) / ranks as i128) as $element);
        }
    )*};
}

integer_kernels! {
    u8: fold_u8, divide_u8;
    i8: fold_i8, divide_i8;
    i16: fold_i16, divide_i16;
    i32: fold_i32, divide_i32;
    i64: fold_i64, divide_i64;
    u32: fold_u32, divide_u32;
}

macro_rules! float_kernels {
    ($($element:ty as $bits:ty: $fold:ident, $divide:ident;)*) => {$(
        #[multiversion(targets("x86_64+avx2"))]
        fn $fold(op: ReduceOp, sum: &mut [$element], next: &[$element]) {
            // Comparisons with NaN are false: one in `b` is taken by `else`, one in `a` sets all bits, which is a NaN.
            // With a branch for it the loop would not vectorize, which is 5 times slower.
            let keep_nan = |a: $element, chosen: $element| {
                <$element>::from_bits(chosen.to_bits() | <$bits>::from(!a.is_nan()).wrapping_sub(1))
            };
            match op {
                ReduceOp::Sum | ReduceOp::Avg => each(sum, next, |a, b| a + b),
                ReduceOp::Prod => each(sum, next, |a, b| a * b),
                ReduceOp::Min => each(sum, next, |a, b| keep_nan(a, if a < b { a } else { b })),
                ReduceOp::Max => each(sum, next, |a, b| keep_nan(a, if a > b { a } else { b })),
            }
        }

        #[multiversion(targets("x86_64+avx2"))]
        fn $divide(sum: &mut [$element], ranks: usize) {
            sum.iter_mut().for_each(|sum| *sum /= ranks as $element);
        }
    )*};
}

float_kernels! {
    f32 as u32: fold_f32, divide_f32;
    f64 as u64: fold_f64, divide_f64;
}

fn widen_f16(from: &[f16], to: &mut [f32]) {
    from.convert_to_f32_slice(to);
}

fn narrow_f16(from: &[f32], to: &mut [f16]) {
    to.convert_from_f32_slice(from);
}

/// A bf16 is the upper half of an f32.
#[multiversion(targets("x86_64+avx2"))]
fn widen_bf16(from: &[u16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(*from) << 16);
    }
}

/// Rounds to nearest, ties to even; a NaN stays one.
#[multiversion(targets("x86_64+avx2"))]
fn narrow_bf16(from: &[f32], to: &mut [u16]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        *to = if from.is_nan() { quiet_nan } else { rounded } as u16;
    }
}

#[cfg(feature = "mpi")]
pub(crate) mod partial;
#[cfg(test)]
mod tests;
