//! What each rank offers to save, is told to write, and reads. Values that cross ranks; no tensor, no file.

use sconce_dtensor::{DType, StateDict, TensorBox};
use serde::{Deserialize, Serialize};

use crate::coordinate::Message;
use crate::metadata::FileMetadata;
use crate::tree::Node;
use crate::{Error, Result};

/// What one rank holds: the local plan of a save.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavePlan {
    /// Nesting and plain values of its state.
    pub tree: Node,
    /// Its tensors, each name once.
    pub tensors: Vec<HeldTensor>,
}

/// A tensor of which a rank holds boxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldTensor {
    /// Flattened name.
    pub fqn: String,
    /// Element type.
    pub dtype: DType,
    /// Global shape.
    pub shape: Vec<usize>,
    /// The boxes held, in the order of [`LocalTensor::local_boxes`](sconce_dtensor::LocalTensor::local_boxes).
    pub boxes: Vec<TensorBox>,
}

/// The global plan of a save: who writes what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalPlan {
    /// What all ranks together save.
    pub layout: Layout,
    /// What each rank writes, by group rank.
    pub writes: Vec<WritePlan>,
}

/// What all ranks together save: a checkpoint's metadata before it is known where the bytes lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Nesting and plain values.
    pub tree: Node,
    /// Tensors, sorted by name.
    pub tensors: Vec<TensorLayout>,
}

/// A tensor and who writes which part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorLayout {
    /// Flattened name.
    pub fqn: String,
    /// Element type.
    pub dtype: DType,
    /// Global shape.
    pub shape: Vec<usize>,
    /// Its parts: none empty, disjoint, together the whole tensor.
    pub chunks: Vec<ChunkLayout>,
}

/// A part of a tensor and who writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkLayout {
    /// The part, in elements of the global tensor.
    pub bounds: TensorBox,
    /// Group rank of the writer.
    pub writer: usize,
    /// Position in the writer's [`WritePlan::items`].
    pub item: usize,
}

/// Which of its boxes a rank writes: the rank's part of the global plan of a save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritePlan {
    /// Group rank of the writer.
    pub writer: usize,
    /// The boxes.
    pub items: Vec<WriteItem>,
}

/// One box to write.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WriteItem {
    /// The tensor.
    pub fqn: String,
    /// Position among the boxes that the rank holds of the tensor.
    pub index: usize,
}

/// A data file that a rank wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenFile {
    /// The file.
    pub file: FileMetadata,
    /// What lies in it.
    pub items: Vec<WrittenItem>,
    /// Whether it is a file of an earlier checkpoint, of which nothing had changed.
    pub is_linked: bool,
}

/// Where one box lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenItem {
    /// Position in the writer's [`WritePlan::items`].
    pub item: usize,
    /// Where its bytes begin in the file.
    pub offset_bytes: u64,
}

/// What one rank reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadPlan {
    /// Parts of tensors.
    pub items: Vec<ReadItem>,
    /// Plain values that replace those of the state, by the state's flattened names.
    pub values: Vec<(String, Node)>,
    /// Names that are left alone.
    pub report: LoadReport,
}

/// A part of a saved chunk and the box of the state that it goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadItem {
    /// The tensor's name in the state.
    pub fqn: String,
    /// Position among the boxes that the state holds of the tensor.
    pub index: usize,
    /// The tensor's position in [`Metadata::tensors`](crate::Metadata::tensors).
    pub saved: usize,
    /// Position among the saved tensor's chunks.
    pub chunk: usize,
    /// What is read: a part of the chunk and of the box, in elements of the global tensor.
    pub part: TensorBox,
}

/// What a load left alone; all empty if it was strict and complete.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadReport {
    /// Names that the state has and the checkpoint lacks.
    pub missing: Vec<String>,
    /// Names that the checkpoint has and the state lacks.
    pub unexpected: Vec<String>,
    /// Names of tensors of which the checkpoint holds only a part, that was loaded.
    pub partial: Vec<String>,
}

impl SavePlan {
    /// All that `state` holds.
    ///
    /// # Errors
    /// `Tensor` if two of its values have the same flattened name.
    pub fn of(state: &StateDict<'_>) -> Result<SavePlan> {
        let flat = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let held = flat.iter().map(|(fqn, tensor)| HeldTensor {
            fqn: fqn.0.clone(),
            dtype: tensor.dtype(),
            shape: tensor.global_shape().to_vec(),
            boxes: tensor.local_boxes().to_vec(),
        });
        Ok(SavePlan { tree: Node::of(state), tensors: held.collect() })
    }

    /// The plan as it travels to the coordinator, which is of the same version: no format of files.
    ///
    /// # Errors
    /// `ValueMismatch` for what cannot travel.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.encode()
    }

    /// The plan that a rank sent.
    ///
    /// # Errors
    /// `ValueMismatch` for bytes of another kind.
    pub fn from_bytes(bytes: &[u8]) -> Result<SavePlan> {
        Self::decode(bytes)
    }
}
