//! Forward and backward of sharded models against plain candle, and errors instead of wrong numbers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use candle_core::{Device, Tensor};
use candle_nn::{Linear, Module, Sequential, VarBuilder, linear, seq};
use common::{STRATEGIES, full, mesh, plain_copy, ranks, relative_difference, tensor};
use sconce_fsdp::{
    Error, Fsdp, FsdpBuilder, FsdpConfig, Optimizer, Sgd, SgdConfig, Sharded, ShardingStrategy,
};
use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};

const LR: f64 = 0.5;

fn config(strategy: ShardingStrategy, units: &[&str]) -> FsdpConfig {
    FsdpConfig { strategy, units: units.iter().copied().collect(), seed: 11, ..FsdpConfig::default() }
}

/// Two units and a root layer between them.
struct Nested<M> {
    first: M,
    middle: Linear,
    last: M,
}

impl<M: Module> Nested<M> {
    fn new(vb: VarBuilder<'_>, wrap: impl Fn(&str, Sequential) -> M) -> Self {
        let block = |name: &str, from, to| {
            let layer = linear(from, to, vb.pp(name).pp("net")).unwrap();
            wrap(name, seq().add(layer).add_fn(|x| x.gelu()))
        };
        let first = block("first", 5, 7);
        let middle = linear(7, 3, vb.pp("middle")).unwrap();
        Self { first, middle, last: block("last", 3, 4) }
    }
}

impl<M: Module> Module for Nested<M> {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.last.forward(&self.middle.forward(&self.first.forward(x)?)?)
    }
}

fn nested(world: &ProcessGroup, strategy: ShardingStrategy) -> (Nested<Sharded<Sequential>>, Fsdp) {
    let builder = FsdpBuilder::new(&mesh(world, strategy), config(strategy, &["first", "last"])).unwrap();
    let model = Nested::new(builder.var_builder(), |name, block| builder.wrap(name, block).unwrap());
    (model, builder.build().unwrap())
}

/// Gradients, read off as what one SGD step of rate 1/2 takes away.
#[test]
fn gradients_are_the_mean_of_plain_candles_for_every_strategy_and_world() {
    for strategy in STRATEGIES {
        for n in 1..=4 {
            ranks(n, |world| {
                let (model, fsdp) = nested(&world, strategy);
                let (vars, vb) = plain_copy(&fsdp);
                let plain = Nested::new(vb, |_, block| block);
                let before = full(&fsdp);

                let x = tensor(&[6, 5], world.rank().0);
                let loss = fsdp.forward(&[&x], || model.forward(&x)?.sqr()?.sum_all()).unwrap();
                fsdp.backward(&loss).unwrap();
                Sgd::new(&fsdp, SgdConfig { lr: LR, ..SgdConfig::default() }).unwrap().step(&fsdp).unwrap();

                let after = full(&fsdp);
                for (fqn, var) in vars.data().lock().unwrap().iter() {
                    let mut mean = vec![0.0; var.elem_count()];
                    for rank in 0..n {
                        let x = tensor(&[6, 5], rank);
                        let gradients = plain.forward(&x).unwrap().sqr().unwrap().sum_all().unwrap();
                        let gradients = gradients.backward().unwrap();
                        let gradient = gradients.get(var).unwrap().flatten_all().unwrap();
                        let gradient = gradient.to_vec1::<f32>().unwrap();
                        mean.iter_mut().zip(gradient).for_each(|(m, g)| *m += g / n as f32);
                    }
                    let pairs = before[fqn].iter().zip(&mean);
                    let expected: Vec<f32> = pairs.map(|(p, g)| p - LR as f32 * g).collect();
                    let off = relative_difference(&after[fqn], &expected);
                    assert!(off < 1e-6, "{strategy:?}, {n} ranks, {fqn}: {off}");
                }
            });
        }
    }
}

#[test]
fn gradients_of_several_backwards_add_up_until_the_step() {
    ranks(3, |world| {
        let (model, fsdp) = nested(&world, ShardingStrategy::FullShard);
        let mut optim = Sgd::new(&fsdp, SgdConfig { lr: LR, ..SgdConfig::default() }).unwrap();
        let x = tensor(&[2, 5], world.rank().0);
        let backward = || {
            let loss = fsdp.forward(&[&x], || model.forward(&x)?.sum_all()).unwrap();
            fsdp.backward(&loss).unwrap();
        };
        let start = full(&fsdp);
        backward();
        optim.step(&fsdp).unwrap();
        let once = full(&fsdp);
        fsdp.load_state_dict(&common::whole_state(&as_tensors(&fsdp, &start))).unwrap();
        backward();
        backward();
        optim.step(&fsdp).unwrap();
        for (fqn, twice) in full(&fsdp) {
            let expected: Vec<f32> =
                start[&fqn].iter().zip(&once[&fqn]).map(|(s, o)| s + 2.0 * (o - s)).collect();
            assert!(relative_difference(&twice, &expected) < 1e-5, "{fqn}");
        }
    });
}

fn as_tensors(
    fsdp: &Fsdp,
    values: &std::collections::HashMap<String, Vec<f32>>,
) -> std::collections::HashMap<String, Tensor> {
    let state = fsdp.state_dict(sconce_fsdp::StateDictType::Full).unwrap();
    let flat = state.flat_tensors().unwrap();
    let tensors = flat.iter().map(|(fqn, tensor)| {
        let values = values[fqn.as_str()].clone();
        (fqn.0.clone(), Tensor::from_vec(values, tensor.global_shape(), &Device::Cpu).unwrap())
    });
    tensors.collect()
}

