//! Carries the steps of a plan out on a DTensor's process groups.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use sconce_mesh::ReduceOp;

use super::carry::Part;
#[cfg(feature = "cuda")]
use super::on_cuda::on_cuda;
use super::reduce::{all_reduce, reduce_scatter};
use super::{Action, ExchangePlan, Move, Plan, Step, exchange, known_plan};
use crate::candle_bytes::{deep_copy, on_device, read_bytes, write_bytes, zeros};
use crate::candle_tensors::FlatTensor;
use crate::dtensor::slice;
use crate::error::CandleContext;
use crate::grad::{attach, grad_placements, with_backward};
use crate::{DTensor, DTensorSpec, Placement, Result, TensorBox, copy_runs};

impl DTensor {
    /// The same tensor under other placements of its mesh.
    ///
    /// Gradients flow back to the placements of `self`, and are whole where it has pending terms.
    /// Ranks: collective over the mesh; every rank passes the same placements.
    ///
    /// # Errors
    /// `InvalidPlacement`; whatever the collectives report.
    ///
    /// # Source
    /// `DTensor.redistribute`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use sconce_dtensor::{DTensor, Placement};
    /// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
    ///
    /// let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &["tp"])?;
    /// let rows = DTensor::from_copy(&Tensor::eye(4, candle_core::DType::F32, &Device::Cpu)?, &mesh, &[Placement::Shard(0)])?;
    /// let columns = rows.redistribute(&[Placement::Shard(-1)])?;
    /// assert_eq!(columns.placements(), [Placement::Shard(1)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redistribute(&self, placements: &[Placement]) -> Result<DTensor> {
        let plan = self.known_plan(placements)?;
        if plan.steps.is_empty() {
            return Ok(self.clone());
        }
        let spec = DTensorSpec { placements: plan.to().to_vec(), ..self.spec().clone() };
        DTensor::of_part(&self.lend(placements, &grad_placements(&spec.placements))?, spec)
    }

    /// This rank's part under `placements`, for a computation after which its gradient has the placements `grads`.
    pub(crate) fn lend(&self, placements: &[Placement], grads: &[Placement]) -> Result<Tensor> {
        let plan = self.known_plan(placements)?;
        let own = grad_placements(self.placements());
        if plan.steps.is_empty() && own == grads {
            return Ok(self.to_local().clone());
        }
        let spec = DTensorSpec { placements: grads.to_vec(), ..self.spec().clone() };
        let backward = move |grad: &Tensor| {
            Ok(DTensor::of_part(grad, spec.clone())?.redistribute(&own)?.to_local().clone())
        };
        if plan.steps.is_empty() {
            return with_backward(self.to_local(), backward);
        }
        attach(self.to_local(), run(self, &plan)?.into_parts().0, backward)
    }

    /// What [`DTensor::redistribute`] would do, without doing it. No communication.
    ///
    /// # Errors
    /// `InvalidPlacement`.
    pub fn plan(&self, placements: &[Placement]) -> Result<Plan> {
        Ok(Plan::clone(&*self.known_plan(placements)?))
    }

    fn known_plan(&self, placements: &[Placement]) -> Result<Arc<Plan>> {
        known_plan(self.shape(), self.device_mesh().shape(), self.placements(), placements)
    }

    /// [`DTensor::plan`] as text: each step, and what moves.
    ///
    /// # Errors
    /// `InvalidPlacement`.
    pub fn explain(&self, placements: &[Placement]) -> Result<String> {
        let plan = self.plan(placements)?;
        let bytes = plan.received_numel() * self.spec().dtype.size_bytes();
        Ok(format!("{plan}\n{bytes} bytes of {}", self.spec().dtype))
    }
}

/// The tensor after all steps, outside of candle's graph; its storage is fresh.
fn run(tensor: &DTensor, plan: &Plan) -> Result<DTensor> {
    let mut now = DTensor::of_part(&tensor.to_local().detach(), tensor.spec().clone())?;
    for step in &plan.steps {
        now = run_step(&now, step)?;
    }
    Ok(now)
}

fn run_step(now: &DTensor, step: &Step) -> Result<DTensor> {
    let spec = DTensorSpec { placements: step.placements.clone(), ..now.spec().clone() };
    let device = now.to_local().device();
    if device.is_cpu() {
        return DTensor::of_part(&on_cpu(now, &spec, &step.action)?, spec);
    }
    if let Some(local) = on_cuda(now, &spec, &step.action)? {
        return DTensor::of_part(&local, spec);
    }
    // Boxes are cut and joined in host memory.
    let local = on_cpu(&now.to_device(&Device::Cpu)?, &spec, &step.action)?;
    DTensor::of_part(&on_device(&local, device)?, spec)
}

/// There is no CUDA tensor in a build without CUDA.
#[cfg(not(feature = "cuda"))]
fn on_cuda(_now: &DTensor, _to: &DTensorSpec, _action: &Action) -> Result<Option<Tensor>> {
    Ok(None)
}

