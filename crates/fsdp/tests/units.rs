//! How a model is cut into units, and what is not trained or not sharded.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use candle_core::{Device, Tensor};
use candle_nn::{Linear, Module, VarBuilder, batch_norm, embedding, linear};
use common::{full, mesh, plain_copy, ranks, relative_difference, tensor};
use sconce_fsdp::{
    Error, Fsdp, FsdpBuilder, FsdpConfig, Names, Optimizer, Sgd, SgdConfig, Sharded, ShardingStrategy,
    StateDictType, WrapPolicy,
};
use sconce_mesh::ProcessGroup;

const LR: f64 = 0.5;

/// `blocks.N` of two layers each, then a head; `M` is a layer or block as the caller wraps it.
struct Blocks {
    blocks: Vec<Sharded<Block>>,
    head: Linear,
}

struct Block {
    up: Sharded<Linear>,
    down: Sharded<Linear>,
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.down.forward(&self.up.forward(x)?.gelu()?)
    }
}

impl Blocks {
    fn new(builder: &FsdpBuilder) -> Self {
        let vb = builder.var_builder();
        let layer = |name: String, from, to| {
            let layer = linear(from, to, vb.pp(&name)).unwrap();
            builder.wrap(&name, layer).unwrap()
        };
        let block = |nth: usize| {
            let name = format!("blocks.{nth}");
            let up = layer(format!("{name}.up"), 4, 7);
            let down = layer(format!("{name}.down"), 7, 4);
            builder.wrap(&name, Block { up, down }).unwrap()
        };
        Self { blocks: (0..3).map(block).collect(), head: linear(4, 2, vb.pp("head")).unwrap() }
    }
}

impl Module for Blocks {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.blocks.iter().try_fold(x.clone(), |x, block| block.forward(&x))?;
        self.head.forward(&x)
    }
}

fn build(world: &ProcessGroup, config: FsdpConfig) -> (Blocks, Fsdp) {
    let builder = FsdpBuilder::new(&mesh(world, config.strategy), config).unwrap();
    let model = Blocks::new(&builder);
    (model, builder.build().unwrap())
}

/// One step of plain SGD away from the values of `fsdp`.
fn stepped(
    world: &ProcessGroup,
    model: &dyn Module,
    fsdp: &Fsdp,
) -> std::collections::HashMap<String, Vec<f32>> {
    let x = tensor(&[6, 4], world.rank().0);
    let loss = fsdp.forward(&[&x], || model.forward(&x)?.sqr()?.sum_all()).unwrap();
    fsdp.backward(&loss).unwrap();
    Sgd::new(fsdp, SgdConfig { lr: LR, ..SgdConfig::default() }).unwrap().step(fsdp).unwrap();
    full(fsdp)
}

#[test]
fn every_wrap_policy_trains_to_the_same_weights() {
    let policies = [
        (WrapPolicy::RepeatedBlocks(vec!["blocks".to_owned()]), vec!["", "blocks.0", "blocks.1", "blocks.2"]),
        (
            WrapPolicy::MinNumel(30),
            vec![
                "",
                "blocks.0.up",
                "blocks.0.down",
                "blocks.1.up",
                "blocks.1.down",
                "blocks.2.up",
                "blocks.2.down",
            ],
        ),
        (
            WrapPolicy::predicate(|name, params| {
                name.ends_with("up") || (name == "blocks.1" && params.len() == 4)
            }),
            vec!["", "blocks.0.up", "blocks.1.up", "blocks.1", "blocks.2.up"],
        ),
        (WrapPolicy::MinNumel(1 << 20), vec![""]),
    ];
    for n in [1, 3] {
        ranks(n, |world| {
            let mut reference = None;
            for (units, expected) in &policies {
                let (model, fsdp) =
                    build(&world, FsdpConfig { units: units.clone(), ..FsdpConfig::default() });
                assert_eq!(fsdp.unit_names().collect::<Vec<_>>(), *expected);
                let values = stepped(&world, &model, &fsdp);
                assert_eq!(*reference.get_or_insert_with(|| values.clone()), values, "{units:?}");
            }
        });
    }
}

