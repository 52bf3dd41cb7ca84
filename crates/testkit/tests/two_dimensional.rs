//! A transformer block on a 2 x 2 mesh, data parallel over one dim and tensor parallel over the other, equals the
//! single-process one: by DTensors alone, and with FSDP over the data-parallel dim.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use candle_core::{Device, Result, Tensor, Var};
use sconce_dtensor::Placement::{self, Replicate, Shard};
use sconce_dtensor::{DTensor, StateDict, Value};
use sconce_fsdp::{FsdpBuilder, FsdpConfig, Optimizer, Sgd, SgdConfig, ShardingStrategy, StateDictType};
use sconce_mesh::{DeviceMesh, DeviceType};
use sconce_testkit::run_ranks;

const BATCH: usize = 4;
const TIME: usize = 3;
const WIDTH: usize = 8;
const HEADS: usize = 4;
const DEADLINE: Duration = Duration::from_secs(60);

/// Name, shape, and placement along the tensor-parallel dim: columns of what comes first, rows of what comes next.
const WEIGHTS: [(&str, [usize; 2], Placement); 6] = [
    ("wq", [WIDTH, WIDTH], Shard(1)),
    ("wk", [WIDTH, WIDTH], Shard(1)),
    ("wv", [WIDTH, WIDTH], Shard(1)),
    ("wo", [WIDTH, WIDTH], Shard(0)),
    ("up", [WIDTH, 4 * WIDTH], Shard(1)),
    ("down", [4 * WIDTH, WIDTH], Shard(0)),
];