fn on_cpu(now: &DTensor, spec: &DTensorSpec, action: &Action) -> Result<Tensor> {
    match action {
        Action::AllReduce { mesh_dims, op } => all_reduce(now, mesh_dims, *op),
        Action::ReduceScatter { mesh_dims, op } => reduce_scatter(now, spec, mesh_dims, *op),
        Action::AllGather { mesh_dims } => all_gather(now, spec, mesh_dims),
        Action::Slice => slice(now.to_local(), now.local_box(), &spec.own_box()?),
        Action::MakePartial { mesh_dim, op } => make_partial(now, spec, *mesh_dim, *op),
        Action::Exchange => move_boxes(now, spec),
    }
}

/// One exchange over the mesh of `now`; ranks serve only ranks that share their coordinates of pending reductions.
fn move_boxes(now: &DTensor, spec: &DTensorSpec) -> Result<Tensor> {
    let group = now.device_mesh().mesh_group();
    let each =
        |spec: &DTensorSpec| -> Vec<Vec<TensorBox>> { spec.boxes().into_iter().map(|b| vec![b]).collect() };
    let term = terms(now.spec());
    let me = group.group_rank().0;
    let plan = ExchangePlan::new(me, &each(now.spec()), &each(spec), &|from, to| term[from] == term[to])?;
    let held = spec.own_box()?;
    let local = zeros(&held.sizes, spec.dtype)?;
    let src = FlatTensor::boxes(now.to_local(), &spec.shape, vec![now.local_box().clone()])?;
    let mut dst = FlatTensor::boxes(&local, &spec.shape, vec![held])?;
    exchange(group, &mut [Move { plan, src: &src, dst: &mut dst }])?;
    Ok(local)
}

/// For each position of the mesh, its coordinates along the dims of pending reductions: ranks with the same ones hold
/// the same terms.
fn terms(spec: &DTensorSpec) -> Vec<Vec<usize>> {
    let pending: Vec<usize> =
        (0..spec.placements.len()).filter(|dim| spec.placements[*dim].is_partial()).collect();
    let shape = spec.mesh.shape();
    let of = |nth| {
        let at = super::coordinate(shape, nth);
        pending.iter().map(|dim| at[*dim]).collect()
    };
    (0..spec.mesh.size()).map(of).collect()
}

/// Every piece goes from where its rank lent it to where it belongs.
fn all_gather(now: &DTensor, to: &DTensorSpec, mesh_dims: &[usize]) -> Result<Tensor> {
    let group = now.device_mesh().joint_group(mesh_dims)?;
    let (whole, size) = (to.own_box()?, to.dtype.size_bytes());
    let pieces = now.spec().boxes_of(group.ranks());
    let counts: Vec<usize> = pieces.iter().map(|piece| piece.numel() * size).collect();
    let mut parts: Vec<Part> = pieces.iter().map(|piece| Part::new(piece, &whole, 0, size)).collect();
    let gathered = zeros(&whole.sizes, to.dtype)?;
    let mut outcome = Ok(());
    read_bytes(now.to_local(), &mut |mine| {
        outcome = group.all_gather_streamed(mine, &counts, |from, _offset, bytes| {
            let part = &mut parts[from.0];
            write_bytes(&gathered, &mut |all| {
                part.copy(0..bytes.len(), |at, run| all[run].copy_from_slice(&bytes[at]));
            })
        });
    })?;
    outcome.map(|()| gathered)
}

/// A sum of floats is divided by the ranks, as torch does; sums of integers and products keep the value on the
/// first rank and the neutral element elsewhere; averages and extremes keep it everywhere. A shard becomes a term of a
/// sum by zeros around it.
fn make_partial(now: &DTensor, to: &DTensorSpec, mesh_dim: usize, op: ReduceOp) -> Result<Tensor> {
    if now.placements()[mesh_dim] != Placement::Replicate {
        return embed(now, &to.own_box()?);
    }
    let group = now.device_mesh().group(mesh_dim)?;
    let (local, first) = (now.to_local(), group.group_rank().0 == 0);
    let made = match op {
        // Not times the reciprocal, which rounds twice.
        ReduceOp::Sum if local.dtype().is_float() => {
            let n = Tensor::new(group.size() as f64, local.device()).and_then(|n| n.to_dtype(local.dtype()));
            n.and_then(|n| local.broadcast_div(&n))
        }
        ReduceOp::Sum if !first => local.zeros_like(),
        ReduceOp::Prod if !first => local.ones_like(),
        _ => return deep_copy(local),
    };
    made.during(|| format!("a pending {op} of shape {:?}", local.dims()))
}

/// What this rank holds of `outer`, with zeros around it.
fn embed(now: &DTensor, outer: &TensorBox) -> Result<Tensor> {
    let (held, size) = (now.local_box(), now.spec().dtype.size_bytes());
    let local = zeros(&outer.sizes, now.spec().dtype)?;
    let mut written = Ok(());
    if let Some(shared) = held.intersect(outer) {
        read_bytes(now.to_local(), &mut |from| {
            written = write_bytes(&local, &mut |to| {
                for run in copy_runs(&shared, held, outer) {
                    to[run.dst * size..][..run.len * size]
                        .copy_from_slice(&from[run.src * size..][..run.len * size]);
                }
            });
        })?;
    }
    written.map(|()| local)
}
