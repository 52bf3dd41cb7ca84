//! Distributed checkpoints: all ranks save together, any other layout loads, and what is loaded is what was saved, bit
//! for bit, or an error says where it is not.

mod any;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod coordinate;
mod damage;
mod error;
mod format;
#[cfg(all(feature = "torch", any(fuzzing, test)))]
#[doc(hidden)]
pub mod fuzz;
pub mod hf;
mod load;
mod metadata;
#[cfg(feature = "object-store")]
pub mod object;
mod plan;
mod planner;
mod read;
mod region;
mod save;
mod save_cache;
mod saver;
mod series;
mod staging;
mod stateful;
mod storage;
mod threads;
#[cfg(feature = "torch")]
pub mod torch;
mod tree;
mod verify;
#[cfg(feature = "mmap")]
mod view;
mod wire;

pub use any::{Format, open};
pub use damage::{Damage, DamageReport, find_damage};
pub use error::{Error, ObjectFailure, RankFailure, Result};
pub use format::{MAJOR_VERSION, MANIFEST_NAME};
pub use load::{
    LoadOptions, Verify, load, load_by, load_from, load_new, load_new_from, load_with, read_metadata,
};
pub use metadata::{BLOCK_BYTES, ChunkStorageMetadata, FileMetadata, Metadata, TensorStorageMetadata};
pub use plan::{
    ChunkLayout, GlobalPlan, HeldTensor, Layout, LoadPlan, LoadReport, ReadItem, SavePlan, TensorLayout,
    WriteItem, WritePlan, WrittenFile, WrittenItem,
};
pub use planner::{DefaultLoadPlanner, DefaultSavePlanner, LoadPlanner, SavePlanner};
pub use save::{SaveOptions, SaveReport, save, save_to, save_with};
pub use saver::Saver;
pub use series::{Best, Order, Preemption, Resumed, Retention, Series, SeriesOptions, SeriesReport, Skipped};
pub use stateful::{load_parts, save_parts};
pub use storage::{
    Access, DataFile, FileSystemReader, FileSystemWriter, LocalFile, StorageReader, StorageWriter,
};
pub use tree::Node;
pub use verify::{VerifyReport, verify, verify_from};
#[cfg(feature = "mmap")]
pub use view::{MappedCheckpoint, MappedTensor};

// What state is made of, so that a trainer needs no other crate of Sconce.
pub use sconce_dtensor::{
    DType, Fqn, LocalTensor, StateDict, Stateful, StatefulError, TensorBox, TensorBuf, TensorView,
    TensorViewMut, Value,
};
