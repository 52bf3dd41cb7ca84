//! A checkpoint of HSDP 2×2, model and optimizer as flat shards, under every other layout and in one process.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use candle_core::{Device, Tensor};
use common::{CPU, Kind, Sharded, adam, contents, fsdp_mesh, hsdp_mesh, input, load, save};
use sconce_dtensor::{FlatTensor, StateDict, TensorBuf, Value};
use sconce_fsdp::ShardingStrategy::{FullShard, HybridShard};
use sconce_fsdp::{Adam, Optimizer, ShardingStrategy, StateDictType};
use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
use sconce_testkit::run_ranks;

const DEADLINE: Duration = Duration::from_secs(60);

fn state(sharded: &Sharded, optim: &Adam, kind: StateDictType) -> StateDict<'static> {
    let model = sharded.fsdp.state_dict(kind).unwrap();
    let optim = optim.state_dict(&sharded.fsdp, kind).unwrap();
    StateDict::from_iter([
        ("model", Value::Map(model)),
        ("optim", Value::Map(optim)),
        ("step", Value::Int(1)),
    ])
}

/// Every tensor, whole, by name.
fn whole(sharded: &Sharded, optim: &Adam) -> HashMap<String, Vec<u8>> {
    contents(&state(sharded, optim, StateDictType::Full)).into_iter().collect()
}

/// Trains one step under HSDP 2×2 and saves; what was saved, whole.
fn saved_by_hsdp(kind: Kind, path: &Path) -> HashMap<String, Vec<u8>> {
    let all = run_ranks(4, DEADLINE, |world| {
        let sharded = Sharded::new(kind, &hsdp_mesh(&world, &CPU), HybridShard, 4);
        let mut optim = adam(&sharded);
        sharded.step(&mut optim, &input(&world)).unwrap();
        save(&world, path, &state(&sharded, &optim, StateDictType::FlatShard)).unwrap();
        whole(&sharded, &optim)
    });
    assert!(all.iter().all(|of_rank| of_rank == &all[0]));
    all.into_iter().next().unwrap()
}

#[test]
fn hsdp_two_by_two_loads_bit_for_bit_under_every_layout() {
    for kind in [Kind::Even, Kind::Uneven] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint");
        let expected = saved_by_hsdp(kind, &path);
        type MakeMesh = fn(&ProcessGroup) -> DeviceMesh;
        let one_d: MakeMesh = |world| fsdp_mesh(world, &CPU);
        let two_d: MakeMesh = |world| DeviceMesh::new(world, DeviceType::Cpu, &[2, 1], &[]).unwrap();
        let cases: [(usize, ShardingStrategy, MakeMesh); 5] = [
            (1, FullShard, one_d),
            (2, FullShard, one_d),
            (3, FullShard, one_d),
            (4, FullShard, one_d),
            (2, HybridShard, two_d),
        ];
        for (n, strategy, mesh) in cases {
            for as_type in [StateDictType::FlatShard, StateDictType::Sharded, StateDictType::Full] {
                let loaded = run_ranks(n, DEADLINE, |world| {
                    let sharded = Sharded::new(kind, &mesh(&world), strategy, 99);
                    let mut optim = adam(&sharded);
                    let mut state = state(&sharded, &optim, as_type);
                    load(&world, &path, &mut state).unwrap();
                    sharded.fsdp.load_state_dict(state.map("model").unwrap()).unwrap();
                    optim.load_state_dict(&sharded.fsdp, state.map("optim").unwrap()).unwrap();
                    whole(&sharded, &optim)
                });
                for of_rank in loaded {
                    assert_eq!(of_rank, expected, "{kind:?} as {strategy:?} on {n} ranks, {as_type:?}");
                }
            }
        }
    }
}

/// No process group, no mesh, no fsdp: plain candle tensors, and no tensor library at all.
#[test]
fn hsdp_two_by_two_loads_bit_for_bit_in_one_process_without_a_group() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let expected = saved_by_hsdp(Kind::Uneven, &path);

    let raw = sconce_checkpoint::load_new(&path).unwrap();
    assert_eq!(contents(&raw).into_iter().collect::<HashMap<_, _>>(), expected);

    let model = raw.map("model").unwrap();
    let weight = Tensor::zeros((30, 15), candle_core::DType::F32, &Device::Cpu).unwrap();
    let state = StateDict::from_iter([("net3.weight", Value::try_from(&weight).unwrap())]);
    let mut state = StateDict::from_iter([("model", Value::Map(state))]);
    let options = sconce_checkpoint::LoadOptions { strict: false, ..Default::default() };
    sconce_checkpoint::load_with(&path, &mut state, options).unwrap();
    // The candle tensor itself sees the loaded values.
    let loaded = FlatTensor::whole(&weight).unwrap();
    assert_eq!(common::bytes(&loaded), model.tensor::<TensorBuf>("net3.weight").unwrap().bytes());
}
