//! What tensors must do wherever they lie: each body runs on the CPU, and with CUDA tensors where there is a device.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};
use sconce_checkpoint::{LoadOptions, Saver, load_with};
use sconce_dtensor::Placement::{self, Partial, Replicate, Shard};
use sconce_dtensor::{DTensor, FlatTensor, StateDict, Value};
use sconce_fsdp::{
    Fsdp, FsdpBuilder, FsdpConfig, MixedPrecision, Optimizer, Overlap, Sgd, SgdConfig, StateDictType,
    WrapPolicy, nn,
};
use sconce_mesh::{DeviceMesh, ProcessGroup, ReduceOp, functional};
use sconce_testkit::{Place, gpu_ranks, rank_tests};

const WIDTH: usize = 8;
const CONTEXT: usize = 3;
const VOCABULARY: usize = 11;
const LR: f64 = 0.1;

/// Repeatable values in [-0.5, 0.5).
fn noise(shape: &[usize], seed: usize) -> Tensor {
    let scrambled = |i: usize| ((i + 1).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 2003;
    let values: Vec<f32> = (0..shape.iter().product()).map(|i| scrambled(i) as f32 / 2003.0 - 0.5).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let host = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    host.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, relative to the largest magnitude that is expected.
fn difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    got.iter().zip(expected).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs() / scale))
}

/// A block of a transformer between an embedding and a head, of the fused modules.
struct Model {
    embedding: nn::Embedding,
    norm: nn::LayerNorm,
    qkv: nn::Linear,
    out: nn::Linear,
    head: nn::Linear,
}

impl Model {
    fn new(vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            embedding: nn::embedding(VOCABULARY, WIDTH, vb.pp("embedding"))?,
            norm: nn::layer_norm(WIDTH, 1e-5, vb.pp("norm"))?,
            qkv: nn::linear_no_bias(WIDTH, 3 * WIDTH, vb.pp("block.qkv"))?,
            out: nn::linear(WIDTH, WIDTH, vb.pp("block.out"))?,
            head: nn::linear(WIDTH, VOCABULARY, vb.pp("head"))?,
        })
    }

    fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        let x = self.embedding.forward(tokens)?;
        let mixed = nn::causal_attention(&self.qkv.forward(&self.norm.forward(&x)?)?, 2)?;
        let x = (x + nn::gelu(&self.out.forward(&mixed)?)?)?;
        let logits = self.head.forward(&x)?.reshape(((), VOCABULARY))?;
        nn::cross_entropy(&logits.to_dtype(DType::F32)?, &tokens.flatten_all()?)
    }
}

/// Two sequences of a rank.
fn tokens(rank: usize) -> Tensor {
    let token = |i: usize| ((i * 7 + rank * 5 + 2) % VOCABULARY) as u32;
    let all: Vec<u32> = (0..2 * CONTEXT).map(token).collect();
    Tensor::from_vec(all, (2, CONTEXT), &Device::Cpu).unwrap()
}

fn sharded(
    world: &ProcessGroup,
    place: &Place,
    precision: MixedPrecision,
    overlap: Overlap,
) -> (Model, Fsdp) {
    let mesh = DeviceMesh::new(world, place.device_type, &[world.size()], &["shard"]).unwrap();
    let config = FsdpConfig {
        device: place.device.clone(),
        units: WrapPolicy::MinNumel(1 << 20),
        mixed_precision: precision,
        overlap,
        ..FsdpConfig::default()
    };
    let builder = FsdpBuilder::new(&mesh, config).unwrap();
    let model = Model::new(builder.var_builder()).unwrap();
    (model, builder.build().unwrap())
}

fn full(fsdp: &Fsdp) -> HashMap<String, Vec<f32>> {
    let state = fsdp.state_dict(StateDictType::Full).unwrap();
    let one = |key: &str| values(state.tensor::<FlatTensor>(key).unwrap().flat());
    state.keys().map(|key| (key.to_owned(), one(key))).collect()
}

