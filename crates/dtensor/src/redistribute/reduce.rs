//! The reducing steps of a redistribute, for each dtype.

use bytemuck::{cast_slice, cast_slice_mut};
use candle_core::Tensor;
use half::{bf16, f16};
use sconce_mesh::{DType, ProcessGroup, ReduceOp};

use crate::candle_bytes::{deep_copy, read_bytes, write_bytes, zeros};
use crate::{DTensor, DTensorSpec, Error, Result, TensorBox, copy_runs};

/// The reduction of the terms along `mesh_dims`, whole on each of their ranks.
pub(super) fn all_reduce(now: &DTensor, mesh_dims: &[usize], op: ReduceOp) -> Result<Tensor> {
    let group = now.device_mesh().joint_group(mesh_dims)?;
    let local = deep_copy(now.to_local())?;
    let mut outcome = Ok(());
    write_bytes(&local, &mut |bytes| outcome = all_reduce_bytes(&group, now.spec().dtype, bytes, op))?;
    outcome.map(|()| local)
}

/// The reduction of the terms along `mesh_dims`, of which each of their ranks takes the box that `to` gives it.
pub(super) fn reduce_scatter(
    now: &DTensor,
    to: &DTensorSpec,
    mesh_dims: &[usize],
    op: ReduceOp,
) -> Result<Tensor> {
    let group = now.device_mesh().joint_group(mesh_dims)?;
    let (held, wanted) = (now.local_box(), to.boxes_of(group.ranks()));
    let counts: Vec<usize> = wanted.iter().map(TensorBox::numel).collect();
    let local = zeros(&wanted[group.group_rank().0].sizes, to.dtype)?;
    let mut outcome = Ok(());
    read_bytes(now.to_local(), &mut |term| {
        let scatter = |input: &[u8]| {
            let mut reduced = Ok(());
            let written = write_bytes(&local, &mut |bytes| {
                reduced = reduce_scatter_bytes(&group, to.dtype, (input, &counts), bytes, op);
            });
            written.and(reduced)
        };
        outcome = if lies_in_order(held, &wanted) {
            scatter(term)
        } else {
            let mut packed = vec![0u64; term.len().div_ceil(8)];
            let packed = &mut cast_slice_mut(&mut packed)[..term.len()];
            pack(term, held, &wanted, to.dtype.size_bytes(), packed);
            scatter(packed)
        };
    })?;
    outcome.map(|()| local)
}

/// True if the boxes lie one after the other in the one that holds them all.
pub(super) fn lies_in_order(held: &TensorBox, parts: &[TensorBox]) -> bool {
    let mut end = 0;
    parts.iter().filter(|part| !part.is_empty()).all(|part| {
        let mut runs = copy_runs(part, held, part);
        let first = runs.next();
        let follows = first.is_some_and(|run| run.src == end) && runs.next().is_none();
        end += part.numel();
        follows
    })
}

/// The parts of `held`, one after the other.
fn pack(term: &[u8], held: &TensorBox, parts: &[TensorBox], size: usize, packed: &mut [u8]) {
    let mut end = 0;
    for part in parts {
        for run in copy_runs(part, held, part) {
            let len = run.len * size;
            packed[end..end + len].copy_from_slice(&term[run.src * size..][..len]);
            end += len;
        }
    }
}

/// Runs `$body` with `$element` standing for the Rust type of a dtype.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        with_element!($dtype, $element => $body;
            U8 u8, I8 i8, I16 i16, I32 i32, I64 i64, U32 u32, F16 f16, BF16 bf16, F32 f32, F64 f64)
    };
    ($dtype:expr, $element:ident => $body:expr; $($name:ident $rust:ty),*) => {
        match $dtype {
            $(DType::$name => {
                type $element = $rust;
                $body
            })*
            // Candle, whose tensors these are, has no other dtype that becomes one of ours.
            stored => unreachable!("{stored} is no dtype of candle"),
        }
    };
}

fn all_reduce_bytes(group: &ProcessGroup, dtype: DType, bytes: &mut [u8], op: ReduceOp) -> Result<()> {
    with_element!(dtype, T => group.all_reduce::<T>(cast_slice_mut(bytes), op)).map_err(Error::from)
}

fn reduce_scatter_bytes(
    group: &ProcessGroup,
    dtype: DType,
    (input, counts): (&[u8], &[usize]),
    output: &mut [u8],
    op: ReduceOp,
) -> Result<()> {
    with_element!(dtype, T => {
        group.reduce_scatter_uneven::<T>(cast_slice(input), counts, cast_slice_mut(output), op)
    })
    .map_err(Error::from)
}
