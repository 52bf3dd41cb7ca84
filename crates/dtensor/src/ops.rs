//! Computations with DTensors: each op knows along which placements it can run on local parts alone, and takes those that
//! need the fewest bytes to be moved. What no op here does, [`local_map`] does.

mod elementwise;
mod local_map;
mod matmul;
mod reduce;
mod rules;
mod view;

use candle_core::Tensor;

pub use local_map::local_map;
pub(crate) use rules::Rule;

use crate::error::CandleContext;
use crate::grad::{grad_placements, of_all};
use crate::{DTensor, DTensorSpec, Error, Placement, Result};

/// Runs `compute` on the local parts of `inputs`, brought to what the cheapest rules ask for; the result has `shape`.
///
/// Along each mesh dim one of the rules that `rules` gives holds.
fn apply(
    op: &str,
    inputs: &[&DTensor],
    shape: &[usize],
    rules: &[Rule],
    compute: impl FnOnce(&[Tensor]) -> candle_core::Result<Tensor>,
) -> Result<DTensor> {
    let mesh = same_mesh(op, inputs)?;
    let specs: Vec<&DTensorSpec> = inputs.iter().map(|input| input.spec()).collect();
    let chosen = rules::cheapest(&specs, rules)?;
    let output: Vec<Placement> = chosen.iter().map(|rule| rule.output).collect();
    let mut parts = Vec::with_capacity(inputs.len());
    for (nth, input) in inputs.iter().enumerate() {
        let placements: Vec<Placement> = chosen.iter().map(|rule| rule.inputs[nth]).collect();
        parts.push(input.lend(&placements, &operand_grads(&placements, &output))?);
    }
    let mut local = compute(&parts).during(|| describe(op, inputs))?;
    if local.elem_count() == 0 {
        local = of_all(local, &parts)?;
    }
    let spec = DTensorSpec {
        mesh: mesh.spec().mesh.clone(),
        placements: output,
        shape: shape.to_vec(),
        dtype: crate::candle_bytes::dtype_of(&local)?,
    };
    DTensor::of_part(&local, spec)
}

/// What the gradient of an operand is when it leaves the local computation: where all ranks along a mesh dim hold the
/// same operand for different parts of the result, each has a term of its gradient.
fn operand_grads(operand: &[Placement], result: &[Placement]) -> Vec<Placement> {
    let along = |(operand, result): (&Placement, &Placement)| match (operand, result) {
        (Placement::Replicate, Placement::Shard(_) | Placement::Partial(_)) => {
            Placement::Partial(sconce_mesh::ReduceOp::Sum)
        }
        _ => *operand,
    };
    let grads: Vec<Placement> = operand.iter().zip(result).map(along).collect();
    let own = grad_placements(operand);
    grads
        .iter()
        .zip(operand)
        .zip(own)
        .map(|((grad, operand), own)| if grad == operand { own } else { *grad })
        .collect()
}

fn same_mesh<'i>(op: &str, inputs: &[&'i DTensor]) -> Result<&'i DTensor> {
    let Some(first) = inputs.first() else {
        unreachable!("every op has an operand");
    };
    match inputs.iter().find(|other| other.device_mesh() != first.device_mesh()) {
        None => Ok(first),
        Some(other) => Err(Error::ForeignMesh {
            what: format!(
                "operands of {op} on different meshes, of which one must be moved by redistribute_to"
            ),
            expected: first.device_mesh().ranks().to_vec(),
            got: other.device_mesh().ranks().to_vec(),
        }),
    }
}

fn describe(op: &str, inputs: &[&DTensor]) -> String {
    let each: Vec<String> = inputs
        .iter()
        .map(|input| format!("{:?} {}", input.shape(), crate::placement::picture(input.placements())))
        .collect();
    format!("{op} of {}", each.join(" and "))
}