#[test]
fn frozen_parameters_keep_their_values_and_the_others_train_as_without_sharding() {
    for strategy in common::STRATEGIES {
        for n in 1..=4 {
            ranks(n, |world| {
                let frozen = Names::below(["blocks.0", "blocks.1.up.weight", "head.bias"]);
                let units = WrapPolicy::RepeatedBlocks(vec!["blocks".to_owned()]);
                let (model, fsdp) =
                    build(&world, FsdpConfig { strategy, units, frozen, ..FsdpConfig::default() });
                let (all, all_fsdp) = build(
                    &world,
                    FsdpConfig { strategy, units: WrapPolicy::MinNumel(1 << 20), ..FsdpConfig::default() },
                );
                all_fsdp.load_state_dict(&fsdp.state_dict(StateDictType::FlatShard).unwrap()).unwrap();
                let before = full(&fsdp);
                let (after, expected) = (stepped(&world, &model, &fsdp), stepped(&world, &all, &all_fsdp));
                for (fqn, values) in &after {
                    let is_frozen =
                        fqn.starts_with("blocks.0") || fqn == "blocks.1.up.weight" || fqn == "head.bias";
                    let expected = if is_frozen { &before[fqn] } else { &expected[fqn] };
                    assert!(relative_difference(values, expected) < 1e-6, "{strategy:?}, {n} ranks, {fqn}");
                    assert_eq!(is_frozen, *values == before[fqn], "{fqn}");
                }
                let optim = Sgd::new(&fsdp, SgdConfig { momentum: 0.9, ..SgdConfig::default() }).unwrap();
                let state = optim.state_dict(&fsdp, StateDictType::FlatShard).unwrap();
                assert_eq!(state.map("state").unwrap().len(), 14 - 6);
            });
        }
    }
}

#[test]
fn a_tied_parameter_of_the_root_gets_the_gradients_of_both_uses() {
    ranks(2, |world| {
        let units = ["block"].into_iter().collect();
        let config = FsdpConfig { units, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(&mesh(&world, config.strategy), config).unwrap();
        let model = |vb: VarBuilder<'_>| {
            (embedding(5, 3, vb.pp("token")).unwrap(), linear(3, 3, vb.pp("block")).unwrap())
        };
        let (token, block) = model(builder.var_builder());
        let block = builder.wrap("block", block).unwrap();
        let fsdp = builder.build().unwrap();
        let (vars, vb) = plain_copy(&fsdp);
        let (plain_token, plain_block) = model(vb);
        let ids = Tensor::new(&[0u32, 3, 1, 3], &Device::Cpu).unwrap();
        let loss = |token: &candle_nn::Embedding, block: &dyn Module| {
            block.forward(&token.forward(&ids)?)?.matmul(&token.embeddings().t()?)?.sqr()?.sum_all()
        };
        let before = full(&fsdp);
        let sharded = fsdp.forward(&[], || loss(&token, &block)).unwrap();
        fsdp.backward(&sharded).unwrap();
        Sgd::new(&fsdp, SgdConfig { lr: LR, ..SgdConfig::default() }).unwrap().step(&fsdp).unwrap();
        let gradients = loss(&plain_token, &plain_block).unwrap().backward().unwrap();
        let after = full(&fsdp);
        for (fqn, var) in vars.data().lock().unwrap().iter() {
            let gradient = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let stepped = |(p, g): (&f32, &f32)| p - LR as f32 * g;
            let expected: Vec<f32> = before[fqn].iter().zip(&gradient).map(stepped).collect();
            assert!(relative_difference(&after[fqn], &expected) < 1e-6, "{fqn}");
        }
    });
}

