//! Kernels against sums written so plainly that they are obviously right.

use half::bf16;

use super::*;

const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::Prod];
const SIZES: [usize; 6] = [0, 1, 7, 33, BLOCK, 2 * BLOCK + 5];

/// Values that repeat with a period that no vector width divides.
fn values(rank: usize, len: usize) -> impl Iterator<Item = i32> {
    (0..len).map(move |i| ((i * 37 + rank * 11) % 23) as i32 - 7)
}

fn naive(op: ReduceOp, column: &[f64]) -> f64 {
    let fold = |f: fn(f64, f64) -> f64| column.iter().copied().reduce(f).unwrap();
    match op {
        ReduceOp::Sum => fold(|a, b| a + b),
        ReduceOp::Avg => fold(|a, b| a + b) / column.len() as f64,
        ReduceOp::Min => fold(f64::min),
        ReduceOp::Max => fold(f64::max),
        ReduceOp::Prod => fold(|a, b| a * b),
    }
}

fn check<T: Pod + std::fmt::Debug + PartialEq>(dtype: DType, make: fn(i32) -> T, narrow: fn(f64) -> T) {
    for op in OPS {
        for len in SIZES {
            for ranks in 1..=4 {
                let inputs: Vec<Vec<i32>> = (0..ranks).map(|rank| values(rank, len).collect()).collect();
                let typed: Vec<Vec<T>> =
                    inputs.iter().map(|input| input.iter().map(|v| make(*v)).collect()).collect();
                let sources: Vec<&[u8]> = typed.iter().map(|input| bytemuck::cast_slice(input)).collect();
                let mut out = vec![make(0); len];
                reduce(dtype, op, &sources, bytemuck::cast_slice_mut(&mut out));
                for i in 0..len {
                    let column: Vec<f64> = inputs.iter().map(|input| f64::from(input[i])).collect();
                    let expected = narrow(naive(op, &column));
                    assert_eq!(out[i], expected, "{op} of {ranks} {dtype}, {len} long, element {i}");
                }
            }
        }
    }
}

#[test]
fn signed_integers_and_floats_equal_the_naive_reduction() {
    check::<i16>(DType::I16, |v| v as i16, |v| v as i16);
    check::<i32>(DType::I32, |v| v, |v| v as i32);
    check::<i64>(DType::I64, i64::from, |v| v as i64);
    check::<f32>(DType::F32, |v| v as f32, |v| v as f32);
    check::<f64>(DType::F64, f64::from, |v| v);
}

#[test]
fn half_floats_are_accumulated_in_f32_and_rounded_once() {
    check::<f16>(DType::F16, |v| f16::from_f32(v as f32), |v| f16::from_f32(v as f32));
    check::<bf16>(DType::BF16, |v| bf16::from_f32(v as f32), |v| bf16::from_f32(v as f32));
    // In bf16 alone 256 + 1 is 256, four times over.
    let sources = [256.0, 1.0, 1.0, 1.0, 1.0].map(|v| bf16::from_f32(v).to_bits().to_ne_bytes());
    let sources: Vec<Vec<u16>> = sources.iter().map(|b| vec![u16::from_ne_bytes(*b)]).collect();
    let sources: Vec<&[u8]> = sources.iter().map(|b| bytemuck::cast_slice(b)).collect();
    let mut out = [bf16::ZERO];
    reduce(DType::BF16, ReduceOp::Sum, &sources, bytemuck::cast_slice_mut(&mut out));
    assert_eq!(out[0].to_f32(), 260.0);
}

#[test]
fn integers_wrap() {
    let mut out = [0u8; 2];
    reduce(DType::U8, ReduceOp::Sum, &[&[250, 1], &[10, 2]], &mut out);
    assert_eq!(out, [4, 3]);
    reduce(DType::I8, ReduceOp::Prod, &[&[127, 2], &[2, 0xff]], &mut out);
    assert_eq!(out, [0xfe, 0xfe]);
}

#[test]
fn integer_averages_divide_towards_zero() {
    let (a, b) = ([-3i32, 3, -4], [0i32, 0, 0]);
    let mut out = [0i32; 3];
    let sources = [bytemuck::cast_slice(&a), bytemuck::cast_slice(&b)];
    reduce(DType::I32, ReduceOp::Avg, &sources, bytemuck::cast_slice_mut(&mut out));
    assert_eq!(out, [-1, 1, -2]);
}

#[test]
fn a_nan_on_any_rank_gives_nan_in_every_float_dtype() {
    for op in OPS {
        for at in 0..3 {
            let of = |g: usize| if g == at { f32::NAN } else { g as f32 };
            let f32s: Vec<[f32; 1]> = (0..3).map(|g| [of(g)]).collect();
            let f16s: Vec<[f16; 1]> = (0..3).map(|g| [f16::from_f32(of(g))]).collect();
            let bf16s: Vec<[bf16; 1]> = (0..3).map(|g| [bf16::from_f32(of(g))]).collect();
            let (mut a, mut b, mut c) = ([0f32], [f16::ZERO], [bf16::ZERO]);
            let sources: Vec<&[u8]> = f32s.iter().map(|v| bytemuck::cast_slice(v)).collect();
            reduce(DType::F32, op, &sources, bytemuck::cast_slice_mut(&mut a));
            let sources: Vec<&[u8]> = f16s.iter().map(|v| bytemuck::cast_slice(v)).collect();
            reduce(DType::F16, op, &sources, bytemuck::cast_slice_mut(&mut b));
            let sources: Vec<&[u8]> = bf16s.iter().map(|v| bytemuck::cast_slice(v)).collect();
            reduce(DType::BF16, op, &sources, bytemuck::cast_slice_mut(&mut c));
            assert!(a[0].is_nan() && b[0].is_nan() && c[0].is_nan(), "{op}, NaN on rank {at}");
        }
    }
}

#[test]
fn every_bf16_and_its_ties_narrow_as_half_does() {
    for high in 0..=u16::MAX {
        for low in [0u16, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let value = f32::from_bits(u32::from(high) << 16 | u32::from(low));
            let mut out = [0];
            narrow_bf16(&[value], &mut out);
            assert_eq!(out[0], bf16::from_f32(value).to_bits(), "{high:04x}{low:04x}");
        }
    }
}

/// `cargo xtask bench kernels`: what one core reads and writes when 4 ranks' blocks lie in its cache.
#[test]
#[ignore = "prints speeds, asserts none"]
fn speed_of_the_kernels_from_cache() {
    const BYTES: usize = 4096;
    const RANKS: usize = 4;
    for (op, dtype) in
        [ReduceOp::Sum, ReduceOp::Max].into_iter().flat_map(|op| DType::ELEMENTS.map(|d| (op, d)))
    {
        let words = vec![vec![0u64; BYTES / 8]; RANKS];
        let sources: Vec<&[u8]> = words.iter().map(|words| bytemuck::cast_slice(words)).collect();
        let mut out = vec![0u64; BYTES / 8];
        let mut pass = |n: usize| {
            let started = std::time::Instant::now();
            for _ in 0..n {
                let out = bytemuck::cast_slice_mut(&mut out);
                reduce(dtype, op, std::hint::black_box(&sources), std::hint::black_box(out));
            }
            ((RANKS + 1) * BYTES * n) as f64 / started.elapsed().as_secs_f64() / 1e9
        };
        pass(1000);
        let mut speeds: Vec<f64> = (0..15).map(|_| pass(2000)).collect();
        speeds.sort_by(f64::total_cmp);
        println!("{op} of {RANKS} x {BYTES} bytes of {dtype:<5} {:7.1} GB/s a core", speeds[7]);
    }
}