#[test]
fn a_unit_that_runs_twice_and_one_that_the_loss_does_not_reach_are_fine() {
    ranks(2, |world| {
        let builder = FsdpBuilder::new(
            &mesh(&world, ShardingStrategy::FullShard),
            config(ShardingStrategy::FullShard, &["twice", "unused"]),
        );
        let builder = builder.unwrap();
        let vb = builder.var_builder();
        let twice = builder.wrap("twice", linear(4, 4, vb.pp("twice")).unwrap()).unwrap();
        let unused = builder.wrap("unused", linear(4, 2, vb.pp("unused")).unwrap()).unwrap();
        let fsdp = builder.build().unwrap();
        let (vars, vb) = plain_copy(&fsdp);
        let plain = linear(4, 4, vb.pp("twice")).unwrap();
        let before = full(&fsdp);

        let x = tensor(&[3, 4], 5);
        let forward = || {
            unused.forward(&x)?;
            twice.forward(&twice.forward(&x)?.tanh()?)?.sum_all()
        };
        let loss = fsdp.forward(&[&x], forward).unwrap();
        fsdp.backward(&loss).unwrap();
        Sgd::new(&fsdp, SgdConfig { lr: LR, ..SgdConfig::default() }).unwrap().step(&fsdp).unwrap();

        let after = full(&fsdp);
        let y = plain.forward(&plain.forward(&x).unwrap().tanh().unwrap()).unwrap().sum_all().unwrap();
        let gradients = y.backward().unwrap();
        for (fqn, var) in vars.data().lock().unwrap().iter() {
            let expected: Vec<f32> = match gradients.get(var) {
                None => before[fqn].clone(),
                Some(g) => {
                    let g = g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    before[fqn].iter().zip(g).map(|(p, g)| p - LR as f32 * g).collect()
                }
            };
            let off = relative_difference(&after[fqn], &expected);
            assert!(off < 1e-6, "{fqn}: {off}: {:?} for {expected:?}", after[fqn]);
        }
    });
}

#[test]
fn a_parameter_touched_while_freed_is_an_error_not_a_number() {
    // One rank frees nothing between forward and backward.
    ranks(2, |world| {
        let mesh = mesh(&world, ShardingStrategy::FullShard);
        let builder = FsdpBuilder::new(&mesh, config(ShardingStrategy::FullShard, &["net"])).unwrap();
        let net = linear(2, 2, builder.var_builder().pp("net")).unwrap();
        let wrapped = builder.wrap("net", net.clone()).unwrap();
        let fsdp = builder.build().unwrap();
        let x = Tensor::ones((1, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(net.forward(&x).is_err(), "before the unit runs");
        fsdp.forward(&[&x], || wrapped.forward(&x)).unwrap();
        assert!(net.forward(&x).is_err(), "after the unit ran");
    });
}

#[test]
fn parameters_used_after_their_fsdp_is_gone_are_an_error() {
    let fsdp_mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &[]).unwrap();
    let builder = FsdpBuilder::new(&fsdp_mesh, config(ShardingStrategy::FullShard, &["net"])).unwrap();
    let net = linear(2, 2, builder.var_builder().pp("net")).unwrap();
    let wrapped = builder.wrap("net", net).unwrap();
    drop(builder.build().unwrap());
    let x = Tensor::ones((1, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
    let error = wrapped.forward(&x).unwrap_err().to_string();
    assert!(error.contains("unit \"net\": its Fsdp was dropped"), "{error}");
}

#[test]
fn ranks_that_build_different_models_all_hear_which_parameter_differs() {
    let errors = ranks(3, |world| {
        let width = if world.rank().0 == 2 { 6 } else { 5 };
        let mesh = mesh(&world, ShardingStrategy::FullShard);
        let builder = FsdpBuilder::new(&mesh, config(ShardingStrategy::FullShard, &[])).unwrap();
        linear(3, width, builder.var_builder().pp("net")).unwrap();
        builder.build().unwrap_err().to_string()
    });
    let expected = "rank 2 built another model than rank 0: expected Some(\"net.weight [5, 3]\"), \
                    got Some(\"net.weight [6, 3]\")";
    assert_eq!(errors, [expected; 3]);
}

#[test]
fn a_prefix_that_matches_nothing_and_a_wrong_mesh_are_refused_by_name() {
    let one = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &[]).unwrap();
    let refused = FsdpBuilder::new(&one, config(ShardingStrategy::HybridShard, &[])).unwrap_err();
    assert!(matches!(refused, Error::MeshShape { strategy: "HybridShard", .. }), "{refused}");

    let builder = FsdpBuilder::new(&one, config(ShardingStrategy::FullShard, &["net", "nett"])).unwrap();
    let net = linear(2, 2, builder.var_builder().pp("net")).unwrap();
    assert!(matches!(builder.wrap("other", net), Err(Error::UnknownUnit { unit, .. }) if unit == "other"));
    assert!(matches!(builder.build(), Err(Error::UnknownUnit { unit, .. }) if unit == "nett"));

    let builder = FsdpBuilder::new(&one, config(ShardingStrategy::FullShard, &[])).unwrap();
    assert!(matches!(builder.build(), Err(Error::NoParameters)));
}