/// The weights after a step of plain candle on the CPU over the batches of all ranks, from the same initial weights.
fn plain_step(fsdp: &Fsdp, n_ranks: usize) -> HashMap<String, Vec<f32>> {
    let state = fsdp.state_dict(StateDictType::Full).unwrap();
    let map = VarMap::new();
    for (fqn, tensor) in state.flat_tensors().unwrap() {
        let flat = state.tensor::<FlatTensor>(fqn.as_str()).unwrap().flat();
        let var = Var::from_tensor(&flat.reshape(tensor.global_shape()).unwrap()).unwrap();
        map.data().lock().unwrap().insert(fqn.0, var);
    }
    let model = Model::new(VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu)).unwrap();
    let losses = (0..n_ranks).map(|rank| model.loss(&tokens(rank)).unwrap());
    let mean = losses.reduce(|a, b| (a + b).unwrap()).unwrap().affine(1.0 / n_ranks as f64, 0.0).unwrap();
    let gradients = mean.backward().unwrap();
    let vars = map.data().lock().unwrap().clone();
    let stepped = vars.iter().map(|(fqn, var)| {
        let step = gradients.get(var).unwrap().affine(LR, 0.0).unwrap();
        (fqn.clone(), values(&(var.as_tensor() - step).unwrap()))
    });
    stepped.collect()
}

fn a_sharded_model_steps_as_plain_candle(world: &ProcessGroup, place: &Place) {
    // Half the accuracy of a half of the weights' steps; in f32 what other orders of summation give.
    let half = MixedPrecision { param_dtype: DType::F16, reduce_dtype: DType::F32, output_dtype: None };
    for (precision, tolerance) in [(MixedPrecision::default(), 1e-5), (half, 2e-2)] {
        for overlap in [Overlap::NONE, Overlap::default()] {
            let (model, fsdp) = sharded(world, place, precision, overlap);
            let expected = plain_step(&fsdp, world.size());
            let mine = place.put(&tokens(world.rank().0)).unwrap();
            let loss = fsdp.forward(&[], || model.loss(&mine)).unwrap();
            fsdp.backward(&loss).unwrap();
            Sgd::new(&fsdp, SgdConfig { lr: LR, ..SgdConfig::default() }).unwrap().step(&fsdp).unwrap();
            for (fqn, got) in full(&fsdp) {
                let off = difference(&got, &expected[&fqn]);
                assert!(off <= tolerance, "{fqn} under {precision:?}, {overlap:?}: off by {off}");
            }
        }
    }
}

fn a_freed_parameter_is_an_error(world: &ProcessGroup, place: &Place) {
    let (model, fsdp) = sharded(world, place, MixedPrecision::default(), Overlap::NONE);
    let mine = place.put(&tokens(0)).unwrap();
    assert!(model.loss(&mine).is_err());
    assert!(fsdp.eval(|| model.loss(&mine)).is_ok());
    assert!(model.loss(&mine).is_err());
}

/// Through every pair of placements, uneven along both dims.
fn redistributes_keep_every_element(world: &ProcessGroup, place: &Place) {
    let mesh = DeviceMesh::new(world, place.device_type, &[world.size()], &[]).unwrap();
    let whole = noise(&[5, 7], 3);
    let all = [Shard(0), Shard(1), Replicate, Partial(ReduceOp::Sum)];
    let start = DTensor::distribute(&place.put(&whole).unwrap(), &mesh, &[Shard(0)]).unwrap();
    for (from, to) in all.iter().flat_map(|from| all.iter().map(move |to| (*from, *to))) {
        let moved = start.redistribute(&[from]).unwrap().redistribute(&[to]).unwrap();
        assert!(moved.to_local().device().same_device(&place.device), "{from} to {to}");
        let got = values(&moved.full_tensor().unwrap());
        // Terms of a sum are rounded once.
        assert!(difference(&got, &values(&whole)) <= 1e-6, "{from} to {to}");
    }
}

fn gradients_flow_through_collectives(world: &ProcessGroup, place: &Place) {
    let n = world.size();
    let x = Var::from_tensor(&place.put(&noise(&[2 * n, 3], world.rank().0)).unwrap()).unwrap();
    let weight = place.put(&noise(&[2 * n * n, 3], 77)).unwrap();
    let gathered = functional::all_gather(&x, world).unwrap();
    let loss = (&gathered * &weight).unwrap().sum_all().unwrap();
    let gradient = loss.backward().unwrap().get(&x).unwrap().clone();
    // Every rank's loss takes the same part of the weight.
    let part = weight.narrow(0, world.rank().0 * 2 * n, 2 * n).unwrap().affine(n as f64, 0.0).unwrap();
    assert!(difference(&values(&gradient), &values(&part)) <= 1e-6);

    let scattered = functional::reduce_scatter(&x, ReduceOp::Avg, world).unwrap();
    let reduced = functional::all_reduce(&x, ReduceOp::Avg, world).unwrap();
    let mine = reduced.narrow(0, world.rank().0 * 2, 2).unwrap();
    assert!(difference(&values(&scattered), &values(&mine)) <= 1e-6);
    let swapped = functional::all_to_all(&functional::all_to_all(&x, world).unwrap(), world).unwrap();
    assert_eq!(values(&swapped), values(&x));
}

