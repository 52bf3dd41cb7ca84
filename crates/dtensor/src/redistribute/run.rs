//! Carries the steps of a plan out on a DTensor's process groups.

use candle_core::Tensor;
use half::{bf16, f16};
use sconce_mesh::{DType, DeviceMesh, ProcessGroup, ReduceOp};

use super::{Action, ExchangePlan, Move, Step, exchange, plan};
use crate::candle_bytes::{deep_copy, read_bytes, write_bytes, zeros};
use crate::candle_tensors::FlatTensor;
use crate::dtensor::slice;
use crate::error::CandleContext;
use crate::placement::picture;
use crate::{DTensor, DTensorSpec, Error, LocalTensor, Placement, Result, TensorBox, chunk_range};

impl DTensor {
    /// The same tensor under other placements of its mesh.
    ///
    /// Ranks: collective over the mesh; every rank passes the same placements.
    ///
    /// # Errors
    /// `InvalidPlacement`; whatever the collectives report.
    ///
    /// # Source
    /// `DTensor.redistribute`.
    pub fn redistribute(&self, placements: &[Placement]) -> Result<DTensor> {
        let spec = self.spec();
        crate::check_placements(spec.shape.len(), spec.mesh.ndim(), placements)?;
        let mut now = self.clone();
        for step in plan(&spec.shape, spec.mesh.shape(), &spec.placements, placements)? {
            now = run_step(&now, &step)?;
        }
        Ok(now)
    }

    /// The same tensor on another mesh over the same ranks: every rank receives exactly what it lacks.
    ///
    /// Ranks: collective over the ranks of both meshes, which are the same.
    ///
    /// # Errors
    /// `InvalidPlacement` if the meshes have different ranks or the target is `Partial`.
    pub fn redistribute_to(&self, mesh: &DeviceMesh, placements: &[Placement]) -> Result<DTensor> {
        if mesh == self.device_mesh() {
            return self.redistribute(placements);
        }
        check_target(self.spec(), mesh, placements)?;
        let reduced: Vec<_> = self.placements().iter().map(|p| without_partial(*p)).collect();
        let now = self.redistribute(&reduced)?;
        let (mesh, placements) = (mesh.clone(), placements.to_vec());
        move_boxes(&now, DTensorSpec { mesh, placements, ..now.spec().clone() })
    }
}

fn without_partial(placement: Placement) -> Placement {
    match placement {
        Placement::Partial(_) => Placement::Replicate,
        other => other,
    }
}

fn check_target(from: &DTensorSpec, mesh: &DeviceMesh, placements: &[Placement]) -> Result<()> {
    crate::check_placements(from.shape.len(), mesh.ndim(), placements)?;
    let refuse = |what| Err(Error::InvalidPlacement { placements: picture(placements), what });
    let sorted = |mesh: &DeviceMesh| {
        let mut ranks = mesh.ranks().to_vec();
        ranks.sort_unstable();
        ranks
    };
    if sorted(&from.mesh) != sorted(mesh) {
        return refuse(format!("meshes of different ranks: {:?} and {:?}", from.mesh.ranks(), mesh.ranks()));
    }
    if placements.iter().any(|p| without_partial(*p) != *p) {
        return refuse("a partial target across meshes".to_owned());
    }
    Ok(())
}

fn run_step(now: &DTensor, step: &Step) -> Result<DTensor> {
    let spec = DTensorSpec { placements: step.placements.clone(), ..now.spec().clone() };
    let local = match step.action {
        Action::AllReduce { mesh_dim, op } => all_reduce(now, mesh_dim, op)?,
        Action::ReduceScatter { mesh_dim, tensor_dim, op } => reduce_scatter(now, mesh_dim, tensor_dim, op)?,
        Action::AllGather { mesh_dim, tensor_dim } => all_gather(now, &spec, mesh_dim, tensor_dim)?,
        Action::Slice => slice(now.to_local(), &now.local_boxes()[0], &own_box(&spec)?)?,
        Action::MakePartial { mesh_dim, op } => make_partial(now, mesh_dim, op)?,
        Action::Exchange => return move_boxes(now, spec),
    };
    DTensor::from_local_with_shape(&local, &spec.mesh, &spec.placements, &spec.shape)
}

