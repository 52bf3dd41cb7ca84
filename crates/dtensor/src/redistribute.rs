//! Redistribute: a DTensor under other placements, or on another mesh of the same ranks.

mod exchange;
mod plan;
#[cfg(feature = "candle")]
mod run;

pub use exchange::{ExchangePlan, Move, exchange};
#[cfg(feature = "candle")]
pub(crate) use plan::coordinate;
pub use plan::{Action, Step, plan};
