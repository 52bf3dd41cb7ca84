//! How long the passes and the steps of sharded models take on rank processes of one thread each. Prints one line a
//! figure, judges nothing: `cargo xtask bench fsdp` sets the lines beside those of torch.
//!
//! ```text
//! ranks TAB model TAB what TAB seconds
//! ```
//!
//! `passes` are a forward and a backward, `step` is that and AdamW's step. Seconds are the median over repeats of the
//! slowest rank. `plain` is candle without this crate, `unmodified` the same modules under FSDP, and without a prefix
//! stand the fused modules under FSDP.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

#[path = "../examples/train_hsdp/model.rs"]
mod model;

use std::process::Command;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use candle_nn::optim::{AdamW, Optimizer as _, ParamsAdamW};
use candle_nn::{Module, VarBuilder, VarMap};
use sconce_fsdp::{
    Adam, AdamConfig, Fsdp, FsdpBuilder, FsdpConfig, Optimizer, ShardingStrategy, WrapPolicy, nn,
};
use sconce_mesh::{
    DeviceMesh, DeviceType, GroupOptions, ProcessGroup, RankEnv, RankOutput, RankProcesses, ReduceOp,
    die_with_parent,
};

use corpus::CONTEXT;
use model::Transformer;

type AnyResult<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What the example's model takes from its text.
mod corpus {
    pub(crate) const CONTEXT: usize = 64;
}

const RANKS: [usize; 3] = [1, 2, 4];
const LR: f64 = 1e-3;
const WIDTH: usize = 1024;
const LAYERS: usize = 8;
const ROWS: usize = 32;
const BATCH: usize = 4;
const VOCABULARY: usize = 96;
/// 61 MiB.
const UNIT_NUMEL: usize = 16_000_000;

fn main() {
    die_with_parent().unwrap();
    if std::env::var_os("SCONCE_BENCH_RANK").is_some() {
        return rank();
    }
    for n in RANKS {
        let command = |_: &RankEnv| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            // One thread a rank, as torch's peer has.
            command.env("SCONCE_BENCH_RANK", "1").env("RAYON_NUM_THREADS", "1");
            command
        };
        let mut ranks = RankProcesses::spawn(n, RankOutput::Inherited, command).unwrap();
        ranks.wait(Some(Duration::from_secs(300)), Duration::from_secs(5)).unwrap();
    }
}

fn rank() {
    let world = ProcessGroup::from_env(GroupOptions::default()).unwrap();
    if world.size() == 1 {
        plain(&world);
        let (model, fsdp) = mlp(&world, candle_nn::linear);
        sharded(&world, "mlp", "unmodified ", &fsdp, &mut || mlp_loss(&model));
    }
    let (model, fsdp) = mlp(&world, nn::linear);
    sharded(&world, "mlp", "", &fsdp, &mut || mlp_loss(&model));
    let (model, fsdp) = transformer(&world);
    sharded(&world, "transformer", "", &fsdp, &mut || transformer_loss(&model));
    for n_params in [1, 400] {
        let (unit, fsdp) = unit_of(&world, n_params);
        let zero = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
        let prefix = format!("{n_params} parameter{} ", if n_params == 1 { "" } else { "s" });
        sharded(&world, "unit", &prefix, &fsdp, &mut || unit.forward(&zero).unwrap());
    }
}

/// The multilayer perceptron of plain candle with candle's own optimizer.
fn plain(world: &ProcessGroup) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let layer =
        |nth: usize| -> Box<dyn Module> { Box::new(candle_nn::linear(WIDTH, WIDTH, vb.pp(nth)).unwrap()) };
    let layers: Layers = (0..LAYERS).map(layer).collect();
    let loss = || mlp_loss(&layers);
    report(world, "mlp", "plain passes", time(world, || drop(loss().backward().unwrap())));
    let mut optim = AdamW::new(vars.all_vars(), ParamsAdamW { lr: LR, ..ParamsAdamW::default() }).unwrap();
    report(world, "mlp", "plain step", time(world, || optim.backward_step(&loss()).unwrap()));
}

/// A sharded model, its passes and its steps.
fn sharded(world: &ProcessGroup, name: &str, prefix: &str, fsdp: &Fsdp, loss: &mut dyn FnMut() -> Tensor) {
    let mut passes = || fsdp.backward(&fsdp.forward(&[], || Ok(loss())).unwrap()).map(drop).unwrap();
    let seconds = time(world, || {
        passes();
        fsdp.zero_grad();
    });
    report(world, name, &format!("{prefix}passes"), seconds);
    let mut optim = Adam::new(fsdp, AdamConfig::adamw(LR)).unwrap();
    let seconds = time(world, || {
        passes();
        optim.step(fsdp).unwrap();
    });
    report(world, name, &format!("{prefix}step"), seconds);
}

