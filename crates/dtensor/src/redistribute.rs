//! Redistribute: a DTensor under other placements, or on another mesh.

#[cfg(feature = "candle")]
mod between;
mod box_index;
mod carry;
mod exchange;
mod geometry;
#[cfg(feature = "cuda")]
mod on_cuda;
mod plan;
#[cfg(feature = "candle")]
mod plan_cache;
#[cfg(feature = "candle")]
mod reduce;
#[cfg(feature = "candle")]
mod run;
mod step;

#[cfg(feature = "candle")]
pub use between::redistribute_between;
pub use carry::{Move, exchange};
pub use exchange::ExchangePlan;
#[cfg(feature = "candle")]
pub(crate) use geometry::coordinate;
pub use plan::plan;
#[cfg(feature = "candle")]
pub(crate) use plan_cache::known_plan;
pub use step::{Action, Plan, Step};