fn own_box(spec: &DTensorSpec) -> Result<TensorBox> {
    spec.box_of(spec.mesh.mesh_group().rank()).ok_or_else(|| Error::InvalidPlacement {
        placements: picture(&spec.placements),
        what: format!("rank {} is not in the mesh", spec.mesh.mesh_group().rank()),
    })
}

/// One exchange over the mesh of `now`; ranks serve only ranks that share their coordinates of pending reductions.
fn move_boxes(now: &DTensor, spec: DTensorSpec) -> Result<DTensor> {
    let group = now.device_mesh().mesh_group();
    let boxes = |spec: &DTensorSpec| -> Vec<Vec<TensorBox>> {
        group.ranks().iter().map(|rank| spec.box_of(*rank).into_iter().collect()).collect()
    };
    let same_term = same_term(now.spec());
    let me = group.group_rank().0;
    let plan = ExchangePlan::new(me, &boxes(now.spec()), &boxes(&spec), &same_term)?;
    let held = own_box(&spec)?;
    let local = zeros(&held.sizes, spec.dtype)?;
    let mut moved = FlatTensor::one_box(&local, &spec.shape, held)?;
    exchange(group, &mut [Move { plan, src: now, dst: &mut moved }])?;
    DTensor::from_local_with_shape(&local, &spec.mesh, &spec.placements, &spec.shape)
}

/// Whether two positions of the mesh hold the same term of every pending reduction.
fn same_term(spec: &DTensorSpec) -> impl Fn(usize, usize) -> bool + use<> {
    let shape = spec.mesh.shape().to_vec();
    let partial: Vec<bool> = spec.placements.iter().map(|p| matches!(p, Placement::Partial(_))).collect();
    move |from, to| {
        let (from, to) = (super::coordinate(&shape, from), super::coordinate(&shape, to));
        (0..shape.len()).all(|dim| !partial[dim] || from[dim] == to[dim])
    }
}

fn all_reduce(now: &DTensor, mesh_dim: usize, op: ReduceOp) -> Result<Tensor> {
    let group = now.device_mesh().group(mesh_dim)?;
    let local = deep_copy(now.to_local())?;
    let mut outcome = Ok(());
    write_bytes(&local, &mut |bytes| outcome = all_reduce_bytes(group, now.dtype(), bytes, op))?;
    outcome?;
    Ok(local)
}

/// Packs the chunks that go to each rank one after the other and reduces this rank's.
fn reduce_scatter(now: &DTensor, mesh_dim: usize, tensor_dim: usize, op: ReduceOp) -> Result<Tensor> {
    let group = now.device_mesh().group(mesh_dim)?;
    let held = TensorBox::whole(now.to_local().dims());
    let chunks: Vec<TensorBox> = chunks(&held, tensor_dim, group.size());
    let mut packed = Vec::new();
    for chunk in &chunks {
        read_bytes(&slice(now.to_local(), &held, chunk)?, &mut |bytes| packed.extend_from_slice(bytes))?;
    }
    let counts: Vec<usize> = chunks.iter().map(TensorBox::numel).collect();
    let local = zeros(&chunks[group.group_rank().0].sizes, now.dtype())?;
    let mut outcome = Ok(());
    write_bytes(&local, &mut |bytes| {
        outcome = reduce_scatter_bytes(group, now.dtype(), &packed, &counts, bytes, op);
    })?;
    outcome?;
    Ok(local)
}

fn chunks(held: &TensorBox, tensor_dim: usize, n_chunks: usize) -> Vec<TensorBox> {
    let chunk = |index| {
        let range = chunk_range(held.sizes[tensor_dim], n_chunks, index);
        let mut part = held.clone();
        part.offsets[tensor_dim] += range.start;
        part.sizes[tensor_dim] = range.len();
        part
    };
    (0..n_chunks).map(chunk).collect()
}

