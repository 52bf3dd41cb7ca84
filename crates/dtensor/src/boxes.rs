//! Boxes of a tensor: the one geometry that redistribute, flat shards and checkpoint plans share.
//! Pure: no tensor, no group, no file.
//!
//! ```text
//!   shape [4, 6], box offsets [1, 2] sizes [2, 3]      run of 9 elements from element 4
//!
//!      . . . . . .                                        . . . . x x     box [0,4] [1,2]
//!      . . x x x .                                        x x x x x x     box [1,0] [1,6]
//!      . . x x x .                                        x . . . . .     box [2,0] [1,1]
//!      . . . . . .                                        . . . . . .
//! ```

use std::fmt;

/// An axis-aligned part of a tensor, in elements of the global tensor.
///
/// # Source
/// `ChunkStorageMetadata` of `torch.distributed.checkpoint.metadata` (offsets, sizes).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorBox {
    /// First index along each dim.
    pub offsets: Vec<usize>,
    /// Length along each dim; as long as `offsets`.
    pub sizes: Vec<usize>,
}

impl TensorBox {
    /// The box that is the whole of a tensor.
    pub fn whole(shape: &[usize]) -> Self {
        Self { offsets: vec![0; shape.len()], sizes: shape.to_vec() }
    }

    /// Number of elements: 1 for a 0-d tensor.
    pub fn numel(&self) -> usize {
        self.sizes.iter().product()
    }

    /// True if some size is 0.
    pub fn is_empty(&self) -> bool {
        self.sizes.contains(&0)
    }

    /// What both boxes hold; `None` if that is nothing.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let ends = |b: &Self| b.offsets.iter().zip(&b.sizes).map(|(o, s)| o + s).collect::<Vec<_>>();
        let (end_a, end_b) = (ends(self), ends(other));
        let offsets: Vec<usize> = self.offsets.iter().zip(&other.offsets).map(|(a, b)| *a.max(b)).collect();
        let sizes =
            offsets.iter().zip(end_a.iter().zip(&end_b)).map(|(o, (a, b))| a.min(b).saturating_sub(*o));
        let both = Self { sizes: sizes.collect(), offsets };
        (!both.is_empty()).then_some(both)
    }

    /// Number of elements that both boxes hold.
    pub(crate) fn overlap_numel(&self, other: &Self) -> usize {
        let dims = self.offsets.iter().zip(&self.sizes).zip(other.offsets.iter().zip(&other.sizes));
        dims.map(|((a, len_a), (b, len_b))| (a + len_a).min(b + len_b).saturating_sub(*a.max(b))).product()
    }

    /// True if every element of `other` lies in this box; an empty box lies in every box.
    pub fn contains(&self, other: &Self) -> bool {
        other.is_empty() || self.intersect(other).as_ref() == Some(other)
    }

    /// True if the box lies inside a tensor of `shape` and has as many dims; sums that overflow do not.
    pub fn fits(&self, shape: &[usize]) -> bool {
        self.offsets.len() == shape.len()
            && self.sizes.len() == shape.len()
            && (self.offsets.iter().zip(&self.sizes).zip(shape))
                .all(|((o, s), n)| o.checked_add(*s).is_some_and(|end| end <= *n))
    }

    /// This box without `other`: at most 2·ndim disjoint boxes.
    pub fn subtract(&self, other: &Self) -> Vec<Self> {
        let Some(cut) = self.intersect(other) else {
            return if self.is_empty() { vec![] } else { vec![self.clone()] };
        };
        let mut rest = self.clone();
        let mut parts = Vec::new();
        for dim in 0..self.sizes.len() {
            let (lo, hi) = (cut.offsets[dim], cut.offsets[dim] + cut.sizes[dim]);
            let (start, end) = (rest.offsets[dim], rest.offsets[dim] + rest.sizes[dim]);
            for (from, to) in [(start, lo), (hi, end)] {
                if from < to {
                    parts.push(rest.with_range(dim, from, to));
                }
            }
            rest = rest.with_range(dim, lo, hi);
        }
        parts
    }

    fn with_range(&self, dim: usize, from: usize, to: usize) -> Self {
        let mut part = self.clone();
        part.offsets[dim] = from;
        part.sizes[dim] = to - from;
        part
    }
}

impl fmt::Display for TensorBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:?}", self.offsets, self.sizes)
    }
}

/// Parts of `wanted` that none of `held` covers; empty when it is covered.
pub fn uncovered(wanted: &TensorBox, held: &[TensorBox]) -> Vec<TensorBox> {
    uncovered_by(wanted, held.iter())
}

/// [`uncovered`] of boxes that do not lie side by side.
pub(crate) fn uncovered_by<'a>(
    wanted: &TensorBox,
    held: impl Iterator<Item = &'a TensorBox>,
) -> Vec<TensorBox> {
    let mut left = if wanted.is_empty() { vec![] } else { vec![wanted.clone()] };
    for piece in held {
        if left.is_empty() {
            break;
        }
        left = left.iter().flat_map(|part| part.subtract(piece)).collect();
    }
    left
}

