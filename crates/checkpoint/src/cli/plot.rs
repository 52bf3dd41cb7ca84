//! `plot`: one page that shows which file holds which box of each tensor, and how large each module is. The page is
//! complete in itself: no script, no style, no picture comes from elsewhere.

mod names;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::json;

use self::names::{Group, alike, natural, without_numbers};
use super::Found;
use super::args::Plot;
use super::output::{Output, shape, size};
use super::pieces::Source;
use crate::metadata::{Metadata, TensorStorageMetadata};
use crate::{Error, Format, Result};

/// Tensors that are drawn: the largest.
const MAX_TENSORS: usize = 200;
/// Boxes that are drawn of one tensor, and of all together: a page of many megabytes opens slowly.
const MAX_BOXES: usize = 512;
const MAX_ALL_BOXES: usize = 16_000;
/// Files that are named.
const MAX_FILES: usize = 64;
const MODULES: usize = 24;

const STYLE: &str = "\
:root{color-scheme:light dark;--text:#1d2430;--dim:#667;--line:#d5dae3;--card:#f7f8fa;--page:#fff}\
@media(prefers-color-scheme:dark){:root{--text:#e7eaf0;--dim:#9aa3b2;--line:#3a4252;--card:#1d222c;--page:#14181f}}\
body{font:15px/1.45 system-ui,sans-serif;color:var(--text);background:var(--page);margin:2rem auto;max-width:1100px;padding:0 1rem}\
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .6rem}p{color:var(--dim);margin:.2rem 0 1rem}\
.files{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;font-size:.85rem}.files i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.4rem;vertical-align:-1px}\
.bar{display:grid;grid-template-columns:16rem 1fr 6rem;gap:.8rem;align-items:center;font-size:.85rem;margin:.15rem 0}.bar b{font-weight:400;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}\
.bar div{height:.8rem;border-radius:2px;background:#4477aa}.bar span{text-align:right;color:var(--dim)}\
.tensors{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:.8rem}\
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem}\
figcaption{font-size:.78rem;overflow-wrap:anywhere;margin-bottom:.4rem}figcaption span{color:var(--dim);display:block}\
svg{width:100%;height:110px;display:block}rect{stroke:var(--card);stroke-width:1px;vector-effect:non-scaling-stroke}";

pub(super) fn run(args: &Plot, out: &mut Output) -> Result<Found> {
    let format = Format::of(&args.path)?;
    let Source { metadata, .. } = Source::open(&args.path, args.values)?;
    let page = page(&args.path.display().to_string(), format, &metadata);
    std::fs::write(&args.output, page).map_err(|e| Error::io("write", &args.output, &e))?;
    out.object(&json!({ "page": args.output.display().to_string() }));
    out.line(format!("wrote {}", args.output.display()));
    Ok(Found::Nothing)
}

fn page(path: &str, format: Format, metadata: &Metadata) -> String {
    let files = Files::of(metadata);
    let mut tensors: Vec<&TensorStorageMetadata> = metadata.tensors.iter().collect();
    tensors.sort_by_cached_key(|tensor| (std::cmp::Reverse(bytes_of(tensor)), natural(&tensor.fqn)));
    let groups = alike(&tensors, &files);
    let shown = drawn(&groups);
    let mut html = String::from("<!doctype html><html lang=en><meta charset=utf-8>");
    let _ = write!(
        html,
        "<meta name=viewport content='width=device-width,initial-scale=1'><title>{path}</title><style>{STYLE}</style>\
         <h1>{path}</h1><p>{format}: {count} tensors, {bytes}, {n} files</p><h2>Files</h2><div class=files>{legend}</div>\
         <h2>Size by module</h2>{modules}<h2>Which file holds which box</h2>\
         <p>{which}; those that differ in a number only, and lie alike, are one picture. Rows go down, columns to the right; \
         further dims are left out. Point at a box for its place.</p>\
         <div class=tensors>",
        path = escape(path),
        format = format.name(),
        count = tensors.len(),
        bytes = size(metadata.tensor_bytes()),
        n = files.names.len(),
        legend = files.legend(),
        modules = modules(&tensors),
        which = if shown < groups.len() {
            format!("The {shown} largest of {} kinds", groups.len())
        } else {
            "All tensors, the largest first".to_owned()
        },
    );
    groups.iter().take(shown).for_each(|group| figure(&mut html, metadata, &files, group));
    html.push_str("</div></html>\n");
    html
}

