//! Placements, shard math, redistribute and the state dicts that fsdp and checkpoint share.

mod boxes;
mod error;
mod local_tensor;
mod state_dict;
mod tensor_view;

pub use boxes::{CopyRun, TensorBox, copy_runs, run_boxes, uncovered};
pub use error::{Error, Result};
pub use local_tensor::{LocalTensor, box_len_bytes};
pub use sconce_mesh::DType;
pub use state_dict::{Fqn, StateDict, Value};
pub use tensor_view::{TensorBuf, TensorView, TensorViewMut};
