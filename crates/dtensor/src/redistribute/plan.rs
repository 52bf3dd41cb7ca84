//! From → to placements on one mesh, as a list of steps. Pure: no tensor, no group.

use std::fmt;

use sconce_mesh::ReduceOp;

use crate::{Error, Placement, Result, TensorBox, local_box, placement::picture};

/// One step of a redistribute, and the placements after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// The placements when it is done.
    pub placements: Vec<Placement>,
}

/// What a step does. Mesh dims are positions in the mesh's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Partial → Replicate along one mesh dim.
    AllReduce {
        /// The mesh dim.
        mesh_dim: usize,
        /// The reduction that was pending.
        op: ReduceOp,
    },
    /// Partial → Shard along one mesh dim.
    ReduceScatter {
        /// The mesh dim.
        mesh_dim: usize,
        /// The tensor dim that is split.
        tensor_dim: usize,
        /// The reduction that was pending.
        op: ReduceOp,
    },
    /// Shard → Replicate along one mesh dim.
    AllGather {
        /// The mesh dim.
        mesh_dim: usize,
        /// The tensor dim that was split.
        tensor_dim: usize,
    },
    /// Every rank already holds what it needs: a local copy.
    Slice,
    /// Every rank receives exactly the elements it lacks, in one all_to_all over the mesh.
    Exchange,
    /// Replicate → Partial: a local scaling, so that the reduction gives the tensor back.
    MakePartial {
        /// The mesh dim.
        mesh_dim: usize,
        /// The reduction that becomes pending.
        op: ReduceOp,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} -> {}", self.action, picture(&self.placements))
    }
}

/// Steps that bring a tensor of `shape` from `from` to `to`; none if they are equal.
///
/// Reductions come first, reduce-scatters before all-reduces, because they shrink what later steps move; the
/// rest is one step.
///
/// # Errors
/// `InvalidPlacement` for Partial → another Partial, which has no meaning.
///
/// # Source
/// The transitions of `torch/distributed/tensor/_redistribute.py`; torch walks mesh dims one by one, we move all
/// shards in one exchange.
pub fn plan(
    shape: &[usize],
    mesh_shape: &[usize],
    from: &[Placement],
    to: &[Placement],
) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    let mut now = from.to_vec();
    reduce_partials(&mut now, to, &mut steps)?;
    let moved: Vec<Placement> = to.iter().zip(&now).map(|(to, now)| before_partial(*to, *now)).collect();
    if let Some(action) = movement(shape, mesh_shape, &now, &moved) {
        now = moved;
        steps.push(Step { action, placements: now.clone() });
    }
    for mesh_dim in 0..to.len() {
        if let (Placement::Partial(op), Placement::Replicate) = (to[mesh_dim], now[mesh_dim]) {
            now[mesh_dim] = to[mesh_dim];
            steps.push(Step { action: Action::MakePartial { mesh_dim, op }, placements: now.clone() });
        }
    }
    Ok(steps)
}

/// A target that becomes partial at the end is reached through Replicate, unless it is partial already.
fn before_partial(to: Placement, now: Placement) -> Placement {
    match to {
        Placement::Partial(_) if to != now => Placement::Replicate,
        _ => to,
    }
}

fn reduce_partials(now: &mut [Placement], to: &[Placement], steps: &mut Vec<Step>) -> Result<()> {
    for mesh_dim in 0..now.len() {
        if let (Placement::Partial(op), Placement::Shard(tensor_dim)) = (now[mesh_dim], to[mesh_dim])
            && is_innermost(now, mesh_dim, tensor_dim)
        {
            now[mesh_dim] = to[mesh_dim];
            let action = Action::ReduceScatter { mesh_dim, tensor_dim, op };
            steps.push(Step { action, placements: now.to_vec() });
        }
    }
    for mesh_dim in 0..now.len() {
        let Placement::Partial(op) = now[mesh_dim] else { continue };
        if now[mesh_dim] == to[mesh_dim] {
            continue;
        }
        if let Placement::Partial(other) = to[mesh_dim] {
            let what = format!("a pending {op} cannot become a pending {other} (mesh dim {mesh_dim})");
            return Err(Error::InvalidPlacement { placements: picture(to), what });
        }
        now[mesh_dim] = Placement::Replicate;
        steps.push(Step { action: Action::AllReduce { mesh_dim, op }, placements: now.to_vec() });
    }
    Ok(())
}

/// True if no later mesh dim splits `tensor_dim` further: then the chunks of `mesh_dim` are whole.
fn is_innermost(placements: &[Placement], mesh_dim: usize, tensor_dim: usize) -> bool {
    !placements[mesh_dim + 1..].contains(&Placement::Shard(tensor_dim))
}

