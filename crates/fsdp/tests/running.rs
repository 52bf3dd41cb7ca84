//! Ways to run a model beside one forward, one backward and one step.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, linear};
use common::{STRATEGIES, full, mesh, plain_copy, ranks, relative_difference, tensor};
use sconce_fsdp::{
    Adam, AdamConfig, Error, Fsdp, FsdpBuilder, FsdpConfig, GradScaler, GradScalerConfig, MixedPrecision,
    Names, Optimizer, ParamGroup, Sgd, SgdConfig, Sharded, ShardingStrategy, StateDictType, WrapPolicy,
};
use sconce_mesh::ProcessGroup;

const SGD: SgdConfig =
    SgdConfig { lr: 0.5, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false };

#[derive(Clone)]
struct Block {
    up: Linear,
    down: Linear,
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.down.forward(&self.up.forward(x)?.gelu()?)
    }
}

fn block(vb: candle_nn::VarBuilder<'_>) -> Block {
    Block { up: linear(4, 6, vb.pp("up")).unwrap(), down: linear(6, 4, vb.pp("down")).unwrap() }
}

fn config(strategy: ShardingStrategy) -> FsdpConfig {
    let units = WrapPolicy::RepeatedBlocks(vec!["blocks".to_owned()]);
    FsdpConfig { strategy, units, seed: 3, ..FsdpConfig::default() }
}

fn build(world: &ProcessGroup, config: FsdpConfig) -> (Vec<Sharded<Block>>, Fsdp) {
    let builder = FsdpBuilder::new(&mesh(world, config.strategy), config).unwrap();
    let wrapped = |nth: usize| {
        let name = format!("blocks.{nth}");
        builder.wrap(&name, block(builder.var_builder().pp(&name))).unwrap()
    };
    let blocks = (0..3).map(wrapped).collect();
    (blocks, builder.build().unwrap())
}

fn chain<M: Module>(blocks: &[M], x: &Tensor) -> candle_core::Result<Tensor> {
    blocks.iter().try_fold(x.clone(), |x, block| block.forward(&x))
}

fn loss<M: Module>(fsdp: &Fsdp, blocks: &[M], x: &Tensor) -> Tensor {
    fsdp.forward(&[x], || chain(blocks, x)?.sqr()?.sum_all()).unwrap()
}

#[test]
fn eval_gives_the_values_of_forward_without_a_graph_and_frees_everything() {
    for strategy in STRATEGIES {
        ranks(2, |world| {
            let (blocks, fsdp) = build(&world, config(strategy));
            let x = tensor(&[2, 4], 1);
            let trained = fsdp.forward(&[&x], || chain(&blocks, &x)).unwrap();
            let evaluated = fsdp.eval(|| chain(&blocks, &x)).unwrap();
            assert_eq!(evaluated.to_vec2::<f32>().unwrap(), trained.to_vec2::<f32>().unwrap());
            assert!(trained.track_op() && !evaluated.track_op());
            assert!(blocks[0].module().forward(&x).is_err(), "freed after eval under {strategy:?}");
        });
    }
}

#[test]
fn gradients_accumulated_without_sync_are_those_of_one_backward_over_all() {
    for strategy in STRATEGIES {
        ranks(2, |world| {
            let batches: Vec<Tensor> = (0..3).map(|nth| tensor(&[2, 4], nth * 2 + world.rank().0)).collect();
            let (blocks, fsdp) = build(&world, config(strategy));
            let (plain, plain_fsdp) = build(&world, config(strategy));
            for batch in &batches[..2] {
                fsdp.backward_no_sync(&loss(&fsdp, &blocks, batch)).unwrap();
            }
            assert_eq!(fsdp.grad_norm(2.0).unwrap(), 0.0, "nothing is reduced yet");
            fsdp.backward(&loss(&fsdp, &blocks, &batches[2])).unwrap();
            let whole = Tensor::cat(&batches, 0).unwrap();
            plain_fsdp.backward(&loss(&plain_fsdp, &plain, &whole)).unwrap();
            Sgd::new(&fsdp, SGD).unwrap().step(&fsdp).unwrap();
            Sgd::new(&plain_fsdp, SGD).unwrap().step(&plain_fsdp).unwrap();
            let expected = full(&plain_fsdp);
            for (fqn, values) in full(&fsdp) {
                assert!(relative_difference(&values, &expected[&fqn]) < 2e-6, "{strategy:?} {fqn}");
            }
        });
    }
}

