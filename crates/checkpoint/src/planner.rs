//! Planning, pure: what is saved by whom, and what a load reads from where.

mod dedup;
mod layout;
mod overlap;

pub(crate) use dedup::assign_writers;
pub(crate) use layout::{GlobalLayout, global_layout};
pub(crate) use overlap::{ReadPlan, plan_reads, touched_blocks};
