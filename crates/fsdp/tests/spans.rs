//! The spans of `tracing`: each unit's forward and backward on the thread that computes, collectives beside them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::io::Write;
use std::sync::{Arc, Mutex};

use candle_nn::{Module, linear};
use common::{mesh, ranks, tensor};
use sconce_fsdp::{FsdpBuilder, FsdpConfig, ShardingStrategy, WrapPolicy};
use serde_json::Value;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

const RANKS: usize = 2;
const STEPS: usize = 3;

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn train() {
    ranks(RANKS, |world| {
        let strategy = ShardingStrategy::FullShard;
        let units = WrapPolicy::RepeatedBlocks(vec!["layers".to_owned()]);
        let config = FsdpConfig { strategy, units, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(&mesh(&world, strategy), config).unwrap();
        let layer = |nth: usize| {
            let name = format!("layers.{nth}");
            builder.wrap(&name, linear(8, 8, builder.var_builder().pp(&name)).unwrap()).unwrap()
        };
        let layers: Vec<_> = (0..2).map(layer).collect();
        let fsdp = builder.build().unwrap();
        for _ in 0..STEPS {
            let x = tensor(&[2, 8], 1);
            let forward = || layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x))?.sum_all();
            fsdp.backward(&fsdp.forward(&[&x], forward).unwrap()).unwrap();
        }
    });
}

#[test]
fn a_timeline_shows_units_and_the_collectives_beside_them() {
    let written = Written::default();
    let (layer, guard) =
        tracing_chrome::ChromeLayerBuilder::new().writer(written.clone()).include_args(true).build();
    tracing_subscriber::registry().with(layer).init();
    train();
    drop(guard);
    let events: Vec<Value> = serde_json::from_slice(&written.0.lock().unwrap()).unwrap();
    let begun =
        |name: &str| events.iter().filter(|e| e["ph"] == "B" && e["name"] == name).collect::<Vec<_>>();
    let threads = |events: &[&Value]| events.iter().map(|e| e["tid"].clone()).collect::<Vec<_>>();
    for name in ["forward", "backward"] {
        let spans = begun(name);
        for unit in ["layers.0", "layers.1"] {
            let of_unit = spans.iter().filter(|e| e["args"]["unit"].as_str().unwrap().contains(unit)).count();
            assert_eq!(of_unit, RANKS * STEPS, "{name} of {unit}");
        }
        let ended = events.iter().filter(|e| e["ph"] == "E" && e["name"] == name).count();
        assert_eq!(ended, spans.len(), "{name}");
    }
    // Reductions run on the progress thread.
    let computing = threads(&begun("forward"));
    let reductions = begun("collective");
    let reductions: Vec<&Value> =
        reductions.into_iter().filter(|e| e["args"].to_string().contains("reduce_scatter")).collect();
    assert_eq!(reductions.len(), RANKS * STEPS * 2);
    assert!(threads(&reductions).iter().all(|thread| !computing.contains(thread)));
}