#[test]
fn summoned_parameters_are_whole_and_what_is_returned_is_written_back() {
    ranks(3, |world| {
        let (blocks, fsdp) = build(&world, config(ShardingStrategy::FullShard));
        let expected = full(&fsdp);
        let read = |params: &sconce_fsdp::FullParams<'_>| {
            let values =
                params.iter().map(|(fqn, t)| Ok((fqn.to_owned(), t.flatten_all()?.to_vec1::<f32>()?)));
            values.collect::<candle_core::Result<HashMap<_, _>>>()
        };
        assert_eq!(fsdp.summon_full_params(read).unwrap(), expected);
        assert!(blocks[0].module().forward(&tensor(&[1, 4], 0)).is_err(), "freed again");

        fsdp.rewrite_full_params(|params| {
            let doubled = params.get("blocks.1.up.weight").unwrap().affine(2.0, 0.0)?.detach();
            Ok(HashMap::from([("blocks.1.up.weight".to_owned(), doubled)]))
        })
        .unwrap();
        for (fqn, values) in full(&fsdp) {
            let factor = if fqn == "blocks.1.up.weight" { 2.0 } else { 1.0 };
            assert!(values.iter().zip(&expected[&fqn]).all(|(got, was)| *got == factor * was), "{fqn}");
        }
        let wrong =
            fsdp.rewrite_full_params(|_| Ok(HashMap::from([("nothing".to_owned(), tensor(&[1], 0))])));
        assert!(matches!(wrong, Err(Error::KeyMismatch { unexpected, .. }) if unexpected == ["nothing"]));
    });
}

#[test]
fn units_take_and_give_several_tensors_of_which_the_loss_may_leave_some_out() {
    ranks(2, |world| {
        let units = ["net"].into_iter().collect();
        let builder = FsdpBuilder::new(
            &mesh(&world, ShardingStrategy::FullShard),
            FsdpConfig { units, ..FsdpConfig::default() },
        );
        let builder = builder.unwrap();
        let make = |vb: candle_nn::VarBuilder<'_>| {
            (
                linear(3, 3, vb.pp("net.a")).unwrap(),
                linear(3, 3, vb.pp("net.b")).unwrap(),
                linear(3, 3, vb.pp("first")).unwrap(),
            )
        };
        let (a, b, first) = make(builder.var_builder());
        let net = builder.wrap("net", (a, b)).unwrap();
        let fsdp = builder.build().unwrap();
        let (vars, vb) = plain_copy(&fsdp);
        let (plain_a, plain_b, plain_first) = make(vb);
        let (x, y) = (tensor(&[2, 3], 1), tensor(&[2, 3], 2));
        let both = |a: &Linear, b: &Linear, x: &Tensor, y: &Tensor| {
            Ok((a.forward(x)?, vec![b.forward(&(x + y)?)?, y.affine(2.0, 0.0)?], Some(b.forward(y)?)))
        };
        // `b`'s second result, and `a` altogether, are not used.
        let forward = || {
            let h = first.forward(&x)?;
            let (_, used, _) = net.run(&[&h, &y], |(a, b)| both(a, b, &h, &y))?;
            used[0].mul(&used[1])?.sqr()?.sum_all()
        };
        let before = full(&fsdp);
        let loss = fsdp.forward(&[&x, &y], forward).unwrap();
        fsdp.backward(&loss).unwrap();
        Sgd::new(&fsdp, SGD).unwrap().step(&fsdp).unwrap();
        let h = plain_first.forward(&x).unwrap();
        let (_, used, _) = both(&plain_a, &plain_b, &h, &y).unwrap();
        let gradients = used[0].mul(&used[1]).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let after = full(&fsdp);
        for (fqn, var) in vars.data().lock().unwrap().iter() {
            let gradient = gradients.get(var).map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            assert_eq!(gradient.is_none(), fqn.contains(".a."), "{fqn}");
            let gradient = gradient.unwrap_or(vec![0.0; var.elem_count()]);
            let expected: Vec<f32> = before[fqn].iter().zip(&gradient).map(|(p, g)| p - 0.5 * g).collect();
            assert!(relative_difference(&after[fqn], &expected) < 1e-6, "{fqn}");
        }
    });
}

