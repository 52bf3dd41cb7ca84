//! `convert` and `reshard`: a checkpoint becomes another, in constant memory, and is published at the end.

use std::path::Path;
use std::time::Instant;

use sconce_dtensor::{StateDict, TensorBox, Value, chunk_range};
use serde_json::json;

use super::Found;
use super::args::{Convert, Reshard, To};
use super::output::{Output, count, rate};
use super::pieces::{Lazy, Source};
use crate::metadata::TensorStorageMetadata;
use crate::plan::{GlobalPlan, SavePlan};
use crate::storage::StorageWriter;
use crate::storage::place::Place;
use crate::tree::{Node, child};
use crate::{
    DefaultSavePlanner, Error, FileSystemWriter, Format, Result, SavePlanner as _, SaveReport, hf, torch,
};

pub(super) fn convert(args: &Convert, out: &mut Output) -> Result<Found> {
    let source = Source::open(&args.from, args.values)?;
    let mut writer = writer(args.to, &args.to_path, args.max_shard_bytes);
    write(&source, 1, writer.as_mut(), &args.to_path, out)
}

pub(super) fn reshard(args: &Reshard, out: &mut Output) -> Result<Found> {
    let source = Source::open(&args.from, args.values)?;
    let to = match (args.to, Format::of(&args.from)?) {
        (Some(to), _) => to,
        (None, Format::TorchDcp | Format::TorchSave) => To::Torch,
        // Safetensors of several ranks are what our own format is made of.
        (None, Format::Sconce | Format::Safetensors) => To::Sconce,
    };
    let mut writer = writer(to, &args.to_path, u64::MAX);
    write(&source, args.world as usize, writer.as_mut(), &args.to_path, out)
}

fn writer(to: To, path: &Path, max_shard_bytes: u64) -> Box<dyn StorageWriter> {
    match to {
        To::Sconce => Box::new(FileSystemWriter::new(path, false, true)),
        To::Torch => Box::new(torch::Writer::new(path)),
        To::Safetensors => Box::new(hf::Writer::with_max_shard_bytes(path, max_shard_bytes)),
    }
}

/// The protocol of a save with all ranks in this process, one after the other.
fn write(
    source: &Source,
    world: usize,
    writer: &mut dyn StorageWriter,
    to: &Path,
    out: &mut Output,
) -> Result<Found> {
    let bar = out.progress(source.metadata.tensor_bytes(), "writing");
    let started = Instant::now();
    let state = |rank| Rank { source, rank, world, progress: &bar }.state(&source.metadata.tree);
    let plan = |rank| {
        let plan = SavePlan::of(&state(rank)?)?;
        // The first rank's tree names everything: held once, however many ranks there are.
        Ok(if rank == 0 { plan } else { SavePlan { tree: Node::Map(Vec::new()), ..plan } })
    };
    let plans = (0..world).map(plan).collect::<Result<_>>()?;
    let GlobalPlan { layout, writes } = DefaultSavePlanner.global_plan(plans)?;
    let place = Place::by_turns(&writer.prepare(&layout)?);
    let written = place.and_then(|place| {
        let write = |(rank, plan)| writer.write(&place, plan, &state(rank)?);
        writes.iter().enumerate().map(write).collect()
    });
    let outcome = written.and_then(|written| writer.finish(layout, written));
    bar.finish_and_clear();
    let SaveReport { data_bytes, n_files, .. } = outcome.inspect_err(|_| writer.discard())?;
    let took = started.elapsed();
    out.object(&json!({ "path": to.display().to_string(), "bytes": data_bytes, "files": n_files, "seconds": took.as_secs_f64() }));
    out.line(format!("{}: {}, {}", to.display(), count(n_files, "file"), rate(data_bytes, took)));
    Ok(Found::Nothing)
}

/// One of the ranks that are to have saved.
struct Rank<'s> {
    source: &'s Source,
    rank: usize,
    world: usize,
    progress: &'s indicatif::ProgressBar,
}

impl<'s> Rank<'s> {
    fn state(&self, tree: &Node) -> Result<StateDict<'s>> {
        let Node::Map(entries) = tree else { return Ok(StateDict::new()) };
        self.map(entries, "")
    }

    fn map(&self, entries: &[(String, Node)], at: &str) -> Result<StateDict<'s>> {
        let mut state = StateDict::new();
        for (key, node) in entries {
            state.insert(key.clone(), self.value(node, &child(at, key))?);
        }
        Ok(state)
    }

    fn value(&self, node: &Node, at: &str) -> Result<Value<'s>> {
        Ok(match node {
            Node::Map(entries) => Value::Map(self.map(entries, at)?),
            Node::List(items) => {
                let item = |(nth, node): (usize, &Node)| self.value(node, &child(at, &nth.to_string()));
                Value::List(items.iter().enumerate().map(item).collect::<Result<_>>()?)
            }
            Node::Tensor => {
                let saved = self.source.metadata.tensor(at).ok_or_else(|| Error::ValueMismatch {
                    fqn: at.to_owned(),
                    expected: "a tensor".to_owned(),
                    got: "no such tensor in the index".to_owned(),
                })?;
                let (source, progress) = (self.source, self.progress);
                Value::Tensor(Box::new(Lazy { source, saved, boxes: self.boxes(saved), progress }))
            }
            plain => plain.plain_value().unwrap_or(Value::None),
        })
    }

    /// `Shard(0)` as torch cuts it; what cannot be cut is the first rank's.
    fn boxes(&self, saved: &TensorStorageMetadata) -> Vec<TensorBox> {
        let mut bounds = TensorBox::whole(&saved.shape);
        if let Some(first) = saved.shape.first() {
            let range = chunk_range(*first, self.world, self.rank);
            (bounds.offsets[0], bounds.sizes[0]) = (range.start, range.len());
        }
        let is_mine = if saved.shape.is_empty() { self.rank == 0 } else { !bounds.is_empty() };
        if is_mine { vec![bounds] } else { Vec::new() }
    }
}