type Layers = Vec<Box<dyn Module>>;

fn mlp<M: Module + 'static>(
    world: &ProcessGroup,
    linear: impl Fn(usize, usize, VarBuilder<'_>) -> candle_core::Result<M>,
) -> (Layers, Fsdp) {
    let units = WrapPolicy::Prefixes((0..LAYERS).map(|nth| format!("layers.{nth}")).collect());
    let builder = builder(world, units);
    let layer = |nth: usize| -> Box<dyn Module> {
        let prefix = format!("layers.{nth}");
        let layer = linear(WIDTH, WIDTH, builder.var_builder().pp(&prefix)).unwrap();
        Box::new(builder.wrap(&prefix, layer).unwrap())
    };
    let layers = (0..LAYERS).map(layer).collect();
    (layers, builder.build().unwrap())
}

fn mlp_loss(layers: &Layers) -> Tensor {
    let y = layers.iter().try_fold(rows(), |x, layer| layer.forward(&x)).unwrap();
    y.sqr().unwrap().mean_all().unwrap()
}

fn rows() -> Tensor {
    noise(ROWS * WIDTH).reshape((ROWS, WIDTH)).unwrap()
}

/// A sum of parameters, the cheapest that gives each a gradient.
struct Sum(Vec<Tensor>);

impl Module for Sum {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.0.iter().try_fold(x.clone(), |sum, param| sum + param.sum_all()?)
    }
}

/// One unit of `UNIT_NUMEL` elements in as many parameters.
fn unit_of(world: &ProcessGroup, n_params: usize) -> (Box<dyn Module>, Fsdp) {
    let builder = builder(world, WrapPolicy::Prefixes(vec!["unit".to_owned()]));
    let vb = builder.var_builder().pp("unit");
    let param = |nth: usize| vb.get(UNIT_NUMEL / n_params, &nth.to_string()).unwrap();
    let unit = builder.wrap("unit", Sum((0..n_params).map(param).collect())).unwrap();
    (Box::new(unit), builder.build().unwrap())
}

fn transformer(world: &ProcessGroup) -> (Transformer, Fsdp) {
    let builder = builder(world, WrapPolicy::RepeatedBlocks(vec!["blocks".to_owned()]));
    let wrap =
        |prefix: &str, block| -> AnyResult<Box<dyn Module>> { Ok(Box::new(builder.wrap(prefix, block)?)) };
    let model = Transformer::new(VOCABULARY, builder.var_builder(), wrap).unwrap();
    (model, builder.build().unwrap())
}

fn transformer_loss(model: &Transformer) -> Tensor {
    let token = |i: usize| (i * 31 % VOCABULARY) as u32;
    let tokens = Tensor::from_iter((0..BATCH * CONTEXT).map(token), &Device::Cpu).unwrap();
    let logits = model.forward(&tokens.reshape((BATCH, CONTEXT)).unwrap()).unwrap();
    nn::cross_entropy(&logits, &tokens).unwrap()
}

fn builder(world: &ProcessGroup, units: WrapPolicy) -> FsdpBuilder {
    let mesh = DeviceMesh::new(world, DeviceType::Cpu, &[world.size()], &["shard"]).unwrap();
    let config = FsdpConfig { strategy: ShardingStrategy::FullShard, units, ..FsdpConfig::default() };
    FsdpBuilder::new(&mesh, config).unwrap()
}

/// Repeatable values in [-1, 1).
fn noise(n: usize) -> Tensor {
    let scrambled = |i: usize| (i + 1).wrapping_mul(2_654_435_761) % 2003;
    Tensor::from_iter((0..n).map(|i| scrambled(i) as f32 / 1001.5 - 1.0), &Device::Cpu).unwrap()
}

fn report(world: &ProcessGroup, model: &str, what: &str, seconds: f64) {
    if world.rank().0 == 0 {
        println!("{}\t{model}\t{what}\t{seconds}", world.size());
    }
}

/// Median over repeats of the slowest rank's seconds.
fn time(world: &ProcessGroup, mut call: impl FnMut()) -> f64 {
    const WARM_UP: usize = 4;
    const REPEATS: usize = 15;
    let measure = |_| {
        world.barrier().unwrap();
        let started = Instant::now();
        call();
        started.elapsed().as_secs_f64()
    };
    let mut seconds: Vec<f64> = (0..WARM_UP + REPEATS).map(measure).skip(WARM_UP).collect();
    world.all_reduce(&mut seconds, ReduceOp::Max).unwrap();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}