/// The one step between placements whose pending reductions are equal; `None` if nothing changes.
fn movement(shape: &[usize], mesh_shape: &[usize], from: &[Placement], to: &[Placement]) -> Option<Action> {
    if from == to {
        return None;
    }
    let held = boxes_by_coordinate(shape, mesh_shape, from);
    let wanted = boxes_by_coordinate(shape, mesh_shape, to);
    if held.iter().zip(&wanted).all(|(held, wanted)| held.contains(wanted)) {
        return Some(Action::Slice);
    }
    let mut changed = (0..from.len()).filter(|dim| from[*dim] != to[*dim]);
    let (first, more) = (changed.next()?, changed.next());
    match (from[first], to[first], more) {
        (Placement::Shard(tensor_dim), Placement::Replicate, None)
            if is_innermost(from, first, tensor_dim) =>
        {
            Some(Action::AllGather { mesh_dim: first, tensor_dim })
        }
        _ => Some(Action::Exchange),
    }
}

/// The box of each coordinate of the mesh, row-major.
fn boxes_by_coordinate(shape: &[usize], mesh_shape: &[usize], placements: &[Placement]) -> Vec<TensorBox> {
    let n_ranks = mesh_shape.iter().product::<usize>();
    (0..n_ranks).map(|nth| local_box(shape, mesh_shape, &coordinate(mesh_shape, nth), placements)).collect()
}

/// The coordinate of the `nth` position of a row-major mesh.
pub(crate) fn coordinate(mesh_shape: &[usize], nth: usize) -> Vec<usize> {
    let mut left = nth;
    let mut at = vec![0; mesh_shape.len()];
    for dim in (0..mesh_shape.len()).rev() {
        at[dim] = left % mesh_shape[dim];
        left /= mesh_shape[dim];
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use Placement::{Partial, Replicate, Shard};

    const SUM: ReduceOp = ReduceOp::Sum;

    #[track_caller]
    fn check(mesh: &[usize], from: &[Placement], to: &[Placement], expected: &[Action]) {
        let steps = plan(&[6, 10], mesh, from, to).unwrap();
        assert_eq!(steps.iter().map(|s| s.action).collect::<Vec<_>>(), expected, "{from:?} -> {to:?}");
        assert_eq!(steps.last().map_or(from, |s| &s.placements), to);
    }

    #[test]
    fn each_transition_takes_its_one_collective() {
        let (mesh_dim, tensor_dim, op) = (0, 0, SUM);
        check(&[4], &[Shard(0)], &[Shard(0)], &[]);
        check(&[4], &[Shard(0)], &[Replicate], &[Action::AllGather { mesh_dim, tensor_dim }]);
        check(&[4], &[Shard(0)], &[Shard(1)], &[Action::Exchange]);
        check(&[4], &[Replicate], &[Shard(1)], &[Action::Slice]);
        check(&[4], &[Partial(SUM)], &[Replicate], &[Action::AllReduce { mesh_dim, op }]);
        check(&[4], &[Partial(SUM)], &[Shard(0)], &[Action::ReduceScatter { mesh_dim, tensor_dim, op }]);
        check(&[4], &[Replicate], &[Partial(SUM)], &[Action::MakePartial { mesh_dim, op }]);
    }

    #[test]
    fn hsdp_to_replicated_is_one_gather_in_the_shard_group() {
        let gather = Action::AllGather { mesh_dim: 1, tensor_dim: 0 };
        check(&[2, 2], &[Replicate, Shard(0)], &[Replicate, Replicate], &[gather]);
    }

    #[test]
    fn an_outer_chunk_of_a_nested_split_is_exchanged_not_gathered() {
        check(&[2, 2], &[Shard(0), Shard(0)], &[Replicate, Shard(0)], &[Action::Exchange]);
    }

    #[test]
    fn reductions_come_before_movement() {
        let reduce = Action::AllReduce { mesh_dim: 0, op: SUM };
        check(&[2, 2], &[Partial(SUM), Shard(0)], &[Shard(0), Shard(0)], &[reduce, Action::Exchange]);
    }

    #[test]
    fn one_pending_reduction_cannot_become_another() {
        let refused = plan(&[4], &[2], &[Partial(SUM)], &[Partial(ReduceOp::Max)]).unwrap_err();
        let expected = "placements [P(max)]: a pending sum cannot become a pending max (mesh dim 0)";
        assert_eq!(refused.to_string(), expected);
    }
}
