//! Planning: what is saved by whom, and what a load reads. The traits; their defaults are below, and pure.
//!
//! A planner decides which boxes move; how their bytes are read or written is storage's. To change bytes on the way
//! (another dtype, compression in memory), wrap the tensor: whatever implements
//! [`LocalTensor`](sconce_dtensor::LocalTensor) can be saved and loaded.

mod dedup;
mod default;
mod layout;
mod overlap;
#[cfg(test)]
mod tests;

use sconce_dtensor::StateDict;

pub(crate) use layout::check_disjoint;

pub use default::{DefaultLoadPlanner, DefaultSavePlanner};

use crate::Result;
use crate::metadata::Metadata;
use crate::plan::{GlobalPlan, LoadPlan, SavePlan, WritePlan};

/// Plans a save.
///
/// Calls come in this order, each once a save:
/// 1. `local_plan` on every rank;
/// 2. `global_plan` on the coordinator (the group's first rank), with the local plans by group rank;
/// 3. `finish_plan` on every rank, with the rank's own part.
///
/// An error of any call ends the save on every rank with the same error, and nothing is written before step 3.
///
/// # Source
/// `torch.distributed.checkpoint.planner.SavePlanner`. Its `resolve_data` is a wrapped tensor here.
pub trait SavePlanner {
    /// What this rank offers.
    fn local_plan(&mut self, state: &StateDict<'_>) -> Result<SavePlan> {
        SavePlan::of(state)
    }

    /// Who writes what.
    fn global_plan(&mut self, plans: Vec<SavePlan>) -> Result<GlobalPlan>;

    /// The last word on what this rank writes.
    fn finish_plan(&mut self, plan: WritePlan) -> Result<WritePlan> {
        Ok(plan)
    }
}

/// Plans a load.
///
/// `local_plan` is called once on every rank, after the metadata were read and before any file is opened. It needs no
/// gather: what a rank reads follows from what it wants and from the metadata.
///
/// # Source
/// `torch.distributed.checkpoint.planner.LoadPlanner`. Its `create_global_plan` returns the plans as they are in every
/// planner of torch; `resolve_tensor` and `commit_tensor` are a wrapped tensor here.
pub trait LoadPlanner {
    /// What this rank reads.
    fn local_plan(&mut self, state: &StateDict<'_>, metadata: &Metadata) -> Result<LoadPlan>;
}
