//! What a step costs in memory, counted by the allocator, with one process a rank.
//!
//! `SCONCE_MEMORY_WIDTH=4096` makes the units 64 MiB instead of 1.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use sconce_fsdp::{
    Fsdp, FsdpBuilder, FsdpConfig, Optimizer, Overlap, Sgd, SgdConfig, Sharded, ShardingStrategy, WrapPolicy,
    nn,
};
use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
use sconce_testkit::{CountingAllocator, live_bytes, peak_bytes, rank_tests};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const UNITS: usize = 16;
const RANKS: usize = 4;
const BATCH: usize = 2;

fn width() -> usize {
    std::env::var("SCONCE_MEMORY_WIDTH").map_or(512, |width| width.parse().unwrap())
}

fn unit_bytes() -> f64 {
    (4 * width() * width()) as f64
}

/// Whose linear layers.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Fused,
    CandleNn,
}

fn boxed<M: Module + 'static>(module: sconce_fsdp::Result<Sharded<M>>) -> Box<dyn Module> {
    Box::new(module.unwrap())
}

struct Trained {
    layers: Vec<Box<dyn Module>>,
    fsdp: Fsdp,
    optim: Sgd,
    x: Tensor,
}

impl Trained {
    fn new(world: &ProcessGroup, kind: Kind, strategy: ShardingStrategy, overlap: Overlap) -> Self {
        let mesh = DeviceMesh::new(world, DeviceType::Cpu, &[world.size()], &[]).unwrap();
        let units = WrapPolicy::RepeatedBlocks(vec!["layers".to_owned()]);
        let config = FsdpConfig { strategy, units, overlap, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(&mesh, config).unwrap();
        let layer = |nth: usize| {
            let name = format!("layers.{nth}");
            let vb = builder.var_builder().pp(&name);
            match kind {
                Kind::Fused => boxed(builder.wrap(&name, nn::linear_no_bias(width(), width(), vb).unwrap())),
                Kind::CandleNn => {
                    boxed(builder.wrap(&name, candle_nn::linear_no_bias(width(), width(), vb).unwrap()))
                }
            }
        };
        let layers = (0..UNITS).map(layer).collect();
        let fsdp = builder.build().unwrap();
        let optim = Sgd::new(&fsdp, SgdConfig::default()).unwrap();
        let x = Tensor::ones((BATCH, width()), DType::F32, &Device::Cpu).unwrap();
        Self { layers, fsdp, optim, x }
    }

    fn forward(&self) -> Tensor {
        let forward =
            || self.layers.iter().try_fold(self.x.clone(), |x, layer| layer.forward(&x))?.sqr()?.mean_all();
        self.fsdp.forward(&[], forward).unwrap()
    }

    fn step(&mut self) {
        let loss = self.forward();
        drop(self.fsdp.backward(&loss).unwrap());
        drop(loss);
        self.optim.step(&self.fsdp).unwrap();
    }
}

/// What a rank allocates whatever the size of its units: the graph, the collectives' lists.
const FIXED_BYTES: f64 = (256 << 10) as f64;

/// Bytes of a peak in units, without this rank's shards, what activations take at most (a few tensors of the batch's
/// size for each unit in forward and in backward), and `FIXED_BYTES`.
fn in_units(peak: usize, before: usize) -> f64 {
    let activations = (UNITS * 6 * 4 * BATCH * width()) as f64;
    let shards = UNITS as f64 * unit_bytes() / RANKS as f64;
    ((peak - before) as f64 - shards - activations - FIXED_BYTES) / unit_bytes()
}

/// Runs a layer's three products: each thread that computes one packs its operands into memory that it keeps, as much
/// as the caches of the machine ask for.
fn warm_up() {
    let ones = |rows, columns| Tensor::ones((rows, columns), DType::F32, &Device::Cpu).unwrap();
    let (x, w) = (ones(BATCH, width()), ones(width(), width()));
    for _ in 0..4 {
        let products = [x.matmul(&w.t().unwrap()), x.matmul(&w), x.t().unwrap().matmul(&x)];
        products.into_iter().for_each(|product| drop(product.unwrap()));
    }
}

fn measure(world: &ProcessGroup, kind: Kind, strategy: ShardingStrategy, overlap: Overlap) -> (f64, f64) {
    warm_up();
    let before = live_bytes();
    let mut trained = Trained::new(world, kind, strategy, overlap);
    trained.step();
    let (loss, forward) = peak_bytes(|| trained.forward());
    drop(loss);
    let ((), whole) = peak_bytes(|| trained.step());
    let settled = live_bytes();
    (0..3).for_each(|_| trained.step());
    let growth = live_bytes().saturating_sub(settled);
    assert!(growth < 1 << 16, "grew by {growth} bytes in three steps");
    world.barrier().unwrap();
    (in_units(forward, before), in_units(whole, before))
}

/// Sharded gradients, in units.
const GRADIENTS: f64 = UNITS as f64 / RANKS as f64;

/// candle's backward of `x.matmul(&w.t()?)` holds, beside the parameters, five tensors of the weight's size: a zeroed
/// gradient, the product and their sum, all kept until the transposition has added the sum to another zeroed gradient.
/// When that comes last but one, all gradients but two units' are reduced: 6 units less half of one. Prefetch adds one.
const PLAIN_CANDLE: f64 = 5.5;

fn full_shard(world: &ProcessGroup, kind: Kind, overlap: Overlap, most: f64) {
    let (forward, whole) = measure(world, kind, ShardingStrategy::FullShard, overlap);
    println!(
        "FullShard, {kind:?}, {overlap:?}: forward {forward:.2} units, step {whole:.2} beside the shards"
    );
    assert!(forward <= 2.0, "forward: {forward} units");
    assert!(whole <= GRADIENTS + most, "step: {whole} units");
}

fn shard_grad_op(world: &ProcessGroup, kind: Kind) {
    let (forward, whole) = measure(world, kind, ShardingStrategy::ShardGradOp, Overlap::default());
    println!("ShardGradOp, {kind:?}: forward {forward:.2} units, step {whole:.2} beside the shards");
    assert!(forward <= UNITS as f64, "forward: {forward} units");
    assert!(whole <= GRADIENTS + 5.0 + UNITS as f64, "step: {whole} units");
}

fn a_hundred_steps(world: &ProcessGroup, kind: Kind) {
    warm_up();
    let mut trained = Trained::new(world, kind, ShardingStrategy::FullShard, Overlap::default());
    // The flight recorder keeps 1024 collectives: enough steps to fill it.
    (0..40).for_each(|_| trained.step());
    let settled = live_bytes();
    (0..100).for_each(|_| trained.step());
    let growth = live_bytes().saturating_sub(settled);
    assert!(growth < 1 << 12, "grew by {growth} bytes in a hundred steps");
}

rank_tests! {
    ranks: RANKS, deadline: Duration::from_secs(300);
    mod steps_keep_nothing {
        a_hundred_of_fused_modules => |rank| a_hundred_steps(&rank.world, Kind::Fused);
        a_hundred_of_candle_nn => |rank| a_hundred_steps(&rank.world, Kind::CandleNn);
    }
}

rank_tests! {
    ranks: RANKS, deadline: Duration::from_secs(300);
    mod a_step_holds_no_more_than_its_strategy_needs {
        full_shard_without_overlap => |rank| full_shard(&rank.world, Kind::Fused, Overlap::NONE, 3.0);
        full_shard_with_overlap => |rank| full_shard(&rank.world, Kind::Fused, Overlap::default(), 5.0);
        full_shard_of_candle_nn => |rank| full_shard(&rank.world, Kind::CandleNn, Overlap::NONE, PLAIN_CANDLE);
        full_shard_of_candle_nn_with_overlap => |rank| {
            full_shard(&rank.world, Kind::CandleNn, Overlap::default(), PLAIN_CANDLE + 1.0)
        };
        shard_grad_op_of_fused_modules => |rank| shard_grad_op(&rank.world, Kind::Fused);
        shard_grad_op_of_candle_nn => |rank| shard_grad_op(&rank.world, Kind::CandleNn);
    }
}
