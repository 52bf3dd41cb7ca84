//! What all ranks together hold, checked for agreement and coverage.

use std::collections::HashMap;

use sconce_dtensor::{DType, TensorBox, uncovered};

use crate::plan::{HeldTensor, SavePlan};
use crate::tree::Node;
use crate::{Error, Result};

/// What all ranks together hold.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) tree: Node,
    /// Sorted by name.
    pub(super) tensors: Vec<Shared>,
}

/// A tensor and who holds which part of it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) fqn: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    /// Each non-empty box once, in order.
    pub(super) boxes: Vec<(TensorBox, Vec<Holder>)>,
}

/// A rank that holds a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) rank: usize,
    /// The box's position there.
    pub(super) index: usize,
}

/// Merges what the ranks hold.
///
/// # Errors
/// `ValueMismatch`, `ShapeMismatch` and `DTypeMismatch` where ranks disagree, and `ShapeMismatch` for a box outside its
/// tensor.
pub(super) fn merge(plans: Vec<SavePlan>) -> Result<Held> {
    let mut merged = Merged::default();
    let mut tree = Node::Map(Vec::new());
    for (rank, plan) in plans.into_iter().enumerate() {
        for (nth, held) in plan.tensors.into_iter().enumerate() {
            merged.push(rank, nth, held)?;
        }
        tree = tree.merge(plan.tree, "")?;
    }
    let mut tensors: Vec<Shared> = merged.tensors.into_iter().map(Tensor::share).collect();
    tensors.sort_unstable_by(|a, b| a.fqn.cmp(&b.fqn));
    Ok(Held { tree, tensors })
}

#[derive(Default)]
struct Merged {
    by_name: HashMap<String, usize>,
    tensors: Vec<Tensor>,
}

/// A tensor while its holders are collected.
struct Tensor {
    fqn: String,
    dtype: DType,
    shape: Vec<usize>,
    boxes: Vec<(TensorBox, Holder)>,
}

impl Merged {
    fn push(&mut self, rank: usize, nth: usize, held: HeldTensor) -> Result<()> {
        let HeldTensor { fqn, dtype, shape, boxes } = held;
        // Most ranks have the same tensors in the same order: one comparison instead of a hash.
        let known = match self.tensors.get(nth).is_some_and(|tensor| tensor.fqn == fqn) {
            true => Some(nth),
            false => self.by_name.get(&fqn).copied(),
        };
        let tensor = if let Some(at) = known {
            self.tensors[at].agree(dtype, &shape)?;
            &mut self.tensors[at]
        } else {
            self.by_name.insert(fqn.clone(), self.tensors.len());
            self.tensors.push(Tensor { fqn, dtype, shape, boxes: Vec::new() });
            let last = self.tensors.len() - 1;
            &mut self.tensors[last]
        };
        for (index, part) in boxes.into_iter().enumerate() {
            if !part.fits(&tensor.shape) {
                let (expected, got) = (tensor.shape.clone(), part.sizes);
                return Err(Error::ShapeMismatch { fqn: tensor.fqn.clone(), expected, got });
            }
            if !part.is_empty() {
                tensor.boxes.push((part, Holder { rank, index }));
            }
        }
        Ok(())
    }
}

impl Tensor {
    fn agree(&self, dtype: DType, shape: &[usize]) -> Result<()> {
        if self.dtype != dtype {
            return Err(Error::dtypes(&self.fqn, self.dtype, dtype));
        }
        if self.shape != shape {
            let (expected, got) = (self.shape.clone(), shape.to_vec());
            return Err(Error::ShapeMismatch { fqn: self.fqn.clone(), expected, got });
        }
        Ok(())
    }

    /// Equal boxes become one with several holders.
    fn share(mut self) -> Shared {
        // Stable, so that holders stay in the order of their ranks.
        self.boxes.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut boxes: Vec<(TensorBox, Vec<Holder>)> = Vec::with_capacity(self.boxes.len());
        for (part, holder) in self.boxes {
            match boxes.last_mut() {
                Some((last, holders)) if *last == part => holders.push(holder),
                _ => boxes.push((part, vec![holder])),
            }
        }
        Shared { fqn: self.fqn, dtype: self.dtype, shape: self.shape, boxes }
    }
}

/// Refuses boxes that are not exactly the tensor.
pub(super) fn check_coverage(tensor: &Shared) -> Result<()> {
    let boxes: Vec<&TensorBox> = tensor.boxes.iter().map(|(part, _)| part).collect();
    if let Some((first, second)) = first_overlap(&boxes) {
        let (first, second) = (first.to_string(), second.to_string());
        return Err(Error::Overlap { fqn: tensor.fqn.clone(), first, second });
    }
    let whole = TensorBox::whole(&tensor.shape);
    if boxes.iter().map(|part| part.numel()).sum::<usize>() == whole.numel() {
        return Ok(());
    }
    let boxes: Vec<TensorBox> = boxes.into_iter().cloned().collect();
    let missing = uncovered(&whole, &boxes).first().map(TensorBox::to_string).unwrap_or_default();
    Err(Error::Uncovered { fqn: tensor.fqn.clone(), shape: tensor.shape.clone(), missing })
}

/// Refuses boxes that share an element.
pub(crate) fn check_disjoint(fqn: &str, boxes: &[&TensorBox]) -> Result<()> {
    match first_overlap(boxes) {
        None => Ok(()),
        Some((first, second)) => {
            let (first, second) = (first.to_string(), second.to_string());
            Err(Error::Overlap { fqn: fqn.to_owned(), first, second })
        }
    }
}

/// Two of the boxes that share an element.
///
/// A sweep along the dim in which most boxes begin at different places, so that each box is compared with few.
///
/// # Source
/// `_check_box_overlap` and its sweep line in `torch/distributed/checkpoint/default_planner.py`.
pub(super) fn first_overlap<'b>(boxes: &[&'b TensorBox]) -> Option<(&'b TensorBox, &'b TensorBox)> {
    let ndim = boxes.first().map_or(0, |part| part.offsets.len());
    let Some(dim) = (0..ndim).max_by_key(|dim| (distinct_starts(boxes, *dim), ndim - dim)) else {
        // 0-d: any two are the same element.
        return boxes.first().zip(boxes.get(1)).map(|(a, b)| (*a, *b));
    };
    let mut sorted = boxes.to_vec();
    sorted.sort_by_key(|part| part.offsets[dim]);
    let mut open: Vec<&TensorBox> = Vec::new();
    for part in sorted {
        open.retain(|other| other.offsets[dim] + other.sizes[dim] > part.offsets[dim]);
        if let Some(other) = open.iter().find(|other| meet(other, part)) {
            return Some((other, part));
        }
        open.push(part);
    }
    None
}

fn distinct_starts(boxes: &[&TensorBox], dim: usize) -> usize {
    let mut starts: Vec<usize> = boxes.iter().map(|part| part.offsets[dim]).collect();
    starts.sort_unstable();
    starts.dedup();
    starts.len()
}

/// Whether two boxes share an element; allocates nothing, unlike [`TensorBox::intersect`].
pub(super) fn meet(a: &TensorBox, b: &TensorBox) -> bool {
    let spans = a.offsets.iter().zip(&a.sizes).zip(b.offsets.iter().zip(&b.sizes));
    spans.into_iter().all(|((a, a_len), (b, b_len))| a.max(b) < &(a + a_len).min(b + b_len))
}
