//! ReduceOp: how a collective combines the ranks' values.

use std::fmt;

/// How values of several ranks become one.
///
/// The order of reduction is the order of group ranks, so every rank gets the same bits.
///
/// # Source
/// `torch.distributed.ReduceOp`. `Avg` of integers divides towards zero, as torch's gloo backend does not
/// offer it at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ReduceOp {
    /// Sum; integers wrap.
    Sum,
    /// Sum divided by the group size.
    Avg,
    /// Smallest value; a NaN on any rank gives NaN.
    Min,
    /// Largest value; a NaN on any rank gives NaN.
    Max,
    /// Product; integers wrap.
    Prod,
}

impl ReduceOp {
    /// Lower-case name, as in error messages.
    pub const fn name(self) -> &'static str {
        match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Avg => "avg",
            ReduceOp::Min => "min",
            ReduceOp::Max => "max",
            ReduceOp::Prod => "prod",
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