/// A save in the background keeps what the tensors held when it began, and the load brings it back, also into parts.
fn tensors_of_the_device_are_saved_and_loaded(world: &ProcessGroup, place: &Place, dir: &Path) {
    let mesh = DeviceMesh::new(world, place.device_type, &[world.size()], &[]).unwrap();
    // Longer than one pinned buffer.
    let whole = noise(&[1500, 1000], 5);
    let split =
        |placement: Placement| DTensor::from_copy(&place.put(&whole).unwrap(), &mesh, &[placement]).unwrap();
    let local = Var::from_tensor(&place.put(&noise(&[3, 5], 9)).unwrap()).unwrap();
    let state_of = |rows: DTensor, local: &Var| {
        StateDict::from_iter([
            ("rows", Value::from(rows)),
            ("local", Value::try_from(local.as_tensor()).unwrap()),
        ])
    };
    let mut saver = Saver::new(Some(world)).unwrap();
    let path = dir.join("checkpoint");
    saver.save(&path, &state_of(split(Shard(0)), &local), false).unwrap();
    local.set(&local.zeros_like().unwrap()).unwrap();
    saver.wait().unwrap();

    let zeros =
        DTensor::from_copy(&place.put(&whole.zeros_like().unwrap()).unwrap(), &mesh, &[Shard(1)]).unwrap();
    let mut state = state_of(zeros, &local);
    load_with(&path, &mut state, LoadOptions { group: Some(world), ..LoadOptions::default() }).unwrap();
    let loaded: &DTensor = state.tensor("rows").unwrap();
    assert!(loaded.to_local().device().same_device(&place.device));
    assert_eq!(values(loaded.to_local()), values(split(Shard(1)).to_local()));
    assert_eq!(values(local.as_tensor()), values(&noise(&[3, 5], 9)));
}

rank_tests! {
    ranks: 2, deadline: Duration::from_secs(60);
    mod on_the_cpu {
        a_sharded_model_steps_as_plain_candle => |rank| {
            super::a_sharded_model_steps_as_plain_candle(&rank.world, &Place::CPU);
        };
        a_freed_parameter_is_an_error => |rank| super::a_freed_parameter_is_an_error(&rank.world, &Place::CPU);
        redistributes_keep_every_element => |rank| {
            super::redistributes_keep_every_element(&rank.world, &Place::CPU);
        };
        gradients_flow_through_collectives => |rank| {
            super::gradients_flow_through_collectives(&rank.world, &Place::CPU);
        };
        tensors_of_the_device_are_saved_and_loaded => |rank| {
            super::tensors_of_the_device_are_saved_and_loaded(&rank.world, &Place::CPU, &rank.dir);
        };
    }
}

rank_tests! {
    ranks: gpu_ranks(), deadline: Duration::from_secs(300);
    mod on_cuda {
        #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
        a_sharded_model_steps_as_plain_candle => |rank| {
            super::a_sharded_model_steps_as_plain_candle(&rank.world, &Place::cuda(&rank.world));
        };
        #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
        a_freed_parameter_is_an_error => |rank| {
            super::a_freed_parameter_is_an_error(&rank.world, &Place::cuda(&rank.world));
        };
        #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
        redistributes_keep_every_element => |rank| {
            super::redistributes_keep_every_element(&rank.world, &Place::cuda(&rank.world));
        };
        #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
        gradients_flow_through_collectives => |rank| {
            super::gradients_flow_through_collectives(&rank.world, &Place::cuda(&rank.world));
        };
        #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
        tensors_of_the_device_are_saved_and_loaded => |rank| {
            super::tensors_of_the_device_are_saved_and_loaded(&rank.world, &Place::cuda(&rank.world), &rank.dir);
        };
    }
}
