//! Training under FSDP follows torch's own curves, and plain candle's where torch wrote none.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Module, Optimizer as _, ParamsAdamW, SGD, loss::mse};
use common::{STRATEGIES, full, mesh, plain_copy, ranks, relative_difference, tensor, whole_state};
use sconce_fsdp::{
    Adam, AdamConfig, Fsdp, FsdpBuilder, FsdpConfig, Optimizer, Sgd, SgdConfig, ShardingStrategy,
};
use sconce_mesh::{ProcessGroup, ReduceOp};
use sconce_testkit::{SimpleModel, SimpleModelUneven, fixture};

const STEPS: usize = 10;
/// torch's own modes differ from its single process by 1e-7.
const TOLERANCE: f32 = 1e-6;
const ADAM_LR: f64 = 0.05;
const SGD_LR: f64 = 0.2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Adam,
    Sgd,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Adam => "adam",
            Kind::Sgd => "sgd",
        }
    }

    fn of(self, fsdp: &Fsdp) -> Box<dyn Optimizer> {
        match self {
            Kind::Adam => {
                Box::new(Adam::new(fsdp, AdamConfig { lr: ADAM_LR, ..AdamConfig::default() }).unwrap())
            }
            Kind::Sgd => Box::new(Sgd::new(fsdp, SgdConfig { lr: SGD_LR, ..SgdConfig::default() }).unwrap()),
        }
    }
}

fn golden(name: &str) -> HashMap<String, Tensor> {
    let file = fixture(&format!("fsdp_parity/SimpleModel.{name}.safetensors"));
    candle_core::safetensors::load(file, &Device::Cpu).unwrap()
}

/// The mean loss of each step that torch saw.
fn golden_losses(mode: &str, kind: Kind) -> Vec<f32> {
    let text = std::fs::read_to_string(fixture("fsdp_parity/parity.json")).unwrap();
    let parity: serde_json::Value = serde_json::from_str(&text).unwrap();
    let losses = &parity["runs"][format!("SimpleModel.{mode}.{}", kind.name())]["loss"];
    losses.as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap() as f32).collect()
}

/// Trains on this rank's even share of the data; the mean loss of each step.
fn train(
    world: &ProcessGroup,
    (model, fsdp): (&dyn Module, &Fsdp),
    kind: Kind,
    (x, y): (&Tensor, &Tensor),
) -> Vec<f32> {
    let rows = x.dim(0).unwrap() / world.size();
    let mine = |t: &Tensor| t.narrow(0, world.rank().0 * rows, rows).unwrap();
    let (x, y) = (mine(x), mine(y));
    let mut optim = kind.of(fsdp);
    let step = |_| {
        let loss = fsdp.forward(&[&x], || mse(&model.forward(&x)?, &y)).unwrap();
        fsdp.backward(&loss).unwrap();
        optim.step(fsdp).unwrap();
        let mut mean = [loss.to_scalar::<f32>().unwrap()];
        world.all_reduce(&mut mean, ReduceOp::Avg).unwrap();
        mean[0]
    };
    (0..STEPS).map(step).collect()
}

fn build<M>(
    world: &ProcessGroup,
    strategy: ShardingStrategy,
    make: impl FnOnce(candle_nn::VarBuilder<'_>) -> candle_core::Result<M>,
) -> (M, Fsdp) {
    let builder =
        FsdpBuilder::new(&mesh(world, strategy), FsdpConfig { strategy, seed: 9, ..FsdpConfig::default() })
            .unwrap();
    let model = make(builder.var_builder()).unwrap();
    (model, builder.build().unwrap())
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], expected: &[f32]) {
    for (step, (got, expected)) in got.iter().zip(expected).enumerate() {
        let off = (got - expected).abs() / expected.abs();
        assert!(off < TOLERANCE, "{what}, step {step}: {got} for {expected}, off by {off}");
    }
}

fn follows_torch(mode: &str, n: usize, strategy: ShardingStrategy, kind: Kind) {
    let data = golden("data");
    ranks(n, |world| {
        let (model, fsdp) = build(&world, strategy, SimpleModel::new);
        fsdp.load_state_dict(&whole_state(&golden("init"))).unwrap();
        let losses = train(&world, (&model, &fsdp), kind, (&data["x"], &data["y"]));
        assert_close(&format!("{mode} {strategy:?} {kind:?}"), &losses, &golden_losses(mode, kind));
        let finals = golden(&format!("{mode}.{}", kind.name()));
        for (fqn, values) in full(&fsdp) {
            let expected = finals[&format!("param.{fqn}")].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let off = relative_difference(&values, &expected);
            assert!(off < TOLERANCE, "{mode} {strategy:?} {kind:?} {fqn}: {off}");
        }
    });
}

