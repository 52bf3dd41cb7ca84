//! What the tests of this crate share: meshes of any strategy, and plain candle as the reference.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::collections::HashMap;
use std::time::Duration;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use sconce_dtensor::{FlatTensor, StateDict, Value};
use sconce_fsdp::{Fsdp, ShardingStrategy, StateDictType};
use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
use sconce_testkit::run_ranks;

pub(crate) const STRATEGIES: [ShardingStrategy; 5] = [
    ShardingStrategy::FullShard,
    ShardingStrategy::ShardGradOp,
    ShardingStrategy::NoShard,
    ShardingStrategy::HybridShard,
    ShardingStrategy::HybridShardZero2,
];

/// Runs `body` on `n` thread ranks and returns what each returned, by rank.
pub(crate) fn ranks<R: Send>(n: usize, body: impl Fn(ProcessGroup) -> R + Sync) -> Vec<R> {
    run_ranks(n, Duration::from_secs(60), body)
}

/// The mesh that a strategy needs over all ranks: hybrid ones replicate over two ranks where the world is even.
pub(crate) fn mesh(world: &ProcessGroup, strategy: ShardingStrategy) -> DeviceMesh {
    let replicas = if world.size().is_multiple_of(2) { 2 } else { 1 };
    let shape = match strategy {
        ShardingStrategy::HybridShard | ShardingStrategy::HybridShardZero2 => {
            vec![replicas, world.size() / replicas]
        }
        _ => vec![world.size()],
    };
    DeviceMesh::new(world, DeviceType::Cpu, &shape, &[]).unwrap()
}

/// Whole parameters by name.
pub(crate) fn full(fsdp: &Fsdp) -> HashMap<String, Vec<f32>> {
    values(&fsdp.state_dict(StateDictType::Full).unwrap())
}

/// Every whole tensor of one level of a state dict.
pub(crate) fn values(state: &StateDict<'_>) -> HashMap<String, Vec<f32>> {
    let one = |key: &str| state.tensor::<FlatTensor>(key).unwrap().flat().to_vec1::<f32>().unwrap();
    state.keys().map(|key| (key.to_owned(), one(key))).collect()
}

/// Plain candle variables with the values of a sharded model, and a var builder over them.
pub(crate) fn plain_copy(fsdp: &Fsdp) -> (VarMap, VarBuilder<'static>) {
    let state = fsdp.state_dict(StateDictType::Full).unwrap();
    let map = VarMap::new();
    for (fqn, tensor) in state.flat_tensors().unwrap() {
        let flat = state.tensor::<FlatTensor>(fqn.as_str()).unwrap().flat();
        let var = Var::from_tensor(&flat.reshape(tensor.global_shape()).unwrap()).unwrap();
        map.data().lock().unwrap().insert(fqn.0, var);
    }
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    (map, vb)
}

/// A state dict of whole candle tensors.
pub(crate) fn whole_state(tensors: &HashMap<String, Tensor>) -> StateDict<'static> {
    tensors.iter().map(|(fqn, t)| (fqn.clone(), Value::try_from(t).unwrap())).collect()
}

/// Repeatable values in [-1, 1).
pub(crate) fn noise(n: usize, seed: usize) -> Vec<f32> {
    let scrambled = |i: usize| ((i + 1).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 2003;
    (0..n).map(|i| scrambled(i) as f32 / 1001.5 - 1.0).collect()
}

pub(crate) fn tensor(shape: &[usize], seed: usize) -> Tensor {
    Tensor::from_vec(noise(shape.iter().product(), seed), shape, &Device::Cpu).unwrap()
}

/// Largest difference, relative to the largest magnitude of the expected values.
pub(crate) fn relative_difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    got.iter().zip(expected).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs() / scale))
}
