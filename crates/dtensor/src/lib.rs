//! Placements, shard math, redistribute and the state dicts that fsdp and checkpoint share.

#![forbid(unsafe_code)]

#[cfg(feature = "candle")]
mod agree;
mod boxes;
#[cfg(feature = "candle")]
mod candle_bytes;
#[cfg(feature = "candle")]
mod candle_tensors;
#[cfg(feature = "candle")]
mod compare;
#[cfg(feature = "candle")]
mod create;
#[cfg(feature = "candle")]
mod dtensor;
mod error;
#[cfg(feature = "candle")]
mod grad;
mod local_tensor;
#[cfg(feature = "candle")]
mod ops;
mod ordered_map;
mod placement;
#[cfg(feature = "candle")]
mod random;
mod redistribute;
mod shard_math;
#[cfg(feature = "candle")]
mod spec;
mod state_dict;
mod tensor_view;

pub use boxes::{CopyRun, CopyRuns, TensorBox, copy_runs, run_boxes, uncovered};
#[cfg(feature = "candle")]
pub use candle_tensors::FlatTensor;
#[cfg(feature = "candle")]
pub use dtensor::DTensor;
pub use error::{Error, Result};
pub use local_tensor::{LocalTensor, box_len_bytes};
#[cfg(feature = "candle")]
pub use ops::local_map;
pub use ordered_map::OrderedMap;
pub use placement::{Placement, normalize_placements};
#[cfg(feature = "candle")]
pub use redistribute::redistribute_between;
pub use redistribute::{Action, ExchangePlan, Move, Plan, Step, exchange, plan};
pub use sconce_mesh::DType;
pub use shard_math::{chunk_range, local_box};
#[cfg(feature = "candle")]
pub use spec::DTensorSpec;
pub use state_dict::{Fqn, StateDict, Stateful, StatefulError, Value};
pub use tensor_view::{TensorBuf, TensorView, TensorViewMut};