#[test]
fn checkpointed_units_train_to_the_same_bits_and_are_gathered_no_more_often() {
    for strategy in STRATEGIES {
        ranks(2, |world| {
            let builder = FsdpBuilder::new(&mesh(&world, strategy), config(strategy)).unwrap();
            let wrapped = |nth: usize| {
                let name = format!("blocks.{nth}");
                builder.wrap_checkpointed(&name, block(builder.var_builder().pp(&name))).unwrap()
            };
            let checkpointed: Vec<_> = (0..3).map(wrapped).collect();
            let fsdp = builder.build().unwrap();
            let (blocks, plain_fsdp) = build(&world, config(strategy));
            let (mut optim, mut plain_optim) =
                (Sgd::new(&fsdp, SGD).unwrap(), Sgd::new(&plain_fsdp, SGD).unwrap());
            for nth in 0..3 {
                let x = tensor(&[2, 4], nth * 2 + world.rank().0);
                let (got, expected) = (loss(&fsdp, &checkpointed, &x), loss(&plain_fsdp, &blocks, &x));
                assert_eq!(got.to_scalar::<f32>().unwrap(), expected.to_scalar::<f32>().unwrap());
                let n_calls = |fsdp: &Fsdp| {
                    fsdp.device_mesh()
                        .group(fsdp.device_mesh().ndim() - 1)
                        .unwrap()
                        .flight_record()
                        .collectives
                        .len()
                };
                let before = (n_calls(&fsdp), n_calls(&plain_fsdp));
                fsdp.backward(&got).unwrap();
                plain_fsdp.backward(&expected).unwrap();
                if strategy == ShardingStrategy::FullShard {
                    assert!(n_calls(&fsdp) - before.0 == n_calls(&plain_fsdp) - before.1 || nth == 0);
                }
                optim.step(&fsdp).unwrap();
                plain_optim.step(&plain_fsdp).unwrap();
            }
            assert_eq!(full(&fsdp), full(&plain_fsdp), "{strategy:?}");
            let x = tensor(&[2, 4], 9);
            let evaluated = fsdp.eval(|| chain(&checkpointed, &x)).unwrap();
            assert_eq!(
                evaluated.to_vec2::<f32>().unwrap(),
                plain_fsdp.eval(|| chain(&blocks, &x)).unwrap().to_vec2::<f32>().unwrap()
            );
        });
    }
}

#[test]
fn gradients_that_an_unreduced_backward_left_are_in_the_next_step_and_in_no_later_one() {
    ranks(2, |world| {
        let (blocks, fsdp) = build(&world, config(ShardingStrategy::FullShard));
        let all = full(&fsdp);
        let x = tensor(&[2, 4], 1);
        let mut optim = Sgd::new(&fsdp, SGD).unwrap();
        let of = |blocks: &[Sharded<Block>]| fsdp.forward(&[&x], || chain(blocks, &x)?.sum_all()).unwrap();
        // The first batch reaches the first block, the second the last.
        fsdp.backward_no_sync(&of(&blocks[..1])).unwrap();
        fsdp.backward(&of(&blocks[2..])).unwrap();
        optim.step(&fsdp).unwrap();
        let after = full(&fsdp);
        let moved = |name: &str| all.keys().any(|fqn| fqn.starts_with(name) && all[fqn] != after[fqn]);
        assert!(moved("blocks.0") && moved("blocks.2") && !moved("blocks.1"));
        fsdp.backward(&of(&blocks[2..])).unwrap();
        optim.step(&fsdp).unwrap();
        let later = full(&fsdp);
        assert!(later.iter().all(|(fqn, values)| !fqn.starts_with("blocks.0") || *values == after[fqn]));
    });
}

/// Rows of a parameter, as learned positions are.
struct Rows(Tensor);

impl Module for Rows {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.0.narrow(0, 0, x.dim(0)?)
    }
}

#[test]
fn outputs_that_are_views_of_parameters_outlive_their_unit_also_without_a_graph() {
    for n in [1, 2] {
        ranks(n, |world| {
            let strategy = ShardingStrategy::FullShard;
            let units = WrapPolicy::from(vec!["rows"]);
            let builder =
                FsdpBuilder::new(&mesh(&world, strategy), FsdpConfig { units, ..config(strategy) }).unwrap();
            let weight = builder.var_builder().pp("rows").get((5, 4), "weight").unwrap();
            let scale = builder.var_builder().get(4, "scale").unwrap();
            let rows = builder.wrap("rows", Rows(weight)).unwrap();
            let fsdp = builder.build().unwrap();
            let x = tensor(&[2, 4], 1);
            let forward = || rows.forward(&x)?.broadcast_mul(&scale)?.add(&x);
            let trained = fsdp.forward(&[&x], forward).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(fsdp.eval(forward).unwrap().to_vec2::<f32>().unwrap(), trained);
        });
    }
}