/// Repeatable values in [-0.5, 0.5).
fn noise(shape: &[usize], seed: usize) -> Tensor {
    let scrambled = |i: usize| ((i + 1).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 2003;
    let values: Vec<f32> = (0..shape.iter().product()).map(|i| scrambled(i) as f32 / 2003.0 - 0.5).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn weight(nth: usize) -> Tensor {
    noise(&WEIGHTS[nth].1, nth + 1)
}

fn input() -> Tensor {
    noise(&[BATCH, TIME, WIDTH], 99)
}

/// The block in plain candle.
fn plain_block(x: &Tensor, w: &BTreeMap<&str, Tensor>) -> Result<Tensor> {
    let (b, _, _) = x.dims3()?;
    let normed = |x: &Tensor| x.broadcast_div(&x.sqr()?.mean_keepdim(2)?.affine(1.0, 1e-5)?.sqrt()?);
    let heads = |y: Tensor| y.reshape((b, TIME, HEADS, WIDTH / HEADS))?.transpose(1, 2)?.contiguous();
    let h = normed(x)?;
    let [q, k, v] = ["wq", "wk", "wv"].map(|name| h.broadcast_matmul(&w[name]).and_then(heads));
    let scores = (q?.matmul(&k?.t()?)? / 2f64.sqrt())?;
    let exp = scores.broadcast_sub(&scores.detach().max_keepdim(3)?)?.exp()?;
    let mixed = exp.broadcast_div(&exp.sum_keepdim(3)?)?.matmul(&v?)?;
    let mixed = mixed.transpose(1, 2)?.reshape((b, TIME, WIDTH))?;
    let x = (x + mixed.broadcast_matmul(&w["wo"])?)?;
    let h = normed(&x)?.broadcast_matmul(&w["up"])?.gelu()?;
    x + h.broadcast_matmul(&w["down"])?
}

/// The block on DTensors; `x` is whole along the tensor-parallel dim, and so is the result.
fn sharded_block(x: &DTensor, w: &BTreeMap<&str, DTensor>) -> sconce_dtensor::Result<DTensor> {
    let b = x.shape()[0];
    let normed = |x: &DTensor| x.div(&x.sqr()?.mean_keepdim(&[-1])?.shift(1e-5)?.sqrt()?);
    let heads = |y: DTensor| y.reshape(&[b, TIME, HEADS, WIDTH / HEADS])?.transpose(1, 2);
    let h = normed(x)?;
    let [q, k, v] = ["wq", "wk", "wv"].map(|name| h.matmul(&w[name]).and_then(heads));
    let scores = q?.matmul(&k?.t()?)?.scale(1.0 / 2f64.sqrt())?;
    let mixed = scores.softmax(-1)?.matmul(&v?)?;
    let mixed = mixed.transpose(1, 2)?.reshape(&[b, TIME, WIDTH])?;
    let x = x.add(&mixed.matmul(&w["wo"])?.redistribute(x.placements())?)?;
    let h = normed(&x)?.matmul(&w["up"])?.gelu()?;
    x.add(&h.matmul(&w["down"])?.redistribute(x.placements())?)
}

/// Output, and the gradients of the mean of its squares.
fn expected() -> (Tensor, BTreeMap<&'static str, Tensor>) {
    let vars: Vec<Var> = (0..WEIGHTS.len()).map(|nth| Var::from_tensor(&weight(nth)).unwrap()).collect();
    let named = WEIGHTS.iter().zip(&vars).map(|((name, ..), var)| (*name, var.as_tensor().clone())).collect();
    let output = plain_block(&input(), &named).unwrap();
    let grads = output.sqr().unwrap().mean_all().unwrap().backward().unwrap();
    let named = WEIGHTS.iter().zip(&vars).map(|((name, ..), var)| (*name, grads.get(var).unwrap().clone()));
    (output.detach(), named.collect())
}

#[track_caller]
fn close(got: &Tensor, expected: &Tensor, what: &str) {
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let worst = values(got).iter().zip(values(expected)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-5, "{what}: off by {worst}");
}

#[test]
fn a_block_split_by_data_and_tensors_equals_the_single_process_one() {
    let (output, grads) = expected();
    run_ranks(4, DEADLINE, |world| {
        let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &[2, 2], &["dp", "tp"]).unwrap();
        // Weights lie split along both dims, and are gathered along the data-parallel one before they are used.
        let shards: Vec<(Var, [Placement; 2])> = WEIGHTS
            .iter()
            .enumerate()
            .map(|(nth, (_, _, along_tp))| {
                let placements = [Shard(0), *along_tp];
                let shard = DTensor::from_copy(&weight(nth), &mesh, &placements).unwrap();
                (Var::from_tensor(shard.to_local()).unwrap(), placements)
            })
            .collect();
        let gathered = WEIGHTS.iter().zip(&shards).map(|((name, shape, along_tp), (shard, placements))| {
            let stored = DTensor::from_local_with_shape(shard, &mesh, placements, shape).unwrap();
            (*name, stored.redistribute(&[Replicate, *along_tp]).unwrap())
        });
        let x = DTensor::from_copy(&input(), &mesh, &[Shard(0), Replicate]).unwrap();
        let y = sharded_block(&x, &gathered.collect()).unwrap();
        assert_eq!(y.placements(), [Shard(0), Replicate]);
        close(&y.full_tensor().unwrap(), &output, "output");
        let loss = y.sqr().unwrap().mean_all().unwrap().full_tensor().unwrap();
        let store = loss.backward().unwrap();
        for ((name, shape, _), (shard, placements)) in WEIGHTS.iter().zip(&shards) {
            let local = store.get(shard).unwrap();
            let grad = DTensor::from_local_with_shape(local, &mesh, placements, shape).unwrap();
            close(&grad.full_tensor().unwrap(), &grads[name], &format!("gradient of {name}"));
        }
    });
}

#[test]
fn a_step_of_fsdp_and_tensor_parallel_equals_the_single_process_one() {
    const RATE: f64 = 0.5;
    let (_, grads) = expected();
    run_ranks(4, DEADLINE, |world| {
        let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &[2, 2], &["dp", "tp"]).unwrap();
        let (dp, tp) = (mesh.submesh(&["dp"]).unwrap(), mesh.submesh(&["tp"]).unwrap());
        let parts: Vec<DTensor> = WEIGHTS
            .iter()
            .enumerate()
            .map(|(nth, (_, _, along_tp))| DTensor::from_copy(&weight(nth), &tp, &[*along_tp]).unwrap())
            .collect();
        // Each tensor-parallel rank's shards are a model of their own, whose parameters FSDP splits again.
        let config = FsdpConfig { strategy: ShardingStrategy::FullShard, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(&dp, config).unwrap();
        let vb = builder.var_builder();
        let params: Vec<Tensor> = WEIGHTS
            .iter()
            .zip(&parts)
            .map(|((name, ..), part)| vb.get(part.to_local().dims(), name).unwrap())
            .collect();
        let fsdp = builder.build().unwrap();
        let named = WEIGHTS.iter().zip(&parts);
        let state: StateDict<'_> =
            named.map(|((name, ..), part)| (*name, Value::try_from(part.to_local()).unwrap())).collect();
        fsdp.load_state_dict(&state).unwrap();
        let mut optimizer = Sgd::new(&fsdp, SgdConfig { lr: RATE, ..SgdConfig::default() }).unwrap();

        let rows = BATCH / 2;
        let mine = input().narrow(0, dp.coordinate().unwrap()[0] * rows, rows).unwrap().contiguous().unwrap();
        let forward = || {
            let weights = WEIGHTS.iter().zip(&params).map(|((name, shape, along_tp), param)| {
                (*name, DTensor::from_local_with_shape(param, &tp, &[*along_tp], shape).unwrap())
            });
            let x = DTensor::from_copy(&mine, &tp, &[Replicate]).map_err(candle_core::Error::wrap)?;
            let y = sharded_block(&x, &weights.collect()).map_err(candle_core::Error::wrap)?;
            y.to_local().sqr()?.mean_all()
        };
        let loss = fsdp.forward(&[&mine], forward).unwrap();
        fsdp.backward(&loss).unwrap();
        optimizer.step(&fsdp).unwrap();

        let stepped = fsdp.state_dict(StateDictType::Full).unwrap();
        for (nth, (name, shape, along_tp)) in WEIGHTS.iter().enumerate() {
            let local = stepped.tensor::<sconce_dtensor::FlatTensor>(name).unwrap().flat();
            let local = local.reshape(parts[nth].to_local().dims()).unwrap();
            let whole = DTensor::from_local_with_shape(&local, &tp, &[*along_tp], shape).unwrap();
            let expected = (weight(nth) - (&grads[name] * RATE).unwrap()).unwrap();
            close(&whole.full_tensor().unwrap(), &expected, name);
        }
    });
}
