//! State dicts of every type, layout and world size, loaded into every other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use candle_nn::{Module, linear};
use common::{STRATEGIES, full, mesh, ranks, tensor, values};
use sconce_dtensor::{DTensor, LocalTensor, Placement, StateDict, Value};
use sconce_fsdp::{
    Adam, AdamConfig, Error, Fsdp, FsdpBuilder, FsdpConfig, Names, Optimizer, ParamGroup, Sgd, SgdConfig,
    ShardingStrategy, StateDictType,
};
use sconce_mesh::ProcessGroup;
use sconce_testkit::SimpleModelUneven;

const TYPES: [StateDictType; 3] = [StateDictType::Full, StateDictType::Sharded, StateDictType::FlatShard];

/// Three units. The plain model cannot run then: nothing gathers the units of its layers.
fn model(world: &ProcessGroup, strategy: ShardingStrategy, seed: u64) -> Fsdp {
    with_units(world, strategy, seed, &["net2", "net3"]).1
}

fn with_units(
    world: &ProcessGroup,
    strategy: ShardingStrategy,
    seed: u64,
    units: &[&str],
) -> (SimpleModelUneven, Fsdp) {
    let units = units.iter().copied().collect();
    let builder = FsdpBuilder::new(
        &mesh(world, strategy),
        FsdpConfig { strategy, units, seed, ..FsdpConfig::default() },
    )
    .unwrap();
    let model = SimpleModelUneven::new(builder.var_builder()).unwrap();
    (model, builder.build().unwrap())
}

#[test]
fn initial_values_do_not_depend_on_the_layout() {
    let reference = ranks(1, |world| full(&model(&world, ShardingStrategy::FullShard, 5))).remove(0);
    for strategy in STRATEGIES {
        for n in 1..=4 {
            for state in ranks(n, |world| full(&model(&world, strategy, 5))) {
                assert_eq!(state, reference, "{strategy:?} on {n} ranks");
            }
        }
    }
}

#[test]
fn every_type_from_every_strategy_loads_into_every_strategy() {
    for n in 1..=4 {
        ranks(n, |world| {
            for from in STRATEGIES {
                let source = model(&world, from, 5);
                let expected = full(&source);
                for kind in TYPES {
                    let state = source.state_dict(kind).unwrap().deep_copy().unwrap();
                    for to in STRATEGIES {
                        let target = model(&world, to, 6);
                        assert_ne!(full(&target), expected);
                        target.load_state_dict(&state).unwrap();
                        assert_eq!(full(&target), expected, "{from:?} as {kind:?} into {to:?} on {n} ranks");
                    }
                }
            }
        });
    }
}

#[test]
fn sharded_values_are_dtensors_with_torchs_placements() {
    ranks(4, |world| {
        for (strategy, placements) in [
            (ShardingStrategy::FullShard, vec![Placement::Shard(0)]),
            (ShardingStrategy::HybridShard, vec![Placement::Replicate, Placement::Shard(0)]),
        ] {
            let fsdp = model(&world, strategy, 5);
            let state = fsdp.state_dict(StateDictType::Sharded).unwrap();
            let whole = full(&fsdp);
            for fqn in state.keys() {
                let dtensor = state.tensor::<DTensor>(fqn).unwrap();
                assert_eq!(dtensor.placements(), placements);
                assert_eq!(dtensor.device_mesh(), fsdp.device_mesh());
                let gathered = dtensor.full_tensor().unwrap().flatten_all().unwrap();
                assert_eq!(gathered.to_vec1::<f32>().unwrap(), whole[fqn], "{fqn}");
            }
            // 5 rows over 4 ranks are 2, 2, 1, 0; over 2 shards 3, 2.
            let rows = state.tensor::<DTensor>("net4.weight").unwrap().local_boxes()[0].sizes[0];
            let expected = if placements.len() == 1 { [2, 2, 1, 0] } else { [3, 2, 3, 2] };
            assert_eq!(rows, expected[world.rank().0]);
        }
    });
}