/// The contiguous run of `len` elements from element `start` of a row-major tensor, as boxes in row-major
/// order: at most 2·ndim − 1 of them, none empty.
pub fn run_boxes(shape: &[usize], start: usize, len: usize) -> Vec<TensorBox> {
    let mut boxes = Vec::new();
    if len > 0 {
        push_run(shape, &mut Vec::with_capacity(shape.len()), start, len, &mut boxes);
    }
    boxes
}

/// `prefix` is the index along the dims that are already fixed.
fn push_run(shape: &[usize], prefix: &mut Vec<usize>, start: usize, len: usize, boxes: &mut Vec<TensorBox>) {
    let dim = prefix.len();
    if dim == shape.len() {
        boxes.push(TensorBox { offsets: prefix.clone(), sizes: vec![1; dim] });
        return;
    }
    let row: usize = shape[dim + 1..].iter().product();
    let (mut at, end) = (start, start + len);
    while at < end {
        let (index, inside) = (at / row, at % row);
        let full_rows = (end - at) / row;
        let step = if inside == 0 && full_rows > 0 {
            boxes.push(rows_box(shape, prefix, index, full_rows));
            full_rows * row
        } else {
            let part = (row - inside).min(end - at);
            prefix.push(index);
            push_run(shape, prefix, inside, part, boxes);
            prefix.pop();
            part
        };
        at += step;
    }
}

fn rows_box(shape: &[usize], prefix: &[usize], index: usize, rows: usize) -> TensorBox {
    let (dim, inner) = (prefix.len(), &shape[prefix.len() + 1..]);
    let mut offsets = prefix.to_vec();
    offsets.push(index);
    offsets.resize(shape.len(), 0);
    let mut sizes = vec![1; dim];
    sizes.push(rows);
    sizes.extend_from_slice(inner);
    TensorBox { offsets, sizes }
}

/// One contiguous piece of a copy between two boxes, each stored row-major on its own. In elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyRun {
    /// First element inside the source box.
    pub src: usize,
    /// First element inside the destination box.
    pub dst: usize,
    /// Number of elements.
    pub len: usize,
}

/// The longest contiguous runs that move `overlap` from `src` to `dst`, in row-major order.
///
/// `overlap` lies in both boxes (`src.intersect(dst)`); runs are merged over every trailing dim that all
/// three boxes share whole, so equal boxes give one run.
pub fn copy_runs(
    overlap: &TensorBox,
    src: &TensorBox,
    dst: &TensorBox,
) -> impl Iterator<Item = CopyRun> + use<> {
    let runs = CopyRuns::new(overlap, src, dst);
    (0..runs.count).map(move |nth| runs.run(nth))
}

/// What [`copy_runs`] goes through, each run to be had by its number: all are equally long, and both their beginnings
/// only grow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyRuns {
    /// Sizes of the dims that are gone through, and the strides of both boxes along them.
    outer: Vec<(usize, usize, usize)>,
    src_base: usize,
    dst_base: usize,
    len: usize,
    count: usize,
}

impl CopyRuns {
    /// The runs that move `overlap`, which lies in both boxes.
    pub fn new(overlap: &TensorBox, src: &TensorBox, dst: &TensorBox) -> Self {
        let ndim = overlap.sizes.len();
        let (mut split, mut len) = (ndim, 1);
        while split > 0 {
            split -= 1;
            len *= overlap.sizes[split];
            if overlap.sizes[split] != src.sizes[split] || overlap.sizes[split] != dst.sizes[split] {
                break;
            }
        }
        let (src_base, src_strides) = base_and_strides(overlap, src);
        let (dst_base, dst_strides) = base_and_strides(overlap, dst);
        let strides = src_strides.into_iter().zip(dst_strides);
        let outer = overlap.sizes[..split].iter().zip(strides).map(|(size, (src, dst))| (*size, src, dst));
        let outer: Vec<_> = outer.collect();
        let count = if len == 0 { 0 } else { outer.iter().map(|(size, ..)| size).product() };
        Self { outer, src_base, dst_base, len, count }
    }

    /// Number of runs.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Elements of each run.
    pub fn run_len(&self) -> usize {
        self.len
    }

    /// The run at a position below [`CopyRuns::count`].
    pub fn run(&self, nth: usize) -> CopyRun {
        let (mut left, mut src, mut dst) = (nth, self.src_base, self.dst_base);
        for (size, src_stride, dst_stride) in self.outer.iter().rev() {
            let index = left % size;
            left /= size;
            src += index * src_stride;
            dst += index * dst_stride;
        }
        CopyRun { src, dst, len: self.len }
    }
}

/// Where `part` begins inside `whole`, and the row-major strides of `whole`.
fn base_and_strides(part: &TensorBox, whole: &TensorBox) -> (usize, Vec<usize>) {
    let mut strides = vec![1; whole.sizes.len()];
    for dim in (1..strides.len()).rev() {
        strides[dim - 1] = strides[dim] * whole.sizes[dim];
    }
    let offsets = part.offsets.iter().zip(&whole.offsets).zip(&strides);
    (offsets.map(|((p, w), stride)| (p - w) * stride).sum(), strides)
}

#[cfg(test)]
mod tests;