#[test]
fn buffers_are_kept_whole_follow_the_first_rank_and_are_part_of_the_state() {
    ranks(3, |world| {
        let kept_whole = Names::matching(|fqn| fqn.contains("running"));
        let config = FsdpConfig { kept_whole, sync_module_states: true, ..FsdpConfig::default() };
        let build = |seed| {
            let config = FsdpConfig { seed, ..config.clone() };
            let builder = FsdpBuilder::new(&mesh(&world, config.strategy), config).unwrap();
            let norm = batch_norm(4, 1e-5, builder.var_builder().pp("norm")).unwrap();
            let noise = builder.var_builder().get_with_hints(
                4,
                "running_noise",
                candle_nn::init::DEFAULT_KAIMING_NORMAL,
            );
            (norm, noise.unwrap(), builder.build().unwrap())
        };
        // Every rank has another seed: the first one's noise is everybody's.
        let (norm, noise, fsdp) = build(world.rank().0 as u64);
        let noise = noise.to_vec1::<f32>().unwrap();
        let all = world.all_gather_object(bytemuck::cast_slice(&noise)).unwrap();
        assert!(all.iter().all(|other| *other == all[0]));

        let x = tensor(&[6, 4], 7).affine(1.0, 3.0).unwrap();
        let loss =
            fsdp.forward(&[&x], || candle_nn::ModuleT::forward_t(&norm, &x, true)?.sqr()?.sum_all()).unwrap();
        fsdp.backward(&loss).unwrap();
        let state = fsdp.state_dict(StateDictType::FlatShard).unwrap();
        let mean = state.tensor::<sconce_dtensor::FlatTensor>("norm.running_mean").unwrap().flat();
        assert!(mean.to_vec1::<f32>().unwrap().iter().all(|m| *m > 0.1), "it moved towards the data");

        let (_, _, other) = build(9);
        other.load_state_dict(&state).unwrap();
        assert_eq!(full(&other), full(&fsdp));
        assert_eq!(other.kept_whole().count(), 3);
    });
}

#[test]
fn bad_configurations_are_the_same_typed_error_on_every_rank() {
    let kinds = ranks(2, |world| {
        let build = |units: &[&str], frozen: Names| {
            let config =
                FsdpConfig { units: units.iter().copied().collect(), frozen, ..FsdpConfig::default() };
            let builder = FsdpBuilder::new(&mesh(&world, ShardingStrategy::FullShard), config).unwrap();
            linear(3, 3, builder.var_builder().pp("a.b")).unwrap();
            builder.build()
        };
        let none = Names::default;
        assert!(matches!(
            build(&["a.c"], none()),
            Err(Error::UnknownUnit { what: "matches no parameter", .. })
        ));
        assert!(matches!(
            build(&["a", "a"], none()),
            Err(Error::UnknownUnit { what: "is listed twice", .. })
        ));
        assert!(matches!(build(&["a", "a.b"], none()), Err(Error::UnknownUnit { unit, .. }) if unit == "a"));
        // Ranks that differ in what they freeze differ in their layout.
        let rank = world.rank().0;
        let differs = build(&[], Names::matching(move |_| rank == 1)).unwrap_err();
        assert!(matches!(differs, Error::LayoutMismatch { .. }), "{differs}");

        let (one, other) = (build(&[], none()).unwrap(), build(&[], none()).unwrap());
        let mut optim = Sgd::new(&one, SgdConfig::default()).unwrap();
        assert!(matches!(optim.step(&other), Err(Error::OtherModel)));
        differs.to_string()
    });
    assert_eq!(kinds[0], kinds[1]);
}

#[test]
fn a_wrapped_module_that_runs_before_its_model_is_built_says_so() {
    let builder = FsdpBuilder::new(
        &mesh(&ProcessGroup::single(), ShardingStrategy::FullShard),
        FsdpConfig { units: ["net"].into_iter().collect(), ..FsdpConfig::default() },
    );
    let builder = builder.unwrap();
    let net = linear(2, 2, builder.var_builder().pp("net")).unwrap();
    let net = builder.wrap("net", net).unwrap();
    let error = net.forward(&tensor(&[1, 2], 0)).unwrap_err().to_string();
    assert!(error.contains("\"net\": its model is not built yet"), "{error}");
}

#[test]
fn replicas_begin_alike_or_not_at_all() {
    let build = |world: &ProcessGroup, strategy, sync_module_states| {
        let seed = world.rank().0 as u64;
        let config = FsdpConfig { strategy, seed, sync_module_states, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(&mesh(world, strategy), config).unwrap();
        let _model = linear(3, 2, builder.var_builder()).unwrap();
        builder.build()
    };
    for strategy in [ShardingStrategy::NoShard, ShardingStrategy::HybridShard] {
        let states = ranks(4, |world| {
            let error = build(&world, strategy, false).unwrap_err().to_string();
            assert!(error.contains("seed 0") && error.contains("seed 1"), "{error}");
            full(&build(&world, strategy, true).unwrap())
        });
        let first = ranks(1, |world| full(&build(&world, ShardingStrategy::FullShard, false).unwrap()));
        assert!(states.iter().all(|state| *state == first[0]), "{strategy:?}");
    }
}
