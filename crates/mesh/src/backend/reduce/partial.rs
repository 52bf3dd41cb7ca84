//! Partial: a reduction in stages, each over some of the ranks. Halves stay in f32 until the last, and are rounded once.

use super::{
    divide_f32, divide_f64, divide_i8, divide_i16, divide_i32, divide_i64, divide_u8, divide_u32,
    narrow_bf16, narrow_f16, widen_bf16, widen_f16,
};
use crate::{DType, ReduceOp};

/// How elements of one dtype are reduced over `ranks` ranks in stages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Partial {
    dtype: DType,
    op: ReduceOp,
    ranks: usize,
}

impl Partial {
    pub(crate) fn new(dtype: DType, op: ReduceOp, ranks: usize) -> Partial {
        Partial { dtype, op, ranks }
    }

    /// The dtype between the stages.
    pub(crate) fn dtype(&self) -> DType {
        match self.dtype {
            DType::F16 | DType::BF16 => DType::F32,
            dtype => dtype,
        }
    }

    /// What each stage does.
    pub(crate) fn op(&self) -> ReduceOp {
        if self.op == ReduceOp::Avg { ReduceOp::Sum } else { self.op }
    }

    /// Length between the stages of `len` bytes.
    pub(crate) fn len(&self, len: usize) -> usize {
        len / self.dtype.size_bytes() * self.dtype().size_bytes()
    }

    /// Writes `from` as it is between the stages; `to` is [`Partial::len`] long. Both are aligned.
    pub(crate) fn widen(&self, from: &[u8], to: &mut [u8]) {
        match self.dtype {
            DType::F16 => widen_f16(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to)),
            DType::BF16 => widen_bf16(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to)),
            _ => to.copy_from_slice(from),
        }
    }

    /// Makes the result of `sum`, which the last stage left.
    pub(crate) fn finish(&self, sum: &mut [u8], to: &mut [u8]) {
        if self.op == ReduceOp::Avg {
            self.divide(sum);
        }
        match self.dtype {
            DType::F16 => narrow_f16(bytemuck::cast_slice(sum), bytemuck::cast_slice_mut(to)),
            DType::BF16 => narrow_bf16(bytemuck::cast_slice(sum), bytemuck::cast_slice_mut(to)),
            _ => to.copy_from_slice(sum),
        }
    }

    fn divide(&self, sum: &mut [u8]) {
        match self.dtype() {
            DType::U8 => divide_u8(sum, self.ranks),
            DType::I8 => divide_i8(bytemuck::cast_slice_mut(sum), self.ranks),
            DType::I16 => divide_i16(bytemuck::cast_slice_mut(sum), self.ranks),
            DType::I32 => divide_i32(bytemuck::cast_slice_mut(sum), self.ranks),
            DType::I64 => divide_i64(bytemuck::cast_slice_mut(sum), self.ranks),
            DType::U32 => divide_u32(bytemuck::cast_slice_mut(sum), self.ranks),
            DType::F64 => divide_f64(bytemuck::cast_slice_mut(sum), self.ranks),
            DType::F32 => divide_f32(bytemuck::cast_slice_mut(sum), self.ranks),
            other => unreachable!("{other} is no `Element`, or is f32 between the stages"),
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backend::reduce::reduce;

    #[test]
    fn halves_are_rounded_once_however_many_stages_there_are() {
        // In bf16 each single addition would be rounded away.
        let inputs =
            [bf16::from_f32(256.0), bf16::from_f32(0.75), bf16::from_f32(0.75), bf16::from_f32(0.75)];
        for (op, expected) in [(ReduceOp::Sum, 258.25), (ReduceOp::Avg, 258.25 / 4.0), (ReduceOp::Max, 256.0)]
        {
            let partial = Partial::new(DType::BF16, op, 4);
            let wide = inputs.map(|input| {
                let mut wide = [0f32];
                partial.widen(bytemuck::bytes_of(&input), bytemuck::cast_slice_mut(&mut wide));
                wide
            });
            let stage = |a: &[f32; 1], b: &[f32; 1]| {
                let mut out = [0f32];
                let sources = [bytemuck::cast_slice(a), bytemuck::cast_slice(b)];
                reduce(partial.dtype(), partial.op(), &sources, bytemuck::cast_slice_mut(&mut out));
                out
            };
            let mut sum = stage(&stage(&wide[0], &wide[1]), &stage(&wide[2], &wide[3]));
            let mut result = [bf16::ZERO];
            partial.finish(bytemuck::cast_slice_mut(&mut sum), bytemuck::cast_slice_mut(&mut result));
            assert_eq!(result, [bf16::from_f32(expected)], "{op}");
        }
    }

    #[test]
    fn integers_keep_their_dtype_and_are_divided_at_the_end() {
        let partial = Partial::new(DType::I8, ReduceOp::Avg, 3);
        assert_eq!((partial.dtype(), partial.op(), partial.len(5)), (DType::I8, ReduceOp::Sum, 5));
        let (mut sum, mut out) = ([10u8], [0u8]);
        partial.finish(&mut sum, &mut out);
        assert_eq!(out, [3]);
    }
}
