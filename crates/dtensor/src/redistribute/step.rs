//! Step and Plan: what a redistribute does, as values that print themselves. Pure.

use std::fmt;

use sconce_mesh::ReduceOp;

use crate::{Placement, placement::picture};

/// How a tensor gets from one list of placements to another on one mesh.
///
/// Its `Display` is for people:
///
/// ```
/// use sconce_dtensor::{Placement::*, plan};
/// use sconce_mesh::ReduceOp;
///
/// let plan = plan(&[8, 8], &[2, 2], &[Partial(ReduceOp::Sum), Shard(0)], &[Replicate, Replicate])?;
/// assert_eq!(plan.to_string(), "\
/// [P(sum), S(0)] -> [R, R], shape [8, 8] on mesh [2, 2]: all ranks together receive 256 elements
///   1. all_reduce sum over mesh dim 0 -> [R, S(0)]: 128 elements
///   2. all_gather over mesh dim 1 -> [R, R]: 128 elements");
/// # Ok::<(), sconce_dtensor::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Shape of the global tensor.
    pub shape: Vec<usize>,
    /// Shape of the mesh.
    pub mesh_shape: Vec<usize>,
    /// The placements before the first step.
    pub from: Vec<Placement>,
    /// What is done, in order; nothing if the placements are equal.
    pub steps: Vec<Step>,
}

/// One step of a redistribute, and the placements after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// The placements when it is done.
    pub placements: Vec<Placement>,
    /// Elements that all ranks of the mesh together receive from others, by an algorithm that moves the fewest.
    pub received_numel: usize,
}

/// What a step does. Mesh dims are positions in the mesh's shape, ascending; several are one collective over all the
/// ranks along them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Partial → Replicate.
    AllReduce {
        /// The mesh dims.
        mesh_dims: Vec<usize>,
        /// The reduction that was pending.
        op: ReduceOp,
    },
    /// Partial → Shard.
    ReduceScatter {
        /// The mesh dims.
        mesh_dims: Vec<usize>,
        /// The reduction that was pending.
        op: ReduceOp,
    },
    /// Shard → Replicate.
    AllGather {
        /// The mesh dims.
        mesh_dims: Vec<usize>,
    },
    /// Every rank already holds what it needs: a local copy.
    Slice,
    /// Every rank receives exactly the elements it lacks, in one all_to_all over the mesh.
    Exchange,
    /// Replicate or Shard → Partial: local scaling, or zeros around the shard, so that the reduction gives the tensor
    /// back.
    MakePartial {
        /// The mesh dim.
        mesh_dim: usize,
        /// The reduction that becomes pending.
        op: ReduceOp,
    },
}

impl Plan {
    /// Elements that all ranks of the mesh together receive from others.
    pub fn received_numel(&self) -> usize {
        self.steps.iter().map(|step| step.received_numel).sum()
    }

    /// The placements after the last step.
    pub fn to(&self) -> &[Placement] {
        self.steps.last().map_or(&self.from, |step| &step.placements)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (picture(&self.from), picture(self.to()));
        write!(f, "{from} -> {to}, shape {:?} on mesh {:?}: ", self.shape, self.mesh_shape)?;
        if self.steps.is_empty() {
            return f.write_str("nothing to do");
        }
        write!(f, "all ranks together receive {} elements", self.received_numel())?;
        let mut numbered = self.steps.iter().enumerate();
        numbered.try_for_each(|(nth, step)| write!(f, "\n  {}. {step}", nth + 1))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}: {} elements", self.action, picture(&self.placements), self.received_numel)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::AllReduce { mesh_dims, op } => write!(f, "all_reduce {op} over {}", dims(mesh_dims)),
            Action::ReduceScatter { mesh_dims, op } => {
                write!(f, "reduce_scatter {op} over {}", dims(mesh_dims))
            }
            Action::AllGather { mesh_dims } => write!(f, "all_gather over {}", dims(mesh_dims)),
            Action::Slice => f.write_str("slice"),
            Action::Exchange => f.write_str("exchange over the mesh"),
            Action::MakePartial { mesh_dim, op } => write!(f, "partial {op} over mesh dim {mesh_dim}"),
        }
    }
}

/// `mesh dim 1`, `mesh dims 0, 2`.
fn dims(dims: &[usize]) -> String {
    let numbers: Vec<String> = dims.iter().map(usize::to_string).collect();
    format!("mesh dim{} {}", if dims.len() == 1 { "" } else { "s" }, numbers.join(", "))
}