/// The even shares of one batch have its mean loss and gradient: torch's single process is every layout's reference.
#[test]
fn simple_model_follows_torchs_single_process_under_every_strategy_and_world() {
    for strategy in STRATEGIES {
        for n in [1, 2, 4] {
            follows_torch("single", n, strategy, Kind::Adam);
            follows_torch("single", n, strategy, Kind::Sgd);
        }
    }
}

#[test]
fn simple_model_follows_torchs_fsdp_on_four_ranks() {
    for strategy in [ShardingStrategy::FullShard, ShardingStrategy::ShardGradOp, ShardingStrategy::NoShard] {
        follows_torch("fsdp", 4, strategy, Kind::Adam);
        follows_torch("fsdp", 4, strategy, Kind::Sgd);
    }
}

#[test]
fn simple_model_follows_torchs_hsdp_on_two_by_two_ranks() {
    for strategy in [ShardingStrategy::HybridShard, ShardingStrategy::HybridShardZero2] {
        follows_torch("hsdp", 4, strategy, Kind::Adam);
        follows_torch("hsdp", 4, strategy, Kind::Sgd);
    }
}

#[test]
fn the_uneven_model_follows_torchs_single_process_under_every_strategy_and_world() {
    let load = |name: &str| {
        let file = fixture(&format!("uneven_parity/{name}.safetensors"));
        candle_core::safetensors::load(file, &Device::Cpu).unwrap()
    };
    let data = load("data");
    let init = data.iter().filter_map(|(name, t)| Some((name.strip_prefix("init.")?.to_owned(), t.clone())));
    let init: HashMap<String, Tensor> = init.collect();
    let text = std::fs::read_to_string(fixture("uneven_parity/losses.json")).unwrap();
    let losses: HashMap<String, Vec<f32>> = serde_json::from_str(&text).unwrap();
    for kind in [Kind::Adam, Kind::Sgd] {
        let finals = load(kind.name());
        for (strategy, n) in STRATEGIES.into_iter().flat_map(|s| [1, 2, 4].map(|n| (s, n))) {
            ranks(n, |world| {
                let (model, fsdp) = build(&world, strategy, SimpleModelUneven::new);
                fsdp.load_state_dict(&whole_state(&init)).unwrap();
                let what = format!("{strategy:?} {kind:?} on {n} ranks");
                let got = train(&world, (&model, &fsdp), kind, (&data["x"], &data["y"]));
                assert_close(&what, &got, &losses[kind.name()]);
                for (fqn, values) in full(&fsdp) {
                    let expected = finals[&fqn].flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let off = relative_difference(&values, &expected);
                    assert!(off < 1e-5, "{what} {fqn}: {off}");
                }
            });
        }
    }
}

/// Plain candle on the whole batch, from the same weights.
fn plain_losses(fsdp: &Fsdp, kind: Kind, x: &Tensor, y: &Tensor) -> (Vec<f32>, HashMap<String, Vec<f32>>) {
    let (vars, vb) = plain_copy(fsdp);
    let model = SimpleModelUneven::new(vb).unwrap();
    let mut step: Box<dyn FnMut(&Tensor)> = match kind {
        Kind::Adam => {
            let params = ParamsAdamW { lr: ADAM_LR, weight_decay: 0.0, ..ParamsAdamW::default() };
            let mut adam = AdamW::new(vars.all_vars(), params).unwrap();
            Box::new(move |loss| adam.backward_step(loss).unwrap())
        }
        Kind::Sgd => {
            let mut sgd = SGD::new(vars.all_vars(), SGD_LR).unwrap();
            Box::new(move |loss| sgd.backward_step(loss).unwrap())
        }
    };
    let mut losses = vec![];
    for _ in 0..STEPS {
        let loss = mse(&model.forward(x).unwrap(), y).unwrap();
        step(&loss);
        losses.push(loss.to_scalar().unwrap());
    }
    let vars = vars.data().lock().unwrap();
    let flat = |var: &candle_core::Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    (losses, vars.iter().map(|(fqn, var)| (fqn.clone(), flat(var))).collect())
}

#[test]
fn the_uneven_model_follows_plain_candle_for_every_strategy_and_world() {
    let (x, y) = (tensor(&[12, 5], 3), tensor(&[12, 5], 4).abs().unwrap());
    for kind in [Kind::Adam, Kind::Sgd] {
        for strategy in STRATEGIES {
            for n in 1..=4 {
                ranks(n, |world| {
                    let (model, fsdp) = build(&world, strategy, SimpleModelUneven::new);
                    let (losses, finals) = plain_losses(&fsdp, kind, &x, &y);
                    let what = format!("{strategy:?} {kind:?} on {n} ranks");
                    assert_close(&what, &train(&world, (&model, &fsdp), kind, (&x, &y)), &losses);
                    for (fqn, values) in full(&fsdp) {
                        // Adam divides by the root of tiny second moments: weights may differ more than losses do.
                        let off = relative_difference(&values, &finals[&fqn]);
                        assert!(off < 2e-5, "{what}, {fqn}: {off}");
                    }
                });
            }
        }
    }
}
