//! Process groups, collectives and device meshes: how the ranks of a world find each other and talk.

mod backend;
mod bootstrap;
mod collective;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device_mesh;
mod dtype;
mod env;
mod error;
mod flight_recorder;
#[cfg(feature = "candle")]
pub mod functional;
#[cfg(feature = "tcp-store")]
mod launcher;
mod layout;
mod process_group;
mod rank;
mod reduce_op;
mod spec;
mod store;
#[cfg(feature = "candle")]
mod tensor;
mod token;
mod work;

#[cfg(feature = "test-faults")]
#[doc(hidden)]
pub use backend::faulted::{FaultHook, FaultSite, set_fault_hook};
pub use backend::local::{copy_past_caches, prefer_huge_pages};
pub use device_mesh::{DeviceMesh, DeviceType};
pub use dtype::{DType, Element};
pub use env::RankEnv;
pub use error::{Error, Result};
pub use flight_recorder::{CollectiveRecord, CollectiveState, FlightRecord};
#[cfg(feature = "tcp-store")]
pub use launcher::{Node, RankExit, RankOutput, RankProcesses, die_with_parent, forget_parent};
pub use process_group::{GroupOptions, ProcessGroup};
pub use rank::{GroupRank, Rank};
pub use reduce_op::ReduceOp;
pub use spec::{BackendSpec, CpuBackend, CudaBackend};
pub use store::{FileStore, MemoryStore, Store};
#[cfg(feature = "tcp-store")]
pub use store::{TcpStore, TcpStoreServer};
#[cfg(feature = "candle")]
pub use tensor::{cpu_bytes, cpu_bytes_mut};
pub use work::Work;