/// A root with parameters before and behind its blocks.
struct Surrounded<B> {
    before: candle_nn::Linear,
    blocks: Vec<B>,
    behind: candle_nn::Linear,
}

impl<B: Module> Surrounded<B> {
    fn new(builder: &FsdpBuilder, block: impl Fn(&str) -> B) -> Self {
        let vb = builder.var_builder();
        let before = linear(4, 4, vb.pp("before")).unwrap();
        let blocks = (0..3).map(|nth| block(&format!("blocks.{nth}"))).collect();
        Self { before, blocks, behind: linear(4, 4, vb.pp("behind")).unwrap() }
    }

    fn loss(&self, fsdp: &Fsdp, x: &Tensor) -> Tensor {
        let loss = || {
            let h = chain(&self.blocks, &self.before.forward(x)?.tanh()?)?;
            self.behind.forward(&h)?.sqr()?.sum_all()
        };
        fsdp.forward(&[x], loss).unwrap()
    }
}

#[test]
fn checkpointed_modules_leave_what_surrounds_them_until_it_is_done() {
    let collectives = |fsdp: &Fsdp| fsdp.device_mesh().group(0).unwrap().flight_record().collectives.len();
    // All blocks are units, one is, and none.
    for units in [&["blocks.0", "blocks.1", "blocks.2"][..], &["blocks.1"], &[]] {
        for n in [1, 2] {
            ranks(n, |world| {
                let strategy = ShardingStrategy::FullShard;
                let chosen: Vec<String> = units.iter().map(|unit| (*unit).to_owned()).collect();
                let policy = WrapPolicy::predicate(move |name, _| chosen.iter().any(|unit| unit == name));
                let config = || FsdpConfig { units: policy.clone(), ..config(strategy) };
                let builder = || FsdpBuilder::new(&mesh(&world, strategy), config()).unwrap();
                let (one, other) = (builder(), builder());
                let inner = |builder: &FsdpBuilder, name: &str| block(builder.var_builder().pp(name));
                let again =
                    Surrounded::new(&one, |name| one.wrap_checkpointed(name, inner(&one, name)).unwrap());
                let plain = Surrounded::new(&other, |name| other.wrap(name, inner(&other, name)).unwrap());
                let (fsdp, plain_fsdp) = (one.build().unwrap(), other.build().unwrap());
                let (mut optim, mut plain_optim) =
                    (Sgd::new(&fsdp, SGD).unwrap(), Sgd::new(&plain_fsdp, SGD).unwrap());
                for nth in 0..3 {
                    let x = tensor(&[2, 4], nth * 2 + world.rank().0);
                    let before = (collectives(&fsdp), collectives(&plain_fsdp));
                    fsdp.backward(&again.loss(&fsdp, &x)).unwrap();
                    plain_fsdp.backward(&plain.loss(&plain_fsdp, &x)).unwrap();
                    let made = (collectives(&fsdp) - before.0, collectives(&plain_fsdp) - before.1);
                    assert!(made.0 == made.1 || nth == 0, "{units:?}, step {nth}: {made:?}");
                    optim.step(&fsdp).unwrap();
                    plain_optim.step(&plain_fsdp).unwrap();
                }
                let (got, expected) = (full(&fsdp), full(&plain_fsdp));
                for (fqn, values) in &expected {
                    assert!(relative_difference(&got[fqn], values) < 1e-6, "{units:?}: {fqn}");
                }
            });
        }
    }
}

