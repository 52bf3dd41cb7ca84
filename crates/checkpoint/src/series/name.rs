//! Names of the directories of a series. Pure.

use crate::storage::commit::STAGING_SUFFIX;
use crate::storage::remove::aside_of;

const PREFIX: &str = "step-";

/// `step-000100`: names sort as their steps do, up to 999,999.
pub(super) fn of_step(step: u64) -> String {
    format!("{PREFIX}{step:06}")
}

/// The step of a checkpoint's name; `None` for any other name, so that each step has one name only.
pub(super) fn to_step(name: &str) -> Option<u64> {
    let step = name.strip_prefix(PREFIX)?.parse().ok()?;
    (of_step(step) == name).then_some(step)
}

/// Whether the name is that of a checkpoint being written or removed.
pub(super) fn is_temporary(name: &str) -> bool {
    name.strip_suffix(STAGING_SUFFIX).or_else(|| aside_of(name)).is_some_and(|of| to_step(of).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_one_name_and_a_name_one_step() {
        for (step, name) in [
            (0, "step-000000"),
            (100, "step-000100"),
            (12_345_678, "step-12345678"),
            (u64::MAX, "step-18446744073709551615"),
        ] {
            assert_eq!((of_step(step).as_str(), to_step(name)), (name, Some(step)));
        }
        for other in ["step-100", "step-+00100", "step-0000100", "step-", "Step-000100", "step-000100.tmp"] {
            assert_eq!(to_step(other), None, "{other}");
        }
    }

    #[test]
    fn only_temporary_names_of_steps_are_temporary() {
        for (name, expected) in [
            ("step-000100.tmp", true),
            ("step-000100.old-0", true),
            ("step-000100.old-12", true),
            ("step-000100", false),
            ("step-000100.old-", false),
            ("step-000100.old-x", false),
            ("model.tmp", false),
        ] {
            assert_eq!(is_temporary(name), expected, "{name}");
        }
    }
}
