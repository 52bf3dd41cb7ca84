//! Fully sharded and hybrid sharded training of unmodified candle models.

mod builder;
mod cell;
mod error;
mod flat_param;
mod fsdp_model;
mod grad_sync;
mod init;
mod optim;
mod output;
mod shard;
mod shard_piece;
mod sharded;
mod state_dict;
mod strategy;
mod unit;

pub use builder::{FsdpBuilder, FsdpConfig};
pub use error::{Error, Result};
pub use flat_param::{FlatParameter, ParamLayout, ParamRun};
pub use fsdp_model::Fsdp;
pub use optim::{Adam, AdamConfig, Optimizer, Sgd, SgdConfig};
pub use output::UnitOutput;
pub use sharded::Sharded;
pub use state_dict::StateDictType;
pub use strategy::ShardingStrategy;
