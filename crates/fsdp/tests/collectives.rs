//! What a step communicates: exactly what its strategy needs, and gathered ahead where the order of units is known.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use candle_core::Tensor;
use candle_nn::{Linear, Module, linear};
use common::{STRATEGIES, mesh, ranks, tensor};
use sconce_fsdp::{
    Adam, AdamConfig, Fsdp, FsdpBuilder, FsdpConfig, MixedPrecision, Optimizer, Overlap, Sharded,
    ShardingStrategy, WrapPolicy,
};
use sconce_mesh::{CollectiveRecord, FlightRecord, ProcessGroup};

const UNITS: usize = 4;
const WIDTH: usize = 8;
const NUMEL: usize = WIDTH * WIDTH + WIDTH;

struct Model {
    layers: Vec<Sharded<Linear>>,
    fsdp: Fsdp,
    optim: Adam,
}

impl Model {
    fn new(world: &ProcessGroup, config: FsdpConfig) -> Self {
        let units = WrapPolicy::RepeatedBlocks(vec!["layers".to_owned()]);
        let builder =
            FsdpBuilder::new(&mesh(world, config.strategy), FsdpConfig { units, ..config }).unwrap();
        let layer = |nth: usize| {
            let name = format!("layers.{nth}");
            let layer = linear(WIDTH, WIDTH, builder.var_builder().pp(&name)).unwrap();
            builder.wrap(&name, layer).unwrap()
        };
        let layers = (0..UNITS).map(layer).collect();
        let fsdp = builder.build().unwrap();
        let optim = Adam::new(&fsdp, AdamConfig::default()).unwrap();
        Self { layers, fsdp, optim }
    }

    fn step(&mut self, x: &Tensor) {
        let forward =
            || self.layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x))?.sqr()?.mean_all();
        let loss = self.fsdp.forward(&[x], forward).unwrap();
        self.fsdp.backward(&loss).unwrap();
        self.optim.step(&self.fsdp).unwrap();
    }

    /// Calls of one step on the shard group and on the replicate group.
    fn calls_of_a_step(&mut self, x: &Tensor) -> [Vec<CollectiveRecord>; 2] {
        // Two steps make the order of units known.
        (0..2).for_each(|_| self.step(x));
        let records = |fsdp: &Fsdp| {
            let mesh = fsdp.device_mesh();
            let (shard, replicate) = match (mesh.ndim(), fsdp.sharding_strategy()) {
                (2, _) => {
                    (mesh.group(1).unwrap().flight_record(), Some(mesh.group(0).unwrap().flight_record()))
                }
                (_, ShardingStrategy::NoShard) => (empty(), Some(mesh.group(0).unwrap().flight_record())),
                _ => (mesh.group(0).unwrap().flight_record(), None),
            };
            [shard, replicate.unwrap_or_else(empty)]
        };
        let before = records(&self.fsdp);
        self.step(x);
        let after = records(&self.fsdp);
        let news = |nth: usize| after[nth].collectives[before[nth].collectives.len()..].to_vec();
        [news(0), news(1)]
    }
}

fn empty() -> FlightRecord {
    ProcessGroup::single().flight_record()
}

fn calls(records: &[CollectiveRecord]) -> Vec<&str> {
    records.iter().map(|record| record.call.as_str()).collect()
}

