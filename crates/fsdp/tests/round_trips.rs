//! Model and optimizer saved under one world, strategy and state dict type, loaded under every other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use candle_nn::{Module, VarBuilder};
use common::{STRATEGIES, full, mesh, ranks, relative_difference, tensor};
use sconce_checkpoint::{LoadOptions, SaveOptions, load_with, save_with};
use sconce_dtensor::{FlatTensor, StateDict, Value};
use sconce_fsdp::{
    Adam, AdamConfig, Fsdp, FsdpBuilder, FsdpConfig, Optimizer, ShardingStrategy, StateDictType,
};
use sconce_mesh::ProcessGroup;
use sconce_testkit::{SimpleModel, SimpleModelUneven};

const TYPES: [StateDictType; 4] =
    [StateDictType::Full, StateDictType::FullOnFirstRank, StateDictType::Sharded, StateDictType::FlatShard];
const ADAM: AdamConfig = AdamConfig {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.0,
    decoupled_weight_decay: false,
};

#[derive(Debug, Clone, Copy)]
enum Kind {
    Even,
    Uneven,
}

struct Trainer {
    model: Box<dyn Module>,
    fsdp: Fsdp,
    optim: Adam,
}

impl Trainer {
    fn new(world: &ProcessGroup, kind: Kind, strategy: ShardingStrategy, seed: u64) -> Self {
        let config = FsdpConfig { strategy, seed, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(&mesh(world, strategy), config).unwrap();
        let vb: VarBuilder<'_> = builder.var_builder();
        let model: Box<dyn Module> = match kind {
            Kind::Even => Box::new(SimpleModel::new(vb).unwrap()),
            Kind::Uneven => Box::new(SimpleModelUneven::new(vb).unwrap()),
        };
        let fsdp = builder.build().unwrap();
        let optim = Adam::new(&fsdp, ADAM).unwrap();
        Self { model, fsdp, optim }
    }

    /// The same on every rank, so that the world's size changes no mean.
    fn step(&mut self, nth: usize) {
        let x: Tensor = tensor(&[4, 5], nth);
        let loss = self.fsdp.forward(&[&x], || self.model.forward(&x)?.sqr()?.mean_all()).unwrap();
        self.fsdp.backward(&loss).unwrap();
        self.optim.step(&self.fsdp).unwrap();
    }

    fn state(&self, kind: StateDictType) -> StateDict<'static> {
        let model = Value::Map(self.fsdp.state_dict(kind).unwrap());
        let optim = Value::Map(self.optim.state_dict(&self.fsdp, kind).unwrap());
        StateDict::from_iter([("model", model), ("optim", optim)])
    }

    fn load(&mut self, state: &StateDict<'_>) {
        self.fsdp.load_state_dict(state.map("model").unwrap()).unwrap();
        self.optim.load_state_dict(&self.fsdp, state.map("optim").unwrap()).unwrap();
    }

    /// Every value by name: parameters, both moments and steps.
    fn values(&self) -> HashMap<String, Vec<f32>> {
        let state = self.state(StateDictType::Full);
        let one = |value: &FlatTensor| value.flat().to_vec1::<f32>().unwrap();
        let names: Vec<String> = state.flat_tensors().unwrap().keys().map(|fqn| fqn.0.clone()).collect();
        let model = full(&self.fsdp).into_iter().map(|(fqn, values)| (format!("model.{fqn}"), values));
        let mut all: HashMap<String, Vec<f32>> = model.collect();
        let optim = state.map("optim").and_then(|optim| optim.map("state")).unwrap();
        for (fqn, entry) in optim.iter() {
            for key in entry.as_map().unwrap().keys() {
                let tensor = entry.as_map().unwrap().tensor::<FlatTensor>(key).unwrap();
                all.insert(format!("optim.state.{fqn}.{key}"), one(tensor));
            }
        }
        assert_eq!(all.len(), names.len());
        all
    }
}

/// Saves under world `n` after two steps; what the values were, and what they are after two more.
fn save(
    dir: &Path,
    kind: Kind,
    n: usize,
    strategy: ShardingStrategy,
    of: StateDictType,
) -> [HashMap<String, Vec<f32>>; 2] {
    let saved = ranks(n, |world| {
        let mut trainer = Trainer::new(&world, kind, strategy, 5);
        (0..2).for_each(|nth| trainer.step(nth));
        let options = SaveOptions { group: Some(&world), ..SaveOptions::default() };
        save_with(dir, &trainer.state(of), options).unwrap();
        let at_save = trainer.values();
        (2..4).for_each(|nth| trainer.step(nth));
        [at_save, trainer.values()]
    });
    saved.into_iter().next().unwrap()
}

