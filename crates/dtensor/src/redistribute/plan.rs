//! From → to placements on one mesh: the cheapest steps by what they move. Pure: no tensor, no group.
//!
//! Between two reductions one movement of exactly the lacking elements is as cheap as any sequence of movements, so
//! without terms on either side the plan is one step. With terms the order matters, and is searched for (`search.rs`).
//! Slicing before reducing, and gathering after it, may move less than reducing alone; terms that stay may be reduced
//! and made again, since moving n terms moves n times as much.

use super::geometry::{Geometry, Layout};
use super::step::{Action, Plan, Step};
use crate::{Error, Placement, Result, normalize_placements, placement::picture};

mod search;

/// The cheapest plan by elements received, of all orders of steps; of equal ones that with the fewest steps.
///
/// # Errors
/// `InvalidPlacement` for placements that do not fit, and for Partial → another Partial, which has no meaning.
///
/// # Source
/// The transitions of `torch/distributed/tensor/_redistribute.py`. torch walks mesh dims one by one; here all shards
/// move in one exchange, and one collective runs over several mesh dims.
pub fn plan(shape: &[usize], mesh_shape: &[usize], from: &[Placement], to: &[Placement]) -> Result<Plan> {
    let (from, to) = (
        normalize_placements(shape.len(), mesh_shape.len(), from)?,
        normalize_placements(shape.len(), mesh_shape.len(), to)?,
    );
    check_reductions(&from, &to)?;
    let steps = if from == to {
        Vec::new()
    } else if from.iter().chain(&to).any(|p| p.is_partial()) {
        search::cheapest(Geometry::new(shape, mesh_shape), &from, &to)
    } else {
        vec![movement(shape, mesh_shape, &from, &to)]
    };
    Ok(Plan { shape: shape.to_vec(), mesh_shape: mesh_shape.to_vec(), from, steps })
}

fn check_reductions(from: &[Placement], to: &[Placement]) -> Result<()> {
    for (mesh_dim, pair) in from.iter().zip(to).enumerate() {
        if let (Placement::Partial(op), Placement::Partial(other)) = pair
            && op != other
        {
            let what = format!("a pending {op} cannot become a pending {other} (mesh dim {mesh_dim})");
            return Err(Error::InvalidPlacement { placements: picture(to), what });
        }
    }
    Ok(())
}

/// The one step between placements without terms.
fn movement(shape: &[usize], mesh_shape: &[usize], from: &[Placement], to: &[Placement]) -> Step {
    let geometry = Geometry::new(shape, mesh_shape);
    let split = |p: &Placement| p.shard_dim(shape.len()).unwrap_or(shape.len());
    let layout =
        |placements: &[Placement]| geometry.layout(&placements.iter().map(split).collect::<Vec<_>>());
    let received_numel = geometry.lacking(&layout(from), &layout(to));
    let action = movement_action(&geometry, from, to, received_numel);
    Step { action, placements: to.to_vec(), received_numel }
}

/// What moves shards between placements of which the same reductions are pending, if ranks lack so many elements.
fn movement_action(geometry: &Geometry<'_>, from: &[Placement], to: &[Placement], lacking: usize) -> Action {
    match geometry.gathered_dims(from, to) {
        _ if lacking == 0 => Action::Slice,
        Some(mesh_dims) => Action::AllGather { mesh_dims },
        None => Action::Exchange,
    }
}

#[cfg(test)]
mod tests;