#[test]
fn a_flat_shard_state_dict_is_the_shards_themselves() {
    ranks(3, |world| {
        let fsdp = model(&world, ShardingStrategy::FullShard, 5);
        let mut state = fsdp.state_dict(StateDictType::FlatShard).unwrap();
        for (_, tensor) in state.flat_tensors_mut().unwrap() {
            for index in 0..tensor.local_boxes().len() {
                tensor.write_box(index, &mut |bytes| bytes.fill(0)).unwrap();
            }
        }
        assert!(full(&fsdp).values().flatten().all(|value| *value == 0.0));
    });
}

#[test]
fn training_goes_on_the_same_after_model_and_optimizer_moved_to_another_strategy() {
    ranks(4, |world| {
        let step = |net: &SimpleModelUneven, fsdp: &Fsdp, optim: &mut Adam, nth: usize| {
            let x = tensor(&[4, 5], nth * 4 + world.rank().0);
            let loss = fsdp.forward(&[&x], || net.forward(&x)?.sqr()?.mean_all()).unwrap();
            fsdp.backward(&loss).unwrap();
            optim.step(fsdp).unwrap();
        };
        let config = AdamConfig { lr: 0.01, ..AdamConfig::default() };
        let (net, fsdp) = with_units(&world, ShardingStrategy::FullShard, 5, &[]);
        let mut optim = Adam::new(&fsdp, config).unwrap();
        (0..2).for_each(|nth| step(&net, &fsdp, &mut optim, nth));
        for kind in TYPES {
            let (net2, fsdp2) = with_units(&world, ShardingStrategy::HybridShard, 6, &[]);
            let mut optim2 = Adam::new(&fsdp2, AdamConfig::default()).unwrap();
            fsdp2.load_state_dict(&fsdp.state_dict(kind).unwrap()).unwrap();
            optim2.load_state_dict(&fsdp2, &optim.state_dict(&fsdp, kind).unwrap()).unwrap();
            assert_eq!(optimizer_values(&optim2, &fsdp2), optimizer_values(&optim, &fsdp), "{kind:?}");
            step(&net2, &fsdp2, &mut optim2, 2);
            // One more step of the original, undone by loading what it was.
            let (back, back_optim) =
                (fsdp.state_dict(kind).unwrap().deep_copy().unwrap(), optim.state_dict(&fsdp, kind));
            let back_optim = back_optim.unwrap().deep_copy().unwrap();
            step(&net, &fsdp, &mut optim, 2);
            for (fqn, values) in full(&fsdp) {
                let off = common::relative_difference(&full(&fsdp2)[&fqn], &values);
                assert!(off < 1e-6, "{fqn} after the move by {kind:?}: {off}");
            }
            fsdp.load_state_dict(&back).unwrap();
            optim.load_state_dict(&fsdp, &back_optim).unwrap();
        }
    });
}

