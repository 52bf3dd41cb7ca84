//! What each rank offers to save and is told to write. Values that cross ranks; no tensor, no file.

use sconce_dtensor::{DType, StateDict, TensorBox};
use serde::{Deserialize, Serialize};

use crate::tree::Node;
use crate::{Error, Result};

/// What one rank holds: the local plan of a save.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LocalPlan {
    pub(crate) tree: Node,
    pub(crate) tensors: Vec<HeldTensor>,
}

/// A tensor of which a rank holds boxes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HeldTensor {
    pub(crate) fqn: String,
    /// Position in [`DType::ALL`].
    dtype: u8,
    pub(crate) shape: Vec<usize>,
    /// Offsets and sizes of each box.
    boxes: Vec<(Vec<usize>, Vec<usize>)>,
}

/// Which of its boxes a rank writes: the rank's part of the global plan of a save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WritePlan {
    /// Position of the rank among those that save.
    pub(crate) writer: usize,
    pub(crate) items: Vec<WriteItem>,
}

/// One box to write.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct WriteItem {
    pub(crate) fqn: String,
    /// Position among the boxes that the rank holds of the tensor.
    pub(crate) index: usize,
}

/// What a rank wrote.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct WrittenFile {
    pub(crate) name: String,
    pub(crate) len_bytes: u64,
    pub(crate) block_crcs: Vec<u32>,
    pub(crate) chunks: Vec<WrittenChunk>,
}

/// Where one box lies.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct WrittenChunk {
    pub(crate) item: WriteItem,
    pub(crate) offset_bytes: u64,
}

impl LocalPlan {
    pub(crate) fn of(state: &StateDict<'_>) -> Result<LocalPlan> {
        let flat = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let held = flat.iter().map(|(fqn, tensor)| HeldTensor {
            fqn: fqn.0.clone(),
            dtype: tensor.dtype() as u8,
            shape: tensor.global_shape().to_vec(),
            boxes: tensor.local_boxes().iter().map(|b| (b.offsets.clone(), b.sizes.clone())).collect(),
        });
        Ok(LocalPlan { tree: Node::of(state), tensors: held.collect() })
    }
}

impl HeldTensor {
    pub(crate) fn dtype(&self) -> Result<DType> {
        let known = DType::ALL.into_iter().find(|dtype| *dtype as u8 == self.dtype);
        known.ok_or_else(|| Error::Tensor {
            fqn: self.fqn.clone(),
            cause: format!("a rank of another version sent dtype number {}", self.dtype),
        })
    }

    pub(crate) fn boxes(&self) -> impl Iterator<Item = TensorBox> {
        self.boxes.iter().map(|(offsets, sizes)| TensorBox { offsets: offsets.clone(), sizes: sizes.clone() })
    }
}
