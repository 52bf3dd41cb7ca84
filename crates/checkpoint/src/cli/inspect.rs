//! `inspect`: what a checkpoint holds, from its index alone.

use serde_json::json;

use super::Found;
use super::args::{Inspect, matches};
use super::output::{Output, count, shape, size};
use super::pieces::Source;
use crate::metadata::{Metadata, TensorStorageMetadata};
use crate::tree::{Node, child};
use crate::{Format, Result};

/// Lines of each kind that a person is shown who asked for no number.
const SHOWN: usize = 100;

pub(super) fn run(args: &Inspect, out: &mut Output) -> Result<Found> {
    let format = Format::of(&args.path)?;
    let Source { metadata, .. } = Source::open(&args.path, args.values)?;
    let is_shown = |fqn: &str| args.filter.as_ref().is_none_or(|filter| matches(filter, fqn));
    summary(args, format, &metadata, out);
    let limit = match args.limit {
        Some(0) => usize::MAX,
        None if out.is_json() => usize::MAX,
        limit => limit.unwrap_or(SHOWN),
    };
    if args.tree {
        tree(&metadata, &is_shown, limit, out);
        return Ok(Found::Nothing);
    }
    let shown: Vec<&TensorStorageMetadata> = metadata.tensors.iter().filter(|t| is_shown(&t.fqn)).collect();
    out.table(
        &["tensor", "dtype", "shape", "size", "chunks"],
        3,
        shown.iter().take(limit).map(|t| row(t)).collect(),
    );
    for tensor in shown.iter().take(limit) {
        out.object(&object(&metadata, tensor, args.chunks));
        if args.chunks {
            chunks(&metadata, tensor, out);
        }
    }
    if shown.len() > limit {
        out.line(format!("… and {} more tensors (--limit 0 shows all)", shown.len() - limit));
    }
    values(&metadata, &is_shown, limit, out);
    Ok(Found::Nothing)
}

fn values(metadata: &Metadata, is_shown: &dyn Fn(&str) -> bool, limit: usize, out: &mut Output) {
    let mut values = metadata.tree.leaves();
    values.retain(|(name, node)| **node != Node::Tensor && is_shown(name));
    let more = values.len().saturating_sub(limit);
    let mut rows = Vec::new();
    for (name, node) in values.into_iter().take(limit) {
        out.object(&json!({ "value": name, "is": node_json(node) }));
        rows.push(vec![name, text(node)]);
    }
    out.table(&["value", "is"], 2, rows);
    if more > 0 {
        out.line(format!("… and {more} more values (--limit 0 shows all)"));
    }
}

fn summary(args: &Inspect, format: Format, metadata: &Metadata, out: &mut Output) {
    let n_chunks: usize = metadata.tensors.iter().map(|t| t.chunks.len()).sum();
    let names: std::collections::BTreeSet<&str> =
        metadata.files.iter().map(|file| file.name.split('@').next().unwrap_or(&file.name)).collect();
    let has_checksums = metadata.files.iter().all(|file| file.block_crcs.is_some());
    out.object(&json!({
        "path": args.path.display().to_string(), "format": format.name(), "tensors": metadata.tensors.len(), "chunks": n_chunks,
        "bytes": metadata.tensor_bytes(), "files": names.len(), "checksums": has_checksums,
    }));
    let version =
        if format == Format::Sconce { format!(", format {}", crate::MAJOR_VERSION) } else { String::new() };
    out.line(format!("{}: {}{version}", args.path.display(), format.name()));
    let checksums = if has_checksums { "a checksum of every MiB" } else { "no block checksums" };
    let (tensors, chunks) = (count(metadata.tensors.len(), "tensor"), count(n_chunks, "chunk"));
    let (bytes, files) = (size(metadata.tensor_bytes()), count(names.len(), "file"));
    out.line(format!("{tensors} in {chunks}, {bytes} in {files}, {checksums}"));
}

fn bytes_of(tensor: &TensorStorageMetadata) -> u64 {
    tensor.shape.iter().map(|n| *n as u64).product::<u64>() * tensor.dtype.size_bytes() as u64
}

fn row(tensor: &TensorStorageMetadata) -> Vec<String> {
    let count = tensor.chunks.len().to_string();
    vec![tensor.fqn.clone(), tensor.dtype.to_string(), shape(&tensor.shape), size(bytes_of(tensor)), count]
}