/// Both moments of every parameter, whole, by name.
fn optimizer_values(optim: &Adam, fsdp: &Fsdp) -> Vec<(String, Vec<f32>)> {
    let state = optim.state_dict(fsdp, StateDictType::Full).unwrap();
    let state = state.map("state").unwrap();
    let all = state.keys().flat_map(|fqn| {
        values(state.map(fqn).unwrap()).into_iter().map(move |(name, v)| (format!("{fqn}.{name}"), v))
    });
    let mut all: Vec<_> = all.collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

#[test]
fn a_state_dict_of_another_model_is_refused_on_every_rank_and_changes_nothing() {
    let errors = ranks(2, |world| {
        let fsdp = model(&world, ShardingStrategy::FullShard, 5);
        let before = full(&fsdp);
        let mut state = fsdp.state_dict(StateDictType::Full).unwrap();
        state.remove("net1.bias");
        state.insert("net9.bias", Value::Int(1));
        let keys = fsdp.load_state_dict(&state).unwrap_err().to_string();

        let mut state = fsdp.state_dict(StateDictType::Full).unwrap();
        if world.rank().0 == 1 {
            state.insert("net1.bias", Value::try_from(&tensor(&[11], 0)).unwrap());
        }
        let shape = fsdp.load_state_dict(&state).unwrap_err();
        if world.rank().0 == 0 {
            assert!(
                matches!(&shape, Error::RefusedElsewhere { ranks } if ranks.len() == 1 && ranks[0].0 == 1)
            );
        } else {
            assert_eq!(shape.to_string(), "state dict: net1.bias: expected f32 [10], got f32 [11]");
        }
        assert_eq!(full(&fsdp), before);
        keys
    });
    assert_eq!(errors, ["state dict: missing [\"net1.bias\"], unexpected [\"net9.bias\"]"; 2]);
}

#[test]
fn two_layers_that_ask_for_one_name_share_one_parameter() {
    ranks(2, |world| {
        let config = FsdpConfig { seed: 1, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(&mesh(&world, ShardingStrategy::FullShard), config).unwrap();
        let tied = [(); 2].map(|()| linear(3, 3, builder.var_builder().pp("tied")).unwrap());
        let fsdp = builder.build().unwrap();
        assert_eq!(fsdp.numel(), 12);
        let x = tensor(&[2, 3], 1);
        let loss = fsdp.forward(&[&x], || tied[1].forward(&tied[0].forward(&x)?)?.sum_all()).unwrap();
        fsdp.backward(&loss).unwrap();
        let empty = StateDict::new();
        assert!(
            matches!(fsdp.load_state_dict(&empty), Err(Error::KeyMismatch { missing, .. }) if missing.len() == 2)
        );
    });
}

#[test]
fn a_snapshot_of_flat_shards_keeps_its_values_while_training_and_loading_go_on() {
    ranks(2, |world| {
        let (net, fsdp) = with_units(&world, ShardingStrategy::FullShard, 5, &[]);
        let mut optim = Adam::new(&fsdp, AdamConfig::default()).unwrap();
        let x = tensor(&[4, 5], world.rank().0);
        let mut step = || {
            let loss = fsdp.forward(&[&x], || net.forward(&x)?.sqr()?.mean_all()).unwrap();
            fsdp.backward(&loss).unwrap();
            optim.step(&fsdp).unwrap();
            optim.state_dict(&fsdp, StateDictType::FlatShard).unwrap()
        };
        let state = StateDict::from_iter([
            ("optim", Value::Map(step())),
            ("model", Value::Map(fsdp.state_dict(StateDictType::FlatShard).unwrap())),
        ]);
        let held = bytes(&state, |tensor| tensor.deep_copy());
        let (before, snapshot) = (bytes(&state, |tensor| tensor.snapshot()), snapshots(&state));
        assert_eq!(before, held);
        step();
        assert_ne!(bytes(&state, |tensor| tensor.deep_copy()), held, "the live state moved on");
        let other = model(&world, ShardingStrategy::FullShard, 6).state_dict(StateDictType::Full).unwrap();
        fsdp.load_state_dict(&other).unwrap();
        let kept: Vec<u8> = snapshot.iter().flat_map(|tensor| boxes(tensor.as_ref())).collect();
        assert_eq!(kept, held, "the snapshot did not");
    });
}

fn snapshots(state: &StateDict<'_>) -> Vec<Box<dyn LocalTensor>> {
    state.flat_tensors().unwrap().values().map(|tensor| tensor.snapshot().unwrap()).collect()
}

/// The bytes of copies of all tensors of a state, one after the other.
fn bytes(
    state: &StateDict<'_>,
    copy: impl Fn(&dyn LocalTensor) -> sconce_dtensor::Result<Box<dyn LocalTensor>>,
) -> Vec<u8> {
    state.flat_tensors().unwrap().values().flat_map(|tensor| boxes(copy(*tensor).unwrap().as_ref())).collect()
}

fn boxes(tensor: &dyn LocalTensor) -> Vec<u8> {
    let mut all = vec![];
    for index in 0..tensor.local_boxes().len() {
        tensor.read_box(index, &mut |bytes| all.extend_from_slice(bytes)).unwrap();
    }
    all
}

/// Learning rate and weight decay of the group of every parameter.
fn hyperparameters(state: &StateDict<'_>) -> std::collections::BTreeMap<String, (f64, f64)> {
    let Some(Value::List(groups)) = state.get("param_groups") else { panic!("no groups") };
    let mut found = std::collections::BTreeMap::new();
    for group in groups.iter().filter_map(Value::as_map) {
        let Some(Value::List(names)) = group.get("params") else { panic!("no names") };
        let number = |name: &str| group.get(name).and_then(Value::as_float).unwrap();
        let told = (number("lr"), number("weight_decay"));
        found.extend(names.iter().map(|name| (name.as_str().unwrap().to_owned(), told)));
    }
    found
}

#[test]
fn hyperparameters_follow_their_parameters_on_every_rank_wherever_they_were_saved() {
    let weights = || Names::matching(|fqn| fqn.ends_with("weight"));
    let biases = || Names::matching(|fqn| fqn.ends_with("bias"));
    let group = |params, lr, weight_decay| ParamGroup {
        params,
        config: AdamConfig { lr, weight_decay, ..AdamConfig::default() },
    };
    for strategy in STRATEGIES {
        ranks(2, |world| {
            let fsdp = model(&world, strategy, 5);
            let own = AdamConfig::default();
            let groups = vec![group(weights(), 0.1, 0.01), group(biases(), 0.2, 0.0)];
            let saver = Adam::with_groups(&fsdp, own, groups).unwrap();
            // On the second rank it is empty.
            let saved = saver.state_dict(&fsdp, StateDictType::FullOnFirstRank).unwrap();
            let expected = hyperparameters(&saver.state_dict(&fsdp, StateDictType::Full).unwrap());
            assert!(expected.values().any(|told| *told == (0.2, 0.0)) && expected.len() > 2);
            // The biases first; the weights are the optimizer's own.
            let mut loader = Adam::with_groups(&fsdp, own, vec![group(biases(), 7.0, 7.0)]).unwrap();
            loader.load_state_dict(&fsdp, &saved).unwrap();
            let got = hyperparameters(&loader.state_dict(&fsdp, StateDictType::Full).unwrap());
            assert_eq!(got, expected, "{strategy:?}");
            assert_eq!(loader.lrs(), [0.1, 0.2]);
            loader.set_group_lr(1, 0.4);
            assert_eq!(loader.lrs(), [0.1, 0.4]);
            // One group for what had two.
            let error = Adam::new(&fsdp, own).unwrap().load_state_dict(&fsdp, &saved).unwrap_err();
            match world.rank().0 {
                0 => assert!(matches!(error, Error::ValueMismatch { .. }), "{error}"),
                _ => assert!(matches!(error, Error::RefusedElsewhere { .. }), "{error}"),
            }
        });
    }
}

#[test]
fn momentum_that_was_saved_is_taken_with_its_buffers() {
    ranks(2, |world| {
        let fsdp = model(&world, ShardingStrategy::FullShard, 5);
        let momentum = SgdConfig { momentum: 0.9, ..SgdConfig::default() };
        let saved = Sgd::new(&fsdp, momentum).unwrap().state_dict(&fsdp, StateDictType::Full).unwrap();
        let mut plain = Sgd::new(&fsdp, SgdConfig::default()).unwrap();
        plain.load_state_dict(&fsdp, &saved).unwrap();
        let state = plain.state_dict(&fsdp, StateDictType::Full).unwrap();
        let entries = state.map("state").unwrap();
        assert!(entries.keys().all(|fqn| entries.map(fqn).unwrap().get("momentum_buffer").is_some()));
    });
}

#[test]
fn parameters_that_are_handed_back_as_they_were_stay() {
    for n in [1, 2] {
        ranks(n, |world| {
            let fsdp = model(&world, ShardingStrategy::FullShard, 5);
            let before = full(&fsdp);
            let same = fsdp.rewrite_full_params(|params| {
                Ok(params.iter().map(|(fqn, tensor)| (fqn.to_owned(), tensor.clone())).collect())
            });
            same.unwrap();
            assert_eq!(full(&fsdp), before);
        });
    }
}
