//! local_map: any function of local parts as a function of DTensors.

use candle_core::Tensor;

use super::{describe, operand_grads, same_mesh};
use crate::candle_bytes::dtype_of;
use crate::error::CandleContext;
use crate::grad::of_all;
use crate::{DTensor, DTensorSpec, Placement, Result, normalize_placements};

/// Runs `compute` on local parts of `inputs`, each brought to its placements, as a tensor of `shape` under `placements`.
///
/// Gradients flow. Along a mesh dim where an input is replicated and the result is not, each rank is taken to compute
/// something else with it, so that its gradient is the sum over the ranks; otherwise the gradient has the input's
/// placement.
///
/// Ranks: collective over the mesh where inputs are redistributed.
///
/// # Errors
/// `ForeignMesh` if the meshes differ, `InvalidPlacement`, `ShapeMismatch` naming the rank whose result is not its part
/// of `shape`; what `compute` and the collectives report.
///
/// # Source
/// `torch.distributed.tensor.experimental.local_map` with `redistribute_inputs`.
///
/// ```
/// use sconce_dtensor::{DTensor, DType, Placement::*, local_map};
/// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
///
/// let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &["tp"])?;
/// let x = DTensor::rand(0.0..1.0, 1, &[4, 6], DType::F32, &mesh, &[Shard(1)])?;
/// // Rows must be whole to be sorted.
/// let sorted = local_map(&[(&x, &[Shard(0)])], &[4, 6], &[Shard(0)], |parts| Ok(parts[0].sort_last_dim(true)?.0))?;
/// assert_eq!(sorted.placements(), [Shard(0)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn local_map(
    inputs: &[(&DTensor, &[Placement])],
    shape: &[usize],
    placements: &[Placement],
    compute: impl FnOnce(&[Tensor]) -> candle_core::Result<Tensor>,
) -> Result<DTensor> {
    let tensors: Vec<&DTensor> = inputs.iter().map(|(tensor, _)| *tensor).collect();
    let mesh = same_mesh("local_map", &tensors)?.device_mesh().clone();
    let placements = normalize_placements(shape.len(), mesh.ndim(), placements)?;
    let mut parts = Vec::with_capacity(inputs.len());
    for (tensor, wanted) in inputs {
        let wanted = normalize_placements(tensor.shape().len(), mesh.ndim(), wanted)?;
        parts.push(tensor.lend(&wanted, &operand_grads(&wanted, &placements))?);
    }
    let mut local = compute(&parts).during(|| describe("local_map", &tensors))?;
    if local.elem_count() == 0 {
        local = of_all(local, &parts)?;
    }
    let spec = DTensorSpec { dtype: dtype_of(&local)?, mesh, placements, shape: shape.to_vec() };
    DTensor::of_part(&local, spec)
}