fn object(metadata: &Metadata, tensor: &TensorStorageMetadata, with_chunks: bool) -> serde_json::Value {
    let mut object = json!({
        "tensor": tensor.fqn, "dtype": tensor.dtype.name(), "shape": tensor.shape, "bytes": bytes_of(tensor),
        "chunks": tensor.chunks.len(),
    });
    if with_chunks {
        let chunk = |c: &crate::ChunkStorageMetadata| {
            let (file, offset_bytes) = place(&metadata.files[c.file].name, c.offset_bytes);
            json!({ "offsets": c.bounds.offsets, "sizes": c.bounds.sizes, "file": file,
                "offset_bytes": offset_bytes })
        };
        object["chunks"] = tensor.chunks.iter().map(chunk).collect();
    }
    object
}

fn chunks(metadata: &Metadata, tensor: &TensorStorageMetadata, out: &mut Output) {
    out.line(format!("\n{}", tensor.fqn));
    for chunk in &tensor.chunks {
        let end: Vec<usize> =
            chunk.bounds.offsets.iter().zip(&chunk.bounds.sizes).map(|(o, s)| o + s).collect();
        let (file, byte) = place(&metadata.files[chunk.file].name, chunk.offset_bytes);
        out.line(format!("  {:?} to {end:?}  {file}, byte {byte}", chunk.bounds.offsets));
    }
}

/// The file on disk, and where in it. Items of torch's archives are files of their own to us, `FILE@BYTE#NUMBER`, and lie
/// somewhere behind that byte.
fn place(name: &str, offset_bytes: u64) -> (&str, u64) {
    match name.split_once('@') {
        Some((file, rest)) => {
            let start: u64 = rest.split('#').next().and_then(|start| start.parse().ok()).unwrap_or(0);
            (file, start + offset_bytes)
        }
        None => (name.split('#').next().unwrap_or(name), offset_bytes),
    }
}

/// The nesting with the size of everything below each name.
fn tree(metadata: &Metadata, is_shown: &dyn Fn(&str) -> bool, limit: usize, out: &mut Output) {
    let mut lines = Vec::new();
    branch(metadata, &metadata.tree, "", 0, is_shown, &mut lines);
    let more = lines.len().saturating_sub(limit);
    lines.into_iter().take(limit).for_each(|(name, line)| {
        out.object(&json!({ "name": name, "line": line.trim_start() }));
        out.line(line);
    });
    if more > 0 {
        out.line(format!("… and {more} more lines (--limit 0 shows all)"));
    }
}

/// Appends the lines of what a node holds, and returns its bytes.
fn branch(
    metadata: &Metadata,
    node: &Node,
    at: &str,
    depth: usize,
    is_shown: &dyn Fn(&str) -> bool,
    lines: &mut Vec<(String, String)>,
) -> u64 {
    let named: Vec<(String, &Node)> = match node {
        Node::Map(entries) => entries.iter().map(|(key, node)| (key.clone(), node)).collect(),
        Node::List(items) => items.iter().enumerate().map(|(nth, node)| (nth.to_string(), node)).collect(),
        _ => Vec::new(),
    };
    let mut total = 0;
    for (key, node) in named {
        let name = child(at, &key);
        let indent = "  ".repeat(depth);
        let place = lines.len();
        match node {
            Node::Map(_) | Node::List(_) => {
                let bytes = branch(metadata, node, &name, depth + 1, is_shown, lines);
                total += bytes;
                if lines.len() > place {
                    let kind = if matches!(node, Node::List(_)) { "[]" } else { "" };
                    lines.insert(place, (name, format!("{indent}{key}{kind}  {}", size(bytes))));
                }
            }
            _ if !is_shown(&name) => {}
            Node::Tensor => {
                if let Some(tensor) = metadata.tensor(&name) {
                    total += bytes_of(tensor);
                    let what =
                        format!("{} {}  {}", tensor.dtype, shape(&tensor.shape), size(bytes_of(tensor)));
                    lines.push((name, format!("{indent}{key}  {what}")));
                }
            }
            plain => lines.push((name, format!("{indent}{key} = {}", text(plain)))),
        }
    }
    total
}

/// A plain value for people.
pub(super) fn text(node: &Node) -> String {
    match node {
        Node::Bytes(bytes) => format!("{} bytes", bytes.len()),
        node => node_json(node).to_string(),
    }
}

pub(super) fn node_json(node: &Node) -> serde_json::Value {
    match node {
        Node::Int(int) => json!(int),
        Node::Float(bits) => {
            let float = f64::from_bits(*bits);
            if float.is_finite() { json!(float) } else { json!(float.to_string()) }
        }
        Node::Bool(truth) => json!(truth),
        Node::Str(text) => json!(text),
        Node::Bytes(bytes) => json!(bytes),
        Node::None => json!(null),
        Node::Tensor => json!("tensor"),
        Node::Map(entries) => entries.iter().map(|(key, node)| (key.clone(), node_json(node))).collect(),
        Node::List(items) => items.iter().map(node_json).collect(),
    }
}
