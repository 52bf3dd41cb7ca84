//! Placement: how a tensor lies along one dim of a mesh.

use std::fmt;

use sconce_mesh::ReduceOp;

/// How a tensor lies along one mesh dim. One per dim of the mesh.
///
/// # Source
/// `torch.distributed.tensor.placement_types`: `Shard`, `Replicate`, `Partial`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Placement {
    /// Split along this tensor dim as `torch.chunk` does; mesh dims that split the same tensor dim nest left to
    /// right.
    Shard(usize),
    /// Every rank of the mesh dim holds the same values.
    Replicate,
    /// Every rank holds a term; the tensor is their reduction.
    Partial(ReduceOp),
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Placement::Shard(dim) => write!(f, "S({dim})"),
            Placement::Replicate => f.write_str("R"),
            Placement::Partial(op) => write!(f, "P({op})"),
        }
    }
}

/// Placements of all mesh dims as one text: `[R, S(0)]`.
pub(crate) fn picture(placements: &[Placement]) -> String {
    let each: Vec<String> = placements.iter().map(Placement::to_string).collect();
    format!("[{}]", each.join(", "))
}
