//! `diff`: how two checkpoints of any formats differ.

use std::collections::BTreeMap;

use sconce_dtensor::{DType, TensorBox};
use serde_json::json;

use super::Found;
use super::args::Diff;
use super::elements::Element;
use super::inspect::text;
use super::output::{Output, shape};
use super::pieces::Source;
use crate::Result;
use crate::metadata::TensorStorageMetadata;
use crate::read::Verified;
use crate::tree::Node;

/// Compared at a time: 4 MiB of elements of each side.
const BAND_ELEMENTS: usize = 1 << 19;

pub(super) fn run(args: &Diff, out: &mut Output) -> Result<Found> {
    let (a, b) = (Source::open(&args.a, args.values)?, Source::open(&args.b, args.values)?);
    let bar = out.progress(a.metadata.tensor_bytes(), "comparing");
    let mut rows = Vec::new();
    let mut n_equal = 0;
    for name in names(&a, &b) {
        let difference = match (find(&a, name), find(&b, name)) {
            (Some(_), None) => Some("only in the first".to_owned()),
            (None, Some(_)) => Some("only in the second".to_owned()),
            (Some(one), Some(other)) => compare(args, &a, one, &b, other, &bar)?,
            (None, None) => None,
        };
        match difference {
            None => n_equal += 1,
            Some(what) => {
                out.object(&json!({ "fqn": name, "difference": what }));
                rows.push(vec![name.to_owned(), what]);
            }
        }
    }
    for (name, what) in values(&a.metadata.tree, &b.metadata.tree) {
        out.object(&json!({ "fqn": name, "difference": what }));
        rows.push(vec![name, what]);
    }
    bar.finish_and_clear();
    let differing = rows.len();
    out.table(&["name", "difference"], 2, rows);
    out.object(&json!({ "equal_tensors": n_equal, "differences": differing }));
    out.line(format!("{n_equal} tensors are equal, {differing} names differ"));
    Ok(if differing == 0 { Found::Nothing } else { Found::Something })
}

fn names<'s>(a: &'s Source, b: &'s Source) -> std::collections::BTreeSet<&'s str> {
    a.metadata.tensors.iter().chain(&b.metadata.tensors).map(|tensor| &*tensor.fqn).collect()
}

fn find<'s>(source: &'s Source, name: &str) -> Option<&'s TensorStorageMetadata> {
    source.metadata.tensor(name)
}

fn compare(
    args: &Diff,
    a: &Source,
    one: &TensorStorageMetadata,
    b: &Source,
    other: &TensorStorageMetadata,
    bar: &indicatif::ProgressBar,
) -> Result<Option<String>> {
    if one.shape != other.shape {
        return Ok(Some(format!("shape {} and {}", shape(&one.shape), shape(&other.shape))));
    }
    if one.dtype != other.dtype {
        return Ok(Some(format!("dtype {} and {}", one.dtype, other.dtype)));
    }
    if args.structure {
        return Ok(None);
    }
    let mut found = Differences::new(one.dtype);
    let (one_open, other_open) = (a.tensor(one)?, b.tensor(other)?);
    let (mut one_reader, mut other_reader) =
        (one_open.reader(Verified::default()), other_open.reader(Verified::default()));
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for band in bands(&one.shape) {
        let len = band.numel() * one.dtype.size_bytes();
        left.resize(len, 0);
        right.resize(len, 0);
        one_reader.read(&band, &mut left)?;
        other_reader.read(&band, &mut right)?;
        bar.inc(left.len() as u64);
        found.add(&left, &right);
    }
    Ok(found.told(&one.shape, args.tolerance))
}

/// Boxes of rows that together are the tensor, each of bounded size; rows that are larger are cut further.
fn bands(shape: &[usize]) -> Vec<TensorBox> {
    let numel: usize = shape.iter().product();
    let mut bands = Vec::new();
    for start in (0..numel).step_by(BAND_ELEMENTS) {
        bands.extend(sconce_dtensor::run_boxes(shape, start, BAND_ELEMENTS.min(numel - start)));
    }
    bands
}

struct Differences {
    dtype: DType,
    seen: usize,
    count: usize,
    max_abs: f64,
    first: Option<(usize, Element, Element)>,
}

impl Differences {
    fn new(dtype: DType) -> Self {
        Self { dtype, seen: 0, count: 0, max_abs: 0.0, first: None }
    }

    fn add(&mut self, left: &[u8], right: &[u8]) {
        let size = self.dtype.size_bytes();
        let at = self.seen;
        self.seen += left.len() / size;
        if left == right {
            return;
        }
        for (nth, (bytes, others)) in left.chunks_exact(size).zip(right.chunks_exact(size)).enumerate() {
            if bytes != others {
                let (x, y) = (Element::of(self.dtype, bytes), Element::of(self.dtype, others));
                self.count += 1;
                self.max_abs = self.max_abs.max(x.distance(y));
                self.first.get_or_insert((at + nth, x, y));
            }
        }
    }

    fn told(&self, shape: &[usize], tolerance: f64) -> Option<String> {
        let (at, x, y) = self.first?;
        if tolerance > 0.0 && self.max_abs <= tolerance {
            return None;
        }
        let (mut left, mut index) = (at, vec![0; shape.len()]);
        for dim in (0..shape.len()).rev() {
            index[dim] = left % shape[dim];
            left /= shape[dim];
        }
        Some(format!(
            "{} of {} differ, at most by {:e}; first at {index:?}: {x} and {y}",
            self.count, self.seen, self.max_abs
        ))
    }
}

/// Plain values that differ, by name.
fn values(a: &Node, b: &Node) -> Vec<(String, String)> {
    let of = |node| -> BTreeMap<String, &Node> {
        Node::leaves(node).into_iter().filter(|(_, leaf)| **leaf != Node::Tensor).collect()
    };
    let (a, b) = (of(a), of(b));
    let all: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let told = |name: &&String| match (a.get(*name), b.get(*name)) {
        (Some(one), Some(other)) if one == other => None,
        (Some(one), Some(other)) => Some(format!("{} and {}", text(one), text(other))),
        (Some(_), None) => Some("only in the first".to_owned()),
        _ => Some("only in the second".to_owned()),
    };
    all.into_iter().filter_map(|name| told(&name).map(|what| (name.clone(), what))).collect()
}
