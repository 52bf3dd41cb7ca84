//! Placements, shard math, redistribute and the state dicts that fsdp and checkpoint share.

mod boxes;
#[cfg(feature = "candle")]
mod candle_bytes;
#[cfg(feature = "candle")]
mod candle_tensors;
#[cfg(feature = "candle")]
mod dtensor;
mod error;
mod local_tensor;
mod placement;
mod redistribute;
mod shard_math;
mod state_dict;
mod tensor_view;

pub use boxes::{CopyRun, TensorBox, copy_runs, run_boxes, uncovered};
#[cfg(feature = "candle")]
pub use candle_tensors::FlatTensor;
#[cfg(feature = "candle")]
pub use dtensor::{DTensor, DTensorSpec};
pub use error::{Error, Result};
pub use local_tensor::{LocalTensor, box_len_bytes};
pub use placement::Placement;
pub use redistribute::{Action, ExchangePlan, Move, Step, exchange, plan};
pub use sconce_mesh::DType;
pub use shard_math::{check_placements, chunk_range, local_box};
pub use state_dict::{Fqn, StateDict, Stateful, StatefulError, Value};
pub use tensor_view::{TensorBuf, TensorView, TensorViewMut};
