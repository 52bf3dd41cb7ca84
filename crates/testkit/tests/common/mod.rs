//! What the tests of the whole stack share: a fixture model under FSDP, state dicts to compare, one training step.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::path::Path;

use candle_core::{Device, Tensor};
use candle_nn::Module;
use sconce_checkpoint::{LoadOptions, SaveOptions, load_with, save_with};
use sconce_dtensor::{DTensor, LocalTensor, StateDict, Value};
use sconce_fsdp::{
    Adam, AdamConfig, Fsdp, FsdpBuilder, FsdpConfig, Optimizer, ShardingStrategy, StateDictType,
};
use sconce_mesh::{DeviceMesh, ProcessGroup};
use sconce_testkit::{Place, SimpleModel, SimpleModelUneven};

/// Which of the document's models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Even,
    Uneven,
}

pub(crate) const CPU: Place = Place::CPU;

/// A fixture model under FSDP.
pub(crate) struct Sharded {
    pub(crate) model: Box<dyn Module>,
    pub(crate) fsdp: Fsdp,
    place: Place,
}

impl Sharded {
    pub(crate) fn new(kind: Kind, mesh: &DeviceMesh, strategy: ShardingStrategy, seed: u64) -> Self {
        Self::at(&CPU, kind, mesh, strategy, seed)
    }

    pub(crate) fn at(
        place: &Place,
        kind: Kind,
        mesh: &DeviceMesh,
        strategy: ShardingStrategy,
        seed: u64,
    ) -> Self {
        let config = FsdpConfig { device: place.device.clone(), strategy, seed, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(mesh, config).unwrap();
        let model: Box<dyn Module> = match kind {
            Kind::Even => Box::new(SimpleModel::new(builder.var_builder()).unwrap()),
            Kind::Uneven => Box::new(SimpleModelUneven::new(builder.var_builder()).unwrap()),
        };
        Self { model, fsdp: builder.build().unwrap(), place: place.clone() }
    }

    pub(crate) fn sharded_state(&self) -> StateDict<'static> {
        self.fsdp.state_dict(StateDictType::Sharded).unwrap()
    }

    /// One step on this rank's own input.
    pub(crate) fn step(&self, optim: &mut dyn Optimizer, input: &Tensor) -> sconce_fsdp::Result<f32> {
        let input = &self.place.put(input).unwrap();
        let loss = self.fsdp.forward(&[input], || self.model.forward(input)?.sum_all())?;
        self.fsdp.backward(&loss)?;
        optim.step(&self.fsdp)?;
        Ok(loss.to_scalar().unwrap())
    }
}

/// HSDP over all ranks: replicate 2 if there are as many, shard the rest.
pub(crate) fn hsdp_mesh(world: &ProcessGroup, place: &Place) -> DeviceMesh {
    let replicas = world.size().min(2);
    let shape = [replicas, world.size() / replicas];
    DeviceMesh::new(world, place.device_type, &shape, &["replicate", "shard"]).unwrap()
}

/// FSDP over all ranks.
pub(crate) fn fsdp_mesh(world: &ProcessGroup, place: &Place) -> DeviceMesh {
    DeviceMesh::new(world, place.device_type, &[world.size()], &["shard"]).unwrap()
}

pub(crate) fn adam(sharded: &Sharded) -> Adam {
    Adam::new(&sharded.fsdp, AdamConfig { lr: 0.1, ..AdamConfig::default() }).unwrap()
}

/// `[4, 5]` values in [0, 1) that depend on the rank: the document's `get_input`.
pub(crate) fn input(world: &ProcessGroup) -> Tensor {
    let value = |i: usize| ((i * 7 + world.rank().0 * 13 + 3) % 29) as f32 / 29.0;
    Tensor::from_iter((0..20).map(value), &Device::Cpu).unwrap().reshape((4, 5)).unwrap()
}

/// `{"model": model}`.
pub(crate) fn model_state(model: StateDict<'static>) -> StateDict<'static> {
    StateDict::from_iter([("model", Value::Map(model))])
}

pub(crate) fn save(world: &ProcessGroup, dir: &Path, state: &StateDict<'_>) -> sconce_checkpoint::Result<()> {
    save_with(dir, state, SaveOptions { group: Some(world), ..SaveOptions::default() }).map(drop)
}

pub(crate) fn load(
    world: &ProcessGroup,
    dir: &Path,
    state: &mut StateDict<'_>,
) -> sconce_checkpoint::Result<()> {
    load_with(dir, state, LoadOptions { group: Some(world), ..LoadOptions::default() }).map(drop)
}

pub(crate) fn dtensor<'s>(state: &'s StateDict<'_>, fqn: &str) -> &'s DTensor {
    state.tensor(fqn).unwrap_or_else(|| panic!("{fqn} is no DTensor: {state:?}"))
}

/// The bytes of every box of a tensor.
pub(crate) fn bytes(tensor: &dyn LocalTensor) -> Vec<u8> {
    let mut all = vec![];
    for index in 0..tensor.local_boxes().len() {
        tensor.read_box(index, &mut |bytes| all.extend_from_slice(bytes)).unwrap();
    }
    all
}

/// Name and bytes of every tensor of a state dict.
pub(crate) fn contents(state: &StateDict<'_>) -> Vec<(String, Vec<u8>)> {
    let flat = state.flat_tensors().unwrap();
    flat.into_iter().map(|(fqn, tensor)| (fqn.0, bytes(tensor))).collect()
}

/// Overwrites every tensor with zeros, so that a load has something to bring back.
pub(crate) fn zero(state: &mut StateDict<'_>) {
    for (_, tensor) in state.flat_tensors_mut().unwrap() {
        for index in 0..tensor.local_boxes().len() {
            tensor.write_box(index, &mut |bytes| bytes.fill(0)).unwrap();
        }
    }
}
