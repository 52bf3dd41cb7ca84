//! The global layout of a save: what all ranks together hold, checked for agreement and coverage.

use std::collections::BTreeMap;

use sconce_dtensor::{DType, TensorBox, uncovered};

use crate::plan::LocalPlan;
use crate::tree::Node;
use crate::{Error, Result};

/// What all ranks together hold.
#[derive(Debug)]
pub(crate) struct GlobalLayout {
    pub(crate) tree: Node,
    /// By name.
    pub(crate) tensors: BTreeMap<String, GlobalTensor>,
}

/// A tensor and who holds which part of it.
#[derive(Debug)]
pub(crate) struct GlobalTensor {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Each non-empty box once, with every rank that holds it and its position there.
    pub(crate) boxes: BTreeMap<TensorBox, Vec<Holder>>,
}

/// A rank that holds a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) rank: usize,
    pub(crate) index: usize,
}

/// Merges what the ranks hold.
///
/// # Errors
/// `ValueMismatch`, `ShapeMismatch` and `DTypeMismatch` where ranks disagree, `Uncovered` and `Overlap` where their
/// boxes are not exactly the tensor.
pub(crate) fn global_layout(plans: Vec<LocalPlan>) -> Result<GlobalLayout> {
    let mut tensors = BTreeMap::<String, GlobalTensor>::new();
    let mut tree = Node::Map(Vec::new());
    for (rank, plan) in plans.into_iter().enumerate() {
        for held in &plan.tensors {
            let new = || GlobalTensor { dtype: DType::U8, shape: held.shape.clone(), boxes: BTreeMap::new() };
            let is_new = !tensors.contains_key(&held.fqn);
            let tensor = tensors.entry(held.fqn.clone()).or_insert_with(new);
            if is_new {
                tensor.dtype = held.dtype()?;
            }
            agree(&held.fqn, tensor, held.dtype()?, &held.shape)?;
            for (index, part) in held.boxes().enumerate().filter(|(_, part)| !part.is_empty()) {
                tensor.boxes.entry(part).or_default().push(Holder { rank, index });
            }
        }
        tree = tree.merge(plan.tree, "")?;
    }
    tensors.iter().try_for_each(|(fqn, tensor)| check_coverage(fqn, tensor))?;
    Ok(GlobalLayout { tree, tensors })
}

fn agree(fqn: &str, tensor: &GlobalTensor, dtype: DType, shape: &[usize]) -> Result<()> {
    if tensor.dtype != dtype {
        return Err(Error::dtypes(fqn, tensor.dtype, dtype));
    }
    if tensor.shape != shape {
        let (expected, got) = (tensor.shape.clone(), shape.to_vec());
        return Err(Error::ShapeMismatch { fqn: fqn.to_owned(), expected, got });
    }
    Ok(())
}

/// Refuses boxes that are not exactly the tensor.
///
/// Boxes come sorted by their first offset, so that each is compared only with those that its rows may meet.
fn check_coverage(fqn: &str, tensor: &GlobalTensor) -> Result<()> {
    let mut open: Vec<&TensorBox> = Vec::new();
    for part in tensor.boxes.keys() {
        if !part.fits(&tensor.shape) {
            let (expected, got) = (tensor.shape.clone(), part.sizes.clone());
            return Err(Error::ShapeMismatch { fqn: fqn.to_owned(), expected, got });
        }
        let start = part.offsets.first().copied().unwrap_or(0);
        open.retain(|other| {
            other.offsets.first().zip(other.sizes.first()).is_none_or(|(o, s)| o + s > start)
        });
        if let Some(other) = open.iter().find(|other| other.intersect(part).is_some()) {
            let (first, second) = (other.to_string(), part.to_string());
            return Err(Error::Overlap { fqn: fqn.to_owned(), first, second });
        }
        open.push(part);
    }
    let whole = TensorBox::whole(&tensor.shape);
    if tensor.boxes.keys().map(TensorBox::numel).sum::<usize>() == whole.numel() {
        return Ok(());
    }
    let boxes: Vec<TensorBox> = tensor.boxes.keys().cloned().collect();
    let missing = uncovered(&whole, &boxes).first().map(TensorBox::to_string).unwrap_or_default();
    Err(Error::Uncovered { fqn: fqn.to_owned(), shape: tensor.shape.clone(), missing })
}