fn all_gather(now: &DTensor, to: &DTensorSpec, mesh_dim: usize, tensor_dim: usize) -> Result<Tensor> {
    let group = now.device_mesh().group(mesh_dim)?;
    let whole = own_box(to)?;
    let chunks = chunks(&whole, tensor_dim, group.size());
    let size = to.dtype.size_bytes();
    let counts: Vec<usize> = chunks.iter().map(|chunk| chunk.numel() * size).collect();
    let gathered = zeros(&[whole.numel()], to.dtype)?;
    let mut outcome = Ok(());
    read_bytes(now.to_local(), &mut |mine| {
        let written = write_bytes(&gathered, &mut |all| {
            outcome = group.all_gather_uneven(mine, &counts, all).map_err(Error::from);
        });
        if outcome.is_ok() {
            outcome = written;
        }
    })?;
    outcome?;
    if whole.is_empty() {
        return zeros(&whole.sizes, to.dtype);
    }
    concatenate(&gathered, &chunks, tensor_dim)
}

/// Chunks that lie one after the other in `gathered`, joined along `tensor_dim`.
fn concatenate(gathered: &Tensor, chunks: &[TensorBox], tensor_dim: usize) -> Result<Tensor> {
    let mut parts = Vec::with_capacity(chunks.len());
    let mut start = 0;
    for chunk in chunks.iter().filter(|chunk| !chunk.is_empty()) {
        let part = gathered.narrow(0, start, chunk.numel()).and_then(|t| t.reshape(chunk.sizes.as_slice()));
        parts.push(part.during(|| format!("gathered chunk {chunk}"))?);
        start += chunk.numel();
    }
    Tensor::cat(&parts, tensor_dim)
        .during(|| format!("joining {} chunks along dim {tensor_dim}", parts.len()))
}

/// A sum of floats is divided by the ranks, as torch does; sums of integers and products keep the value on the
/// first rank and the neutral element elsewhere; averages and extremes keep it everywhere.
fn make_partial(now: &DTensor, mesh_dim: usize, op: ReduceOp) -> Result<Tensor> {
    let group = now.device_mesh().group(mesh_dim)?;
    let (local, first) = (now.to_local(), group.group_rank().0 == 0);
    let made = match op {
        ReduceOp::Avg | ReduceOp::Min | ReduceOp::Max => Ok(local.clone()),
        ReduceOp::Sum if local.dtype().is_float() => local.affine(1.0 / group.size() as f64, 0.0),
        ReduceOp::Sum | ReduceOp::Prod if first => Ok(local.clone()),
        ReduceOp::Sum => local.zeros_like(),
        ReduceOp::Prod => local.ones_like(),
    };
    made.during(|| format!("a pending {op} of shape {:?}", local.dims()))
}

/// Runs `$body` with `$element` standing for the Rust type of a dtype.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            DType::U8 => {
                type $element = u8;
                $body
            }
            DType::I8 => {
                type $element = i8;
                $body
            }
            DType::I16 => {
                type $element = i16;
                $body
            }
            DType::I32 => {
                type $element = i32;
                $body
            }
            DType::I64 => {
                type $element = i64;
                $body
            }
            DType::U32 => {
                type $element = u32;
                $body
            }
            DType::F16 => {
                type $element = f16;
                $body
            }
            DType::BF16 => {
                type $element = bf16;
                $body
            }
            DType::F32 => {
                type $element = f32;
                $body
            }
            DType::F64 => {
                type $element = f64;
                $body
            }
            // Candle, whose tensors these are, has no other dtype that becomes one of ours.
            stored => unreachable!("{stored} is no dtype of candle"),
        }
    };
}

fn all_reduce_bytes(group: &ProcessGroup, dtype: DType, bytes: &mut [u8], op: ReduceOp) -> Result<()> {
    with_element!(dtype, T => group.all_reduce::<T>(bytemuck::cast_slice_mut(bytes), op))?;
    Ok(())
}

fn reduce_scatter_bytes(
    group: &ProcessGroup,
    dtype: DType,
    packed: &[u8],
    counts: &[usize],
    bytes: &mut [u8],
    op: ReduceOp,
) -> Result<()> {
    with_element!(dtype, T => {
        let input: Vec<T> = bytemuck::pod_collect_to_vec(packed);
        group.reduce_scatter_uneven::<T>(&input, counts, bytemuck::cast_slice_mut(bytes), op)
    })?;
    Ok(())
}
