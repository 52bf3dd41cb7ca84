//! Generators of meshes, shapes and placements for properties.

use proptest::prelude::*;
use sconce_mesh::ReduceOp;

use crate::oracle::Place;

/// One tensor on one mesh, from one list of placements to another.
#[derive(Debug, Clone)]
pub struct RedistributeCase {
    /// Shape of the mesh.
    pub mesh: Vec<usize>,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Placements before.
    pub from: Vec<Place>,
    /// Placements after.
    pub to: Vec<Place>,
}

/// Number of cases of a property: the environment variable's if it is set, else `default`.
pub fn cases(variable: &str, default: u32) -> u32 {
    std::env::var(variable).ok().and_then(|count| count.parse().ok()).unwrap_or(default)
}

/// Meshes of 1 to 3 dims with 1 to `world` ranks.
pub fn mesh_shapes(world: usize) -> impl Strategy<Value = Vec<usize>> {
    let all: Vec<Vec<usize>> = (1..=3)
        .flat_map(|ndim| crate::oracle::coordinates(&vec![world; ndim]))
        .map(|at| at.iter().map(|len| len + 1).collect::<Vec<_>>())
        .filter(|shape| shape.iter().product::<usize>() <= world)
        .collect();
    prop::sample::select(all)
}

/// Shapes of rank 0 to 4, sizes 0 to 13.
pub fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..=13, 0..=4)
}

/// Any op.
pub fn reduce_ops() -> impl Strategy<Value = ReduceOp> {
    prop::sample::select(vec![ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::Prod])
}

/// Placements of a tensor of `ndim` dims; pending reductions are of `op`, if there may be some.
pub fn placements(ndim: usize, mesh_ndim: usize, op: Option<ReduceOp>) -> BoxedStrategy<Vec<Place>> {
    let mut choices = vec![(2, Just(Place::Replicate).boxed())];
    if ndim > 0 {
        choices.push((5, (0..ndim).prop_map(Place::Shard).boxed()));
    }
    if let Some(op) = op {
        choices.push((2, Just(Place::Partial(op)).boxed()));
    }
    prop::collection::vec(prop::strategy::Union::new_weighted(choices), mesh_ndim).boxed()
}

/// Any transition of placements in a world of up to `world` ranks.
pub fn redistribute_cases(world: usize) -> impl Strategy<Value = RedistributeCase> {
    (mesh_shapes(world), shapes(), reduce_ops()).prop_flat_map(|(mesh, shape, op)| {
        let places = || placements(shape.len(), mesh.len(), Some(op));
        let fixed = (Just(mesh.clone()), Just(shape.clone()));
        (fixed, places(), places()).prop_map(|((mesh, shape), from, to)| RedistributeCase {
            mesh,
            shape,
            from,
            to,
        })
    })
}