/// How many of the groups, which are sorted by size, are drawn.
fn drawn(groups: &[Group<'_>]) -> usize {
    let mut boxes = 0;
    let fits = |group: &&Group<'_>| {
        boxes += group.first.chunks.len().min(MAX_BOXES);
        boxes <= MAX_ALL_BOXES
    };
    groups.iter().take(MAX_TENSORS).take_while(fits).count()
}

/// The rank that wrote a file, as its name says, by ours and torch's ways of naming.
fn rank_of(file: &str) -> Option<usize> {
    let number = |text: &str| text.parse::<usize>().ok();
    // Torch's items are files of their own, named after the file that they lie in.
    let file = file.split(['@', '#']).next().unwrap_or(file);
    if let Some(rest) = file.strip_prefix("shard-") {
        return number(rest.split('-').next()?)?.checked_sub(1);
    }
    number(file.strip_prefix("__")?.strip_suffix(".distcp")?.split('_').next()?)
}

/// The file, and the rank if it is known.
fn file_text(file: &str) -> String {
    match rank_of(file) {
        Some(rank) => format!("rank {rank} · {file}"),
        None => file.to_owned(),
    }
}

/// The files by the names that they have on disk, each with a colour.
struct Files {
    names: Vec<String>,
    bytes: Vec<u64>,
    /// By position in the metadata.
    of: Vec<usize>,
}

impl Files {
    fn of(metadata: &Metadata) -> Self {
        let on_disk = |name: &str| name.split(['@', '#']).next().unwrap_or(name).to_owned();
        let mut names: Vec<String> = metadata.files.iter().map(|file| on_disk(&file.name)).collect();
        names.sort_by_cached_key(|name| natural(name));
        names.dedup();
        let places: BTreeMap<&str, usize> =
            names.iter().enumerate().map(|(nth, name)| (name.as_str(), nth)).collect();
        let of: Vec<usize> = metadata.files.iter().map(|file| places[&*on_disk(&file.name)]).collect();
        let mut bytes = vec![0; names.len()];
        for tensor in &metadata.tensors {
            let of_chunk =
                |c: &crate::ChunkStorageMetadata| (c.bounds.numel() * tensor.dtype.size_bytes()) as u64;
            tensor.chunks.iter().for_each(|chunk| bytes[of[chunk.file]] += of_chunk(chunk));
        }
        Self { names, bytes, of }
    }

    /// Colours that differ as much as their number allows, by the golden angle.
    fn colour(nth: usize) -> String {
        format!("hsl({:.0} 55% {}%)", (210.0 + nth as f64 * 137.508) % 360.0, 45 + nth / 8 % 3 * 10)
    }

    fn legend(&self) -> String {
        let entry = |(nth, (name, bytes)): (usize, (&String, &u64))| {
            let colour = Self::colour(nth);
            let text = escape(&file_text(name));
            format!("<span><i style='background:{colour}'></i>{text} · {}</span>", size(*bytes))
        };
        let more = match self.names.len().saturating_sub(MAX_FILES) {
            0 => String::new(),
            more => format!("<span>and {more} more</span>"),
        };
        let named = self.names.iter().zip(&self.bytes).enumerate().take(MAX_FILES);
        named.map(entry).chain([more]).collect()
    }
}