fn load(
    dir: &Path,
    kind: Kind,
    n: usize,
    strategy: ShardingStrategy,
    expected: &[HashMap<String, Vec<f32>>; 2],
) {
    ranks(n, |world| {
        let mut trainer = Trainer::new(&world, kind, strategy, 6);
        let mut state = trainer.state(StateDictType::FlatShard);
        let options = LoadOptions { group: Some(&world), ..LoadOptions::default() };
        load_with(dir, &mut state, options).unwrap();
        trainer.load(&state);
        assert_eq!(trainer.values(), expected[0], "{kind:?} into {strategy:?} on {n} ranks");
        (2..4).for_each(|nth| trainer.step(nth));
        for (fqn, values) in trainer.values() {
            let off = relative_difference(&values, &expected[1][&fqn]);
            assert!(off < 2e-6, "{kind:?} continued under {strategy:?} on {n} ranks, {fqn}: {off}");
        }
    });
}

/// Every type and strategy is saved under some world, and each of those is loaded under every strategy and world.
#[test]
fn what_any_layout_saved_every_other_loads_bit_for_bit_and_continues() {
    let dir = std::env::temp_dir().join(format!("sconce-round-trips-{}", std::process::id()));
    for kind in [Kind::Even, Kind::Uneven] {
        for (nth, (of, from)) in
            TYPES.into_iter().flat_map(|of| STRATEGIES.map(|from| (of, from))).enumerate()
        {
            let saved_on = nth % 4 + 1;
            let path = dir.join(format!("{kind:?}-{of:?}-{from:?}"));
            let expected = save(&path, kind, saved_on, from, of);
            for n in 1..=4 {
                let to = STRATEGIES[(nth + n) % STRATEGIES.len()];
                load(&path, kind, n, to, &expected);
            }
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}

/// In memory, on one world: every type of every strategy into every strategy.
#[test]
fn every_type_of_every_strategy_loads_into_every_strategy_with_optimizer_state() {
    for n in 1..=4 {
        ranks(n, |world| {
            for from in STRATEGIES {
                let mut source = Trainer::new(&world, Kind::Uneven, from, 5);
                (0..2).for_each(|nth| source.step(nth));
                let expected = source.values();
                for of in TYPES {
                    let state = source.state(of);
                    for to in STRATEGIES {
                        let mut target = Trainer::new(&world, Kind::Uneven, to, 6);
                        target.load(&state);
                        assert_eq!(target.values(), expected, "{of:?} of {from:?} into {to:?} on {n} ranks");
                    }
                }
            }
        });
    }
}

#[test]
fn a_non_strict_load_takes_what_both_have_and_lists_the_rest() {
    let reports = ranks(2, |world| {
        let trainer = Trainer::new(&world, Kind::Even, ShardingStrategy::FullShard, 5);
        let other = Trainer::new(&world, Kind::Even, ShardingStrategy::FullShard, 6);
        let mut state = other.fsdp.state_dict(StateDictType::Sharded).unwrap();
        state.remove("net2.weight");
        state.insert("net9.weight", Value::Int(3));
        let before = full(&trainer.fsdp);
        let report = trainer.fsdp.load_state_dict_non_strict(&state).unwrap();
        for (fqn, values) in full(&trainer.fsdp) {
            let expected = if fqn == "net2.weight" { &before[&fqn] } else { &full(&other.fsdp)[&fqn] };
            assert_eq!(values, *expected, "{fqn}");
        }
        (report.missing, report.unexpected)
    });
    for (missing, unexpected) in reports {
        assert_eq!((missing, unexpected), (vec!["net2.weight".to_owned()], vec!["net9.weight".to_owned()]));
    }
}

#[test]
fn a_model_is_built_from_a_checkpoint_shard_by_shard() {
    let dir = std::env::temp_dir().join(format!("sconce-build-with-{}", std::process::id()));
    let expected = ranks(2, |world| {
        let trainer = Trainer::new(&world, Kind::Uneven, ShardingStrategy::FullShard, 5);
        let state = trainer.fsdp.state_dict(StateDictType::FlatShard).unwrap();
        save_with(&dir, &state, SaveOptions { group: Some(&world), ..SaveOptions::default() }).unwrap();
        full(&trainer.fsdp)
    });
    ranks(3, |world| {
        let builder =
            FsdpBuilder::new(&mesh(&world, ShardingStrategy::FullShard), FsdpConfig::default()).unwrap();
        SimpleModelUneven::new(builder.var_builder()).unwrap();
        let read = |state: &mut StateDict<'static>| -> Result<(), Box<dyn std::error::Error>> {
            load_with(&dir, state, LoadOptions { group: Some(&world), ..LoadOptions::default() })?;
            Ok(())
        };
        assert_eq!(full(&builder.build_with(read).unwrap()), expected[0]);
    });
    std::fs::remove_dir_all(dir).unwrap();
}
