//! Kernel: one fused pass over float tensors, run on storages in forward and on tensors in backward.

use std::ops::Deref;

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use multiversion::multiversion;

use super::real::Real;

/// `IN` tensors of one dtype to `OUT` new ones.
///
/// `run` is to be inlined: it is compiled for each instruction set.
pub(super) trait Kernel<const IN: usize, const OUT: usize> {
    fn run<T: Real>(&self, inputs: [&[T]; IN]) -> [Vec<T>; OUT];
}

/// What candle lends of an argument.
pub(super) type Lent<'a> = (&'a CpuStorage, &'a Layout);

/// Runs a kernel on contiguous storages, in the dtype of the first.
pub(super) fn on_storages<const IN: usize, const OUT: usize>(
    kernel: &impl Kernel<IN, OUT>,
    inputs: [Lent<'_>; IN],
) -> Result<[CpuStorage; OUT]> {
    match inputs[0].0.dtype() {
        DType::F32 => Ok(run::<f32, _, IN, OUT>(kernel, inputs)?.map(f32::to_cpu_storage_owned)),
        DType::F64 => Ok(run::<f64, _, IN, OUT>(kernel, inputs)?.map(f64::to_cpu_storage_owned)),
        DType::BF16 => widened::<bf16, _, IN, OUT>(kernel, inputs, to_f32::<bf16>, from_f32::<bf16>),
        DType::F16 => widened::<f16, _, IN, OUT>(kernel, inputs, to_f32::<f16>, from_f32::<f16>),
        other => {
            bail!("a fused module takes float tensors and gathered parameters, got storage of {other:?}")
        }
    }
}

/// Runs a kernel on CPU tensors, outside any graph; the results have the given shapes.
pub(super) fn on_tensors<const IN: usize, const OUT: usize>(
    kernel: &impl Kernel<IN, OUT>,
    inputs: [&Tensor; IN],
    shapes: [Shape; OUT],
) -> Result<[Tensor; OUT]> {
    let contiguous: Vec<Tensor> = inputs.iter().map(|input| input.contiguous()).collect::<Result<_>>()?;
    let guards: Vec<_> = contiguous.iter().map(Tensor::storage_and_layout).collect();
    let lent = guards.iter().map(on_cpu).collect::<Result<Vec<_>>>()?;
    let lent =
        <[Lent<'_>; IN]>::try_from(lent).unwrap_or_else(|_| unreachable!("one is lent for each input"));
    let mut shapes = shapes.into_iter();
    Ok(on_storages(kernel, lent)?.map(|out| {
        let shape = shapes.next().unwrap_or_else(|| unreachable!("as many shapes as outputs"));
        tensor(out, shape)
    }))
}

/// A tensor outside any graph.
pub(super) fn tensor(storage: CpuStorage, shape: Shape) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), false)
}

/// What `Tensor::storage_and_layout` lends, of a tensor on the CPU.
pub(super) fn on_cpu<'a, S: Deref<Target = Storage>>(
    (storage, layout): &'a (S, &Layout),
) -> Result<Lent<'a>> {
    match &**storage {
        Storage::Cpu(storage) => Ok((storage, layout)),
        _ => bail!("a fused module computes on the CPU"),
    }
}

fn run<T: Real, K: Kernel<IN, OUT>, const IN: usize, const OUT: usize>(
    kernel: &K,
    inputs: [Lent<'_>; IN],
) -> Result<[Vec<T>; OUT]> {
    let mut slices = [[].as_slice(); IN];
    for (slice, input) in slices.iter_mut().zip(inputs) {
        *slice = elements::<T>(input)?;
    }
    Ok(vectorized(kernel, slices))
}

fn widened<H: WithDType, K: Kernel<IN, OUT>, const IN: usize, const OUT: usize>(
    kernel: &K,
    inputs: [Lent<'_>; IN],
    widen: impl Fn(&[H]) -> Vec<f32>,
    narrow: impl Fn(Vec<f32>) -> Vec<H>,
) -> Result<[CpuStorage; OUT]> {
    let mut wide = [const { Vec::new() }; IN];
    for (wide, input) in wide.iter_mut().zip(inputs) {
        *wide = widen(elements::<H>(input)?);
    }
    let out = vectorized(kernel, wide.each_ref().map(Vec::as_slice));
    Ok(out.map(|out| H::to_cpu_storage_owned(narrow(out))))
}

/// The elements of a contiguous argument.
fn elements<'a, T: WithDType>((storage, layout): Lent<'a>) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a fused module takes contiguous tensors, got {layout:?}");
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2", "aarch64+neon"))]
fn vectorized<T: Real, K: Kernel<IN, OUT>, const IN: usize, const OUT: usize>(
    kernel: &K,
    inputs: [&[T]; IN],
) -> [Vec<T>; OUT] {
    kernel.run(inputs)
}

fn to_f32<H>(values: &[H]) -> Vec<f32>
where
    [H]: HalfFloatSliceExt,
{
    let mut wide = vec![0.0; values.len()];
    values.convert_to_f32_slice(&mut wide);
    wide
}

fn from_f32<H: Copy + Default>(values: Vec<f32>) -> Vec<H>
where
    [H]: HalfFloatSliceExt,
{
    let mut narrow = vec![H::default(); values.len()];
    narrow.convert_from_f32_slice(&values);
    narrow
}
