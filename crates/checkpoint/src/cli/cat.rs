//! `cat`: the values of one tensor, and what they are like.

use sconce_dtensor::TensorBox;
use serde_json::json;

use super::Found;
use super::args::Cat;
use super::elements::{Element, numbers};
use super::inspect::{node_json, text};
use super::output::{Output, number, shape};
use super::pieces::Source;
use crate::metadata::TensorStorageMetadata;
use crate::{Error, Result};

const BINS: usize = 16;
const BAR_WIDTH: usize = 40;

pub(super) fn run(args: &Cat, out: &mut Output) -> Result<Found> {
    let source = Source::open(&args.path, args.values)?;
    if let Some(tensor) = source.metadata.tensor(&args.fqn) {
        return tensor_values(args, &source, tensor, out);
    }
    let leaves = source.metadata.tree.leaves();
    match leaves.iter().find(|(name, _)| *name == args.fqn) {
        Some((name, node)) => {
            out.object(&json!({ "value": name, "is": node_json(node) }));
            out.line(text(node));
            Ok(Found::Nothing)
        }
        None => Err(Error::KeyMismatch {
            path: args.path.clone(),
            missing: vec![args.fqn.clone()],
            unexpected: Vec::new(),
        }),
    }
}

/// What one pass over all elements tells.
#[derive(Debug, Default)]
struct Stats {
    count: usize,
    n_nan: usize,
    n_infinite: usize,
    min: f64,
    max: f64,
    mean: f64,
    /// Sum of squared distances from the mean, by Welford's update.
    spread: f64,
}

impl Stats {
    fn add(&mut self, number: f64) {
        self.n_nan += usize::from(number.is_nan());
        self.n_infinite += usize::from(number.is_infinite());
        if !number.is_finite() {
            return;
        }
        if self.count == 0 {
            (self.min, self.max) = (number, number);
        }
        self.count += 1;
        (self.min, self.max) = (self.min.min(number), self.max.max(number));
        let away = number - self.mean;
        self.mean += away / self.count as f64;
        self.spread += away * (number - self.mean);
    }

    fn deviation(&self) -> f64 {
        if self.count == 0 { 0.0 } else { (self.spread / self.count as f64).sqrt() }
    }
}

fn tensor_values(
    args: &Cat,
    source: &Source,
    tensor: &TensorStorageMetadata,
    out: &mut Output,
) -> Result<Found> {
    let whole = TensorBox::whole(&tensor.shape);
    let (mut stats, mut shown, mut at) = (Stats::default(), Vec::new(), 0usize);
    let range = args.start..args.start.saturating_add(args.number);
    source.read(tensor, &whole, 0..whole.numel(), &mut |bytes| {
        numbers(tensor.dtype, bytes, &mut |number| stats.add(number));
        for element in bytes.chunks_exact(tensor.dtype.size_bytes()) {
            if range.contains(&at) {
                shown.push(Element::of(tensor.dtype, element));
            }
            at += 1;
        }
    })?;
    let histogram = histogram(source, tensor, &stats)?;
    out.object(&json!({
        "tensor": tensor.fqn, "dtype": tensor.dtype.name(), "shape": tensor.shape, "numel": at, "nan": stats.n_nan,
        "infinite": stats.n_infinite, "min": stats.min, "max": stats.max, "mean": stats.mean, "std": stats.deviation(),
        "histogram": histogram, "start": args.start, "values": shown.iter().map(|element| element.json()).collect::<Vec<_>>(),
    }));
    out.line(format!("{}: {} {}, {at} elements", tensor.fqn, tensor.dtype, shape(&tensor.shape)));
    let [min, max, mean, std] = [stats.min, stats.max, stats.mean, stats.deviation()].map(number);
    if stats.count > 0 {
        out.line(format!("min {min}  max {max}  mean {mean}  std {std}"));
    }
    if stats.n_nan + stats.n_infinite > 0 {
        out.line(format!("nan {}  infinite {}", stats.n_nan, stats.n_infinite));
    }
    bars(&histogram, &stats, out);
    let width = tensor.shape.last().copied().unwrap_or(1).clamp(1, 8);
    for (row, values) in shown.chunks(width).enumerate() {
        let values: Vec<String> = values.iter().map(|value| format!("{:>12}", value.short())).collect();
        out.line(format!("{:>10}  {}", args.start + row * width, values.join(" ")));
    }
    Ok(Found::Nothing)
}

/// How many elements lie in each of equal steps between the least and the greatest.
fn histogram(source: &Source, tensor: &TensorStorageMetadata, stats: &Stats) -> Result<Vec<usize>> {
    let mut bins = vec![0; BINS];
    let width = (stats.max - stats.min) / BINS as f64;
    if stats.count == 0 || width <= 0.0 || !width.is_finite() {
        return Ok(Vec::new());
    }
    let whole = TensorBox::whole(&tensor.shape);
    source.read(tensor, &whole, 0..whole.numel(), &mut |bytes| {
        numbers(tensor.dtype, bytes, &mut |number| {
            if number.is_finite() {
                bins[(((number - stats.min) / width) as usize).min(BINS - 1)] += 1;
            }
        });
    })?;
    Ok(bins)
}

fn bars(histogram: &[usize], stats: &Stats, out: &mut Output) {
    let most = histogram.iter().copied().max().unwrap_or(0).max(1);
    let width = (stats.max - stats.min) / BINS as f64;
    for (nth, count) in histogram.iter().enumerate() {
        let bar = "█".repeat((count * BAR_WIDTH).div_ceil(most));
        let from = number(stats.min + nth as f64 * width);
        out.line(format!("{from:>12}  {bar:<BAR_WIDTH$}  {count}"));
    }
}
