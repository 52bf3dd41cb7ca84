//! Placement: how a tensor lies along one dim of a mesh.

use std::fmt;

use sconce_mesh::ReduceOp;

use crate::{Error, Result};

/// How a tensor lies along one mesh dim. One per dim of the mesh.
///
/// # Source
/// `torch.distributed.tensor.placement_types`: `Shard`, `Replicate`, `Partial`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Placement {
    /// Split along this tensor dim as `torch.chunk` does; mesh dims that split the same tensor dim nest left to
    /// right. Negative dims count from the last, and are normalized wherever a tensor's rank is known.
    Shard(isize),
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

impl Placement {
    /// The tensor dim that is split, of a tensor that has it; `None` if nothing is split.
    pub(crate) fn shard_dim(self, ndim: usize) -> Option<usize> {
        match self {
            Placement::Shard(dim) => tensor_dim(dim, ndim),
            Placement::Replicate | Placement::Partial(_) => None,
        }
    }

    /// True if a reduction is pending.
    pub(crate) fn is_partial(self) -> bool {
        matches!(self, Placement::Partial(_))
    }
}

/// A dim that may count from the last; `None` if a tensor of `ndim` dims has no such dim.
pub(crate) fn tensor_dim(dim: isize, ndim: usize) -> Option<usize> {
    let dim = if dim < 0 { ndim.checked_sub(dim.unsigned_abs()) } else { Some(dim.unsigned_abs()) };
    dim.filter(|dim| *dim < ndim)
}

/// The placements of a tensor of `ndim` dims with negative dims resolved.
///
/// # Errors
/// `InvalidPlacement` if there is not one placement a mesh dim, a sharded tensor dim does not exist, or different
/// reductions are pending at once.
///
/// ```
/// use sconce_dtensor::{Placement, normalize_placements};
///
/// assert_eq!(normalize_placements(2, 1, &[Placement::Shard(-1)])?, [Placement::Shard(1)]);
/// # Ok::<(), sconce_dtensor::Error>(())
/// ```
pub fn normalize_placements(
    ndim: usize,
    mesh_ndim: usize,
    placements: &[Placement],
) -> Result<Vec<Placement>> {
    let refuse = |what| Err(Error::InvalidPlacement { placements: picture(placements), what });
    if placements.len() != mesh_ndim {
        return refuse(format!("expected {mesh_ndim} placements, one a mesh dim, got {}", placements.len()));
    }
    let mut pending = placements.iter().filter(|p| p.is_partial());
    if let Some(first) = pending.next()
        && let Some(other) = pending.find(|p| *p != first)
    {
        return refuse(format!(
            "{first} and {other} of one tensor: terms of different reductions do not mix"
        ));
    }
    let mut normal = Vec::with_capacity(mesh_ndim);
    for placement in placements {
        normal.push(match (placement, placement.shard_dim(ndim)) {
            (_, Some(dim)) => Placement::Shard(dim as isize),
            (Placement::Shard(_), None) => {
                return refuse(format!("{placement} of a tensor with {ndim} dims"));
            }
            (other, None) => *other,
        });
    }
    Ok(normal)
}

/// Placements of all mesh dims as one text: `[R, S(0)]`.
pub(crate) fn picture(placements: &[Placement]) -> String {
    let each: Vec<String> = placements.iter().map(Placement::to_string).collect();
    format!("[{}]", each.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Placement::{Partial, Replicate, Shard};

    #[track_caller]
    fn refused(ndim: usize, mesh_ndim: usize, placements: &[Placement], expected: &str) {
        let error = normalize_placements(ndim, mesh_ndim, placements).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn negative_dims_count_from_the_last() {
        assert_eq!(normalize_placements(3, 2, &[Shard(-1), Shard(-3)]).unwrap(), [Shard(2), Shard(0)]);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        refused(2, 2, &[Replicate], "placements [R]: expected 2 placements, one a mesh dim, got 1");
        refused(1, 1, &[Shard(1)], "placements [S(1)]: S(1) of a tensor with 1 dims");
        refused(1, 1, &[Shard(-2)], "placements [S(-2)]: S(-2) of a tensor with 1 dims");
        refused(0, 1, &[Shard(0)], "placements [S(0)]: S(0) of a tensor with 0 dims");
        let mixed = [Partial(ReduceOp::Sum), Partial(ReduceOp::Max)];
        let expected = "P(sum) and P(max) of one tensor: terms of different reductions do not mix";
        refused(1, 2, &mixed, &format!("placements [P(sum), P(max)]: {expected}"));
    }
}
