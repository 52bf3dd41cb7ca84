//! Process groups, collectives and device meshes: how the ranks of a world find each other and talk.

mod backend;
mod collective;
mod device_mesh;
mod dtype;
mod error;
mod layout;
mod process_group;
mod rank;
mod reduce_op;
mod store;
#[cfg(feature = "candle")]
mod tensor;

pub use device_mesh::{DeviceMesh, DeviceType};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use process_group::{GroupOptions, ProcessGroup};
pub use rank::{GroupRank, Rank};
pub use reduce_op::ReduceOp;
pub use store::Store;
#[cfg(feature = "candle")]
pub use tensor::{cpu_bytes, cpu_bytes_mut};
