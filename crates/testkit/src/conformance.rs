//! What every implementation of a contract must do. A new one joins by one call from its tests.

mod carried;
mod process_group;

pub use process_group::{
    ODD_CALLS, process_group_abort, process_group_answers, process_group_answers_at, process_group_mismatch,
};