#[test]
fn number_and_bytes_of_collectives_are_the_least_that_the_strategy_allows() {
    for strategy in STRATEGIES {
        for overlap in [Overlap::NONE, Overlap::default()] {
            ranks(4, |world| {
                let mut model = Model::new(&world, FsdpConfig { strategy, overlap, ..FsdpConfig::default() });
                let [shard, replicate] = model.calls_of_a_step(&tensor(&[2, WIDTH], 1));
                let n_shards = if matches!(strategy, ShardingStrategy::NoShard) {
                    1
                } else if model.fsdp.device_mesh().ndim() == 2 {
                    2
                } else {
                    4
                };
                let shard_bytes = NUMEL.div_ceil(n_shards) * 4;
                let gather = format!("all_gather(f32, {} bytes)", NUMEL * 4);
                let scatter = format!("reduce_scatter(sum, f32, {} bytes)", NUMEL * 4);
                let reduce = format!("all_reduce(sum, f32, {shard_bytes} bytes)");
                // The root has no parameters here; the last layer's are gathered once for forward and once for backward.
                let gathers = match strategy {
                    ShardingStrategy::FullShard | ShardingStrategy::HybridShard => 2 * UNITS,
                    ShardingStrategy::ShardGradOp | ShardingStrategy::HybridShardZero2 => UNITS,
                    ShardingStrategy::NoShard => 0,
                };
                let count = |records: &[CollectiveRecord], call: &str| {
                    calls(records).iter().filter(|c| **c == call).count()
                };
                let what = format!("{strategy:?} {overlap:?}: {:?} {:?}", calls(&shard), calls(&replicate));
                assert_eq!(count(&shard, &gather), gathers, "{what}");
                assert_eq!(count(&shard, &scatter), if n_shards > 1 { UNITS } else { 0 }, "{what}");
                assert_eq!(shard.len(), gathers + if n_shards > 1 { UNITS } else { 0 }, "{what}");
                let replicas = 4 / n_shards;
                assert_eq!(count(&replicate, &reduce), if replicas > 1 { UNITS } else { 0 }, "{what}");
                assert_eq!(replicate.len(), if replicas > 1 { UNITS } else { 0 }, "{what}");
            });
        }
    }
}

#[test]
fn half_precision_halves_the_bytes() {
    ranks(2, |world| {
        let half = candle_core::DType::F16;
        let mixed_precision = MixedPrecision { param_dtype: half, reduce_dtype: half, output_dtype: None };
        let mut model = Model::new(&world, FsdpConfig { mixed_precision, ..FsdpConfig::default() });
        let [shard, _] = model.calls_of_a_step(&tensor(&[2, WIDTH], 1).to_dtype(half).unwrap());
        let bytes = NUMEL * 2;
        let is_half = |call: &str| {
            call == format!("all_gather(f16, {bytes} bytes)")
                || call == format!("reduce_scatter(avg, f16, {bytes} bytes)")
        };
        assert_eq!(
            calls(&shard).iter().filter(|call| is_half(call)).count(),
            3 * UNITS,
            "{:?}",
            calls(&shard)
        );
    });
}

#[test]
fn prefetched_gathers_and_reductions_run_on_the_progress_thread() {
    ranks(2, |world| {
        let on_progress = |records: &[CollectiveRecord], name: &str| {
            records.iter().filter(|r| r.call.starts_with(name) && r.thread == "sconce-progress").count()
        };
        let mut model = Model::new(&world, FsdpConfig::default());
        let [shard, _] = model.calls_of_a_step(&tensor(&[2, WIDTH], 1));
        // In each direction all but the first unit are gathered ahead.
        let threads: Vec<&str> = shard.iter().map(|record| record.thread.as_str()).collect();
        assert!(on_progress(&shard, "all_gather") >= 2 * (UNITS - 1), "{threads:?}");
        assert_eq!(on_progress(&shard, "reduce_scatter"), UNITS);
        let mut model = Model::new(&world, FsdpConfig { overlap: Overlap::NONE, ..FsdpConfig::default() });
        let [shard, _] = model.calls_of_a_step(&tensor(&[2, WIDTH], 1));
        assert_eq!(on_progress(&shard, ""), 0);
    });
}

#[test]
fn overlap_changes_no_bit_of_the_weights() {
    ranks(3, |world| {
        let train = |overlap| {
            let mut model = Model::new(&world, FsdpConfig { overlap, ..FsdpConfig::default() });
            (0..4).for_each(|nth| model.step(&tensor(&[2, WIDTH], nth * 3 + world.rank().0)));
            common::full(&model.fsdp)
        };
        let deep = Overlap { forward_prefetch: 2, backward_prefetch: 3, reduce: true };
        let expected = train(Overlap::NONE);
        assert_eq!(train(Overlap::default()), expected);
        assert_eq!(train(deep), expected);
    });
}
