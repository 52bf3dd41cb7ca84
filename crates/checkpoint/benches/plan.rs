//! Planning at 1,024 ranks, all simulated in this process: what a coordinator does between the ranks' messages, and what
//! one rank does to load. Prints one line a figure, judges nothing: `what TAB seconds TAB bytes`.
//!
//! `cargo xtask bench plan` sets the lines beside torch's for the same plans.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

use std::path::Path;
use std::time::Instant;

use sconce_checkpoint::{
    DefaultLoadPlanner, DefaultSavePlanner, FileMetadata, GlobalPlan, HeldTensor, LoadPlanner, Metadata,
    Node, SavePlan, SavePlanner, WritePlan, WrittenFile, WrittenItem,
};
use sconce_dtensor::{DType, LocalTensor, Result, StateDict, TensorBox};

const RANKS: usize = 1024;
const TENSORS: usize = 1000;
const SHAPE: [usize; 2] = [4096, 1024];

fn main() {
    let tensors: usize = std::env::var("SCONCE_BENCH_TENSORS").map_or(TENSORS, |n| n.parse().unwrap());
    let messages: Vec<Vec<u8>> = (0..RANKS).map(|rank| plan_of(rank, tensors).to_bytes().unwrap()).collect();
    let sent: usize = messages.iter().map(Vec::len).sum();
    let plans = timed("decode plans of all ranks", sent, || {
        messages.iter().map(|bytes| SavePlan::from_bytes(bytes).unwrap()).collect()
    });
    let global = timed("global plan", 0, || DefaultSavePlanner.global_plan(plans).unwrap());
    let GlobalPlan { layout, writes } = global;
    let written = writes.iter().map(written_by).collect();
    let metadata = timed("metadata", 0, || Metadata::located(layout, written).unwrap());
    let manifest = timed("write manifest", 0, || metadata.to_manifest().unwrap());
    println!("manifest\t0\t{}", manifest.len());
    drop((metadata, writes));
    let mut state = StateDict::new();
    for nth in 0..tensors {
        state.insert_tensor(name(nth), Shard(vec![shard(7)]));
    }
    timed("read manifest and plan a load", 0, || {
        let metadata = Metadata::from_manifest(Path::new("manifest"), &manifest).unwrap();
        let plan = DefaultLoadPlanner::default().local_plan(&state, &metadata).unwrap();
        assert_eq!(plan.items.len(), tensors);
    });
}

fn timed<R>(what: &str, bytes: usize, call: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let result = call();
    println!("{what}\t{}\t{bytes}", started.elapsed().as_secs_f64());
    result
}

fn name(nth: usize) -> String {
    format!("model.layers.{nth}.self_attn.q_proj.weight")
}

/// The rows of rank `rank`.
fn shard(rank: usize) -> TensorBox {
    let rows = SHAPE[0] / RANKS;
    TensorBox { offsets: vec![rank * rows, 0], sizes: vec![rows, SHAPE[1]] }
}

fn plan_of(rank: usize, tensors: usize) -> SavePlan {
    let held = |nth| HeldTensor {
        fqn: name(nth),
        dtype: DType::BF16,
        shape: SHAPE.to_vec(),
        boxes: vec![shard(rank)],
    };
    let tree = Node::Map((0..tensors).map(|nth| (name(nth), Node::Tensor)).collect());
    SavePlan { tree, tensors: (0..tensors).map(held).collect() }
}

/// The file that a rank would have written.
fn written_by(plan: &WritePlan) -> Vec<WrittenFile> {
    let len = (SHAPE[0] / RANKS * SHAPE[1] * 2) as u64;
    let items =
        (0..plan.items.len()).map(|item| WrittenItem { item, offset_bytes: 4096 + item as u64 * len });
    let len_bytes = 4096 + plan.items.len() as u64 * len;
    let block_crcs = Some(vec![0; len_bytes.div_ceil(sconce_checkpoint::BLOCK_BYTES) as usize]);
    let name = format!("shard-{:05}-model-00001-of-00001.safetensors", plan.writer + 1);
    vec![WrittenFile {
        file: FileMetadata { name, len_bytes, block_crcs },
        items: items.collect(),
        is_linked: false,
    }]
}

/// A shard without data: plans ask for no bytes.
struct Shard(Vec<TensorBox>);

impl LocalTensor for Shard {
    fn dtype(&self) -> DType {
        DType::BF16
    }
    fn global_shape(&self) -> &[usize] {
        &SHAPE
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.0
    }
    fn read_box(&self, _: usize, _: &mut dyn FnMut(&[u8])) -> Result<()> {
        Err(sconce_dtensor::Error::ReadOnly { what: "a shard without data".to_owned() })
    }
    fn write_box(&mut self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.read_box(0, &mut |_| ())
    }
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>> {
        Ok(Box::new(Shard(self.0.clone())))
    }
}