#[test]
fn clipping_scales_by_the_norm_of_the_whole_gradient() {
    for strategy in STRATEGIES {
        for n in [1, 2, 4] {
            ranks(n, |world| {
                let (blocks, fsdp) = build(&world, config(strategy));
                let (vars, vb) = plain_copy(&fsdp);
                let plain: Vec<Block> = (0..3).map(|nth| block(vb.pp(format!("blocks.{nth}")))).collect();
                let x = tensor(&[2, 4], 5);
                let gradients =
                    chain(&plain, &x).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
                let all: Vec<f64> = vars
                    .all_vars()
                    .iter()
                    .flat_map(|var| {
                        gradients.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
                    })
                    .map(f64::from)
                    .collect();
                let norm = |p: f64| match p.is_infinite() {
                    true => all.iter().fold(0.0, |max: f64, g| max.max(g.abs())),
                    false => all.iter().map(|g| g.abs().powf(p)).sum::<f64>().powf(1.0 / p),
                };
                for p in [1.0, 2.0, 3.5, f64::INFINITY] {
                    fsdp.backward(&loss(&fsdp, &blocks, &x)).unwrap();
                    let got = fsdp.clip_grad_norm(0.25 * norm(p), p).unwrap();
                    assert!(
                        (got / norm(p) - 1.0).abs() < 1e-6,
                        "{strategy:?}, {n} ranks, p {p}: {got} for {}",
                        norm(p)
                    );
                    let clipped = fsdp.grad_norm(p).unwrap();
                    assert!((clipped / (0.25 * norm(p)) - 1.0).abs() < 1e-5, "p {p}: {clipped}");
                    let unclipped = fsdp.clip_grad_norm(1e9, p).unwrap();
                    assert_eq!((unclipped, fsdp.grad_norm(p).unwrap()), (clipped, clipped));
                    fsdp.zero_grad();
                }
            });
        }
    }
}

#[test]
fn half_precision_follows_full_precision_and_keeps_full_precision_weights() {
    for strategy in STRATEGIES {
        ranks(2, |world| {
            let half = DType::F16;
            let mixed_precision =
                MixedPrecision { param_dtype: half, reduce_dtype: half, output_dtype: Some(DType::F32) };
            let (blocks, fsdp) = build(&world, FsdpConfig { mixed_precision, ..config(strategy) });
            let (plain, plain_fsdp) = build(&world, config(strategy));
            let adam = AdamConfig { lr: 0.01, ..AdamConfig::default() };
            let (mut optim, mut plain_optim) =
                (Adam::new(&fsdp, adam).unwrap(), Adam::new(&plain_fsdp, adam).unwrap());
            assert_eq!(full(&fsdp), full(&plain_fsdp));
            for nth in 0..10 {
                let x = tensor(&[8, 4], nth * 2 + world.rank().0);
                let in_half = x.to_dtype(half).unwrap();
                let output = fsdp.forward(&[&in_half], || chain(&blocks, &in_half)).unwrap();
                assert_eq!(output.dtype(), DType::F32);
                let got = output.sqr().unwrap().mean_all().unwrap();
                let expected = plain_fsdp.forward(&[&x], || chain(&plain, &x)?.sqr()?.mean_all()).unwrap();
                let off = got.to_scalar::<f32>().unwrap() / expected.to_scalar::<f32>().unwrap() - 1.0;
                assert!(off.abs() < 0.02, "{strategy:?}, step {nth}: {off}");
                fsdp.backward(&got).unwrap();
                plain_fsdp.backward(&expected).unwrap();
                optim.step(&fsdp).unwrap();
                plain_optim.step(&plain_fsdp).unwrap();
            }
        });
    }
}

#[test]
fn a_gradient_that_overflows_on_one_rank_skips_the_step_on_all() {
    ranks(3, |world| {
        let mixed_precision = MixedPrecision { param_dtype: DType::F16, ..MixedPrecision::default() };
        let config = FsdpConfig { mixed_precision, ..config(ShardingStrategy::FullShard) };
        let (blocks, fsdp) = build(&world, config);
        let mut optim = Sgd::new(&fsdp, SGD).unwrap();
        let mut scaler =
            GradScaler::new(GradScalerConfig { init_scale: 1024.0, ..GradScalerConfig::default() });
        let mut step = |bad: bool| {
            let x = tensor(&[2, 4], 1)
                .affine(if bad { 1e4 } else { 1.0 }, 0.0)
                .unwrap()
                .to_dtype(DType::F16)
                .unwrap();
            let loss =
                fsdp.forward(&[&x], || chain(&blocks, &x)?.to_dtype(DType::F32)?.sqr()?.mean_all()).unwrap();
            fsdp.backward(&scaler.scale(&loss).unwrap()).unwrap();
            let stepped = scaler.step(&mut optim, &fsdp).unwrap();
            (stepped, scaler.loss_scale(), full(&fsdp))
        };
        let (stepped, scale, weights) = step(false);
        assert!(stepped && scale == 1024.0);
        let (stepped, scale, kept) = step(world.rank().0 == 1);
        assert!(!stepped && scale == 512.0 && kept == weights);
        let (stepped, _, moved) = step(false);
        assert!(stepped && moved != weights && moved.values().flatten().all(|w| w.is_finite()));
    });
}

