//! Checks of a collective's arguments. Pure; each failure is an `InvalidArgument`.

use crate::{Error, GroupRank, Result};

pub(super) fn invalid(op: &'static str, what: &str, expected: String, got: impl ToString) -> Error {
    Error::InvalidArgument { op, what: what.into(), expected, got: got.to_string() }
}

/// `None` as expected length stands for one that does not fit `usize`.
fn text(expected: Option<usize>) -> String {
    expected.map_or("more than memory can hold".into(), |expected| expected.to_string())
}

/// Checks a length in elements.
pub(super) fn len_is(op: &'static str, what: &str, expected: Option<usize>, got: usize) -> Result<()> {
    if expected == Some(got) {
        return Ok(());
    }
    Err(invalid(op, what, text(expected), got))
}

/// Checks that a length in elements is not exceeded.
pub(super) fn at_most(op: &'static str, what: &str, limit: Option<usize>, got: usize) -> Result<()> {
    if limit.is_none_or(|limit| got <= limit) {
        return Ok(());
    }
    Err(invalid(op, what, format!("at most {}", text(limit)), got))
}

/// Checks that there is one count a rank.
pub(super) fn n_counts(op: &'static str, what: &str, group_size: usize, got: usize) -> Result<()> {
    if group_size == got {
        return Ok(());
    }
    Err(invalid(op, what, format!("one a rank, {group_size}"), got))
}

/// Checks that the group has this rank.
pub(crate) fn in_group(op: &'static str, root: GroupRank, group_size: usize) -> Result<()> {
    if root.0 < group_size {
        return Ok(());
    }
    Err(invalid(op, "root", format!("a group rank below {group_size}"), root))
}

/// Sum of counts, unless it overflows.
pub(super) fn total(counts: &[usize]) -> Option<usize> {
    counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count))
}
