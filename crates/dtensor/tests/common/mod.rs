//! What the tests of DTensors share: the oracle's words as ours, terms of reductions, and reading values back.

#![allow(dead_code, reason = "each test binary uses its part")]

use candle_core::{Device, Tensor};
use sconce_dtensor::Placement;
use sconce_mesh::{CollectiveRecord, DeviceMesh, DeviceType, ProcessGroup, ReduceOp};
use sconce_testkit::oracle::{Place, held, values};

/// The oracle's placements as the crate's.
pub(crate) fn ours(places: &[Place]) -> Vec<Placement> {
    let one = |place: &Place| match *place {
        Place::Shard(dim) => Placement::Shard(dim as isize),
        Place::Replicate => Placement::Replicate,
        Place::Partial(op) => Placement::Partial(op),
    };
    places.iter().map(one).collect()
}

pub(crate) fn mesh(world: &ProcessGroup, shape: &[usize]) -> DeviceMesh {
    DeviceMesh::new(world, DeviceType::Cpu, shape, &[]).unwrap()
}

/// The global tensor's value at an index: a multiple of 840, so that it divides by every product of mesh dims up to 8
/// ranks, and small enough that sums of 8 are exact.
pub(crate) fn value(index: usize) -> f32 {
    ((index % 1999) * 840) as f32
}

/// What the rank at `at` holds: its part of the tensor, of a pending reduction its term.
pub(crate) fn source(shape: &[usize], mesh: &[usize], at: &[usize], places: &[Place]) -> Vec<f32> {
    let pending: Vec<usize> =
        (0..places.len()).filter(|dim| matches!(places[*dim], Place::Partial(_))).collect();
    let Some(Place::Partial(op)) = pending.first().map(|dim| places[*dim]) else {
        return values(shape, &held(shape, mesh, at, places), value);
    };
    let n: usize = pending.iter().map(|dim| mesh[*dim]).product();
    let k = pending.iter().fold(0, |k, dim| k * mesh[*dim] + at[*dim]);
    values(shape, &held(shape, mesh, at, places), |index| term(op, value(index), (index + k) % n, n))
}

/// Term `k` of `n` whose reduction is `value`; a multiple of 840 as the value is, because terms are divided again where a
/// plan makes a reduction pending on a further mesh dim.
fn term(op: ReduceOp, value: f32, k: usize, n: usize) -> f32 {
    let others: f32 = (1..n).map(|k| 840.0 * k as f32).sum();
    match (op, k) {
        (ReduceOp::Sum, 0) => value - others,
        (ReduceOp::Avg, 0) => value - others,
        (ReduceOp::Sum, k) => 840.0 * k as f32,
        (ReduceOp::Avg, k) => value + 840.0 * k as f32,
        (ReduceOp::Min, k) => value + k as f32,
        (ReduceOp::Max, k) => value - k as f32,
        (ReduceOp::Prod, 0) => value,
        (ReduceOp::Prod, _) => 1.0,
    }
}

pub(crate) fn tensor(values: Vec<f32>, shape: &[usize]) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub(crate) fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Bytes that this rank received in all data collectives of a mesh.
pub(crate) fn received_bytes(mesh: &DeviceMesh) -> usize {
    let mut groups: Vec<ProcessGroup> = vec![];
    for bits in 1..1usize << mesh.ndim() {
        let dims: Vec<usize> = (0..mesh.ndim()).filter(|dim| bits >> dim & 1 == 1).collect();
        let group = mesh.joint_group(&dims).unwrap();
        if !groups.iter().any(|known| known.same_group(&group)) {
            groups.push(group);
        }
    }
    let is_data = |c: &CollectiveRecord| !c.call.starts_with("subgroups(") && !c.call.contains("object(");
    groups.iter().flat_map(|g| g.flight_record().collectives).filter(is_data).map(|c| c.received_bytes).sum()
}