/// Three steps on `sum(sin(p · [1, 2, 3]))` from [1, -2, 0.5], by torch 2.15.
#[test]
fn optimizers_step_as_torchs_do() {
    let sgd = |config: SgdConfig| {
        move |fsdp: &Fsdp| Box::new(Sgd::new(fsdp, config).unwrap()) as Box<dyn Optimizer>
    };
    let adam = |config: AdamConfig| {
        move |fsdp: &Fsdp| Box::new(Adam::new(fsdp, config).unwrap()) as Box<dyn Optimizer>
    };
    let base = SgdConfig { lr: 0.1, momentum: 0.9, ..SGD };
    type Make = Box<dyn Fn(&Fsdp) -> Box<dyn Optimizer> + Sync>;
    let cases: [(&str, Make, [f32; 3]); 4] = [
        (
            "nesterov",
            Box::new(sgd(SgdConfig { nesterov: true, weight_decay: 0.01, ..base })),
            [0.49598014, -0.710237, -0.046488218],
        ),
        (
            "dampening",
            Box::new(sgd(SgdConfig { dampening: 0.3, ..base })),
            [0.7299173, -1.2869114, 0.33173302],
        ),
        (
            "adamw",
            Box::new(adam(AdamConfig { weight_decay: 0.1, ..AdamConfig::adamw(0.1) })),
            [0.67285556, -1.6434176, 0.21322283],
        ),
        (
            "adam with decay",
            Box::new(adam(AdamConfig { lr: 0.1, weight_decay: 0.1, ..AdamConfig::default() })),
            [0.699506, -1.699577, 0.22201681],
        ),
    ];
    for (name, make, expected) in &cases {
        ranks(2, |world| {
            let builder =
                FsdpBuilder::new(&mesh(&world, ShardingStrategy::FullShard), FsdpConfig::default()).unwrap();
            let p = builder.var_builder().get(3, "p").unwrap();
            let fsdp = builder.build().unwrap();
            let start =
                HashMap::from([("p".to_owned(), Tensor::new(&[1f32, -2.0, 0.5], &Device::Cpu).unwrap())]);
            fsdp.load_state_dict(&common::whole_state(&start)).unwrap();
            let mut optim = make(&fsdp);
            // What was saved before the first step changes nothing.
            let unstepped = make(&fsdp).state_dict(&fsdp, StateDictType::Full).unwrap();
            optim.load_state_dict(&fsdp, &unstepped).unwrap();
            let factors = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
            for _ in 0..3 {
                let loss = fsdp.forward(&[], || p.mul(&factors)?.sin()?.sum_all()).unwrap();
                fsdp.backward(&loss).unwrap();
                optim.step(&fsdp).unwrap();
            }
            let off = relative_difference(&full(&fsdp)["p"], expected);
            assert!(off < 1e-6, "{name}: {off}");
        });
    }
}

#[test]
fn parameter_groups_have_their_own_hyperparameters() {
    ranks(3, |world| {
        let (blocks, fsdp) = build(&world, config(ShardingStrategy::FullShard));
        let still = SgdConfig { lr: 0.0, ..SGD };
        let biases = Names::matching(|fqn| fqn.ends_with("bias"));
        let groups = vec![ParamGroup { params: biases, config: still }];
        let mut optim = Sgd::with_groups(&fsdp, SGD, groups).unwrap();
        let before = full(&fsdp);
        fsdp.backward(&loss(&fsdp, &blocks, &tensor(&[2, 4], 1))).unwrap();
        optim.step(&fsdp).unwrap();
        for (fqn, values) in full(&fsdp) {
            assert_eq!(values == before[&fqn], fqn.ends_with("bias"), "{fqn}");
        }
        let state = optim.state_dict(&fsdp, StateDictType::Full).unwrap();
        let Some(sconce_dtensor::Value::List(groups)) = state.get("param_groups") else {
            panic!("{state:?}")
        };
        let params = |nth: usize| match groups[nth].as_map().unwrap().get("params") {
            Some(sconce_dtensor::Value::List(names)) => names.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!((groups.len(), params(0), params(1)), (2, 6, 6));
    });
}