/// Bars of the modules, the largest first; numbered ones are one bar where there are many.
fn modules(tensors: &[&TensorStorageMetadata]) -> String {
    let mut sizes = BTreeMap::<String, u64>::new();
    for tensor in tensors {
        let parts: Vec<&str> = tensor.fqn.split('.').collect();
        let depth = parts.len().saturating_sub(1).clamp(1, 3);
        *sizes.entry(parts[..depth].join(".")).or_default() += bytes_of(tensor);
    }
    if sizes.len() > MODULES {
        let mut folded = BTreeMap::<String, (u64, usize)>::new();
        for (name, bytes) in sizes {
            let entry = folded.entry(without_numbers(&name)).or_default();
            *entry = (entry.0 + bytes, entry.1 + 1);
        }
        let named = |(name, (bytes, count)): (String, (u64, usize))| {
            (if count > 1 { format!("{name} × {count}") } else { name }, bytes)
        };
        sizes = folded.into_iter().map(named).collect();
    }
    let mut sorted: Vec<(String, u64)> = sizes.into_iter().collect();
    sorted.sort_by_cached_key(|(name, bytes)| (std::cmp::Reverse(*bytes), natural(name)));
    let rest: u64 = sorted.iter().skip(MODULES).map(|(_, bytes)| bytes).sum();
    let more = sorted.len().saturating_sub(MODULES);
    sorted.truncate(MODULES);
    if more > 0 {
        sorted.push((format!("{more} others"), rest));
    }
    let most = sorted.iter().map(|(_, bytes)| *bytes).max().unwrap_or(1).max(1);
    let bar = |(name, bytes): &(String, u64)| {
        let (percent, name) = (*bytes as f64 / most as f64 * 100.0, escape(name));
        format!(
            "<div class=bar><b title='{name}'>{name}</b><div style='width:{percent:.2}%'></div><span>{}</span></div>",
            size(*bytes)
        )
    };
    sorted.iter().map(bar).collect()
}

/// One tensor: its first dim down, its last to the right.
fn figure(html: &mut String, metadata: &Metadata, files: &Files, group: &Group<'_>) {
    let Group { first: tensor, name, count } = group;
    let ndim = tensor.shape.len();
    let extent = |dim: Option<usize>| dim.map_or(1, |dim| tensor.shape[dim]).max(1);
    let (down, right) = (ndim.checked_sub(1).map(|_| 0), (ndim > 1).then(|| ndim - 1));
    let (height, width) = (extent(down), extent(right));
    let _ = write!(
        html,
        "<figure><figcaption>{}<span>{} {}, {}{}</span></figcaption><svg viewBox='0 0 {width} {height}' preserveAspectRatio=none>",
        // Long names break after their dots.
        escape(name).replace('.', ".<wbr>"),
        tensor.dtype,
        shape(&tensor.shape),
        size(bytes_of(tensor)),
        notes(tensor.chunks.len(), *count),
    );
    for chunk in tensor.chunks.iter().take(MAX_BOXES) {
        let span = |dim: Option<usize>| {
            dim.map_or((0, 1), |dim| (chunk.bounds.offsets[dim], chunk.bounds.sizes[dim]))
        };
        let ((y, h), (x, w)) = (span(down), span(right));
        let colour = Files::colour(files.of[chunk.file]);
        let place = format!("{} in {}", chunk.bounds, file_text(&metadata.files[chunk.file].name));
        let _ = write!(
            html,
            "<rect x='{x}' y='{y}' width='{w}' height='{h}' fill='{colour}'><title>{}</title></rect>",
            escape(&place)
        );
    }
    html.push_str("</svg></figure>");
}

fn notes(n_boxes: usize, n_alike: usize) -> String {
    let boxes = if n_boxes > MAX_BOXES { format!(", {MAX_BOXES} of {n_boxes} boxes") } else { String::new() };
    let alike = if n_alike > 1 { format!(" · {n_alike} alike") } else { String::new() };
    boxes + &alike
}

fn bytes_of(tensor: &TensorStorageMetadata) -> u64 {
    tensor.shape.iter().map(|n| *n as u64).product::<u64>() * tensor.dtype.size_bytes() as u64
}

/// Names are others' words: none becomes markup.
fn escape(text: &str) -> String {
    let entity = |c: char| match c {
        '&' => "&amp;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        '\'' => "&#39;".to_owned(),
        '"' => "&quot;".to_owned(),
        other => other.to_string(),
    };
    text.chars().map(entity).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_never_become_markup() {
        assert_eq!(escape("<script>'\"&"), "&lt;script&gt;&#39;&quot;&amp;");
    }

    #[test]
    fn ranks_are_read_from_the_names_of_files() {
        assert_eq!(rank_of("shard-00003-model-00001-of-00001.safetensors"), Some(2));
        assert_eq!(rank_of("__12_0.distcp@64#7"), Some(12));
        assert_eq!(rank_of("model-00001-of-00002.safetensors"), None);
    }
}
