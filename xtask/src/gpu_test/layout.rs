//! How many ranks the cases run on, and what carries their tensors. Pure.

use std::fmt;

/// The least version of NCCL that runs several ranks on one device.
const SHARES_DEVICES: u32 = 23_000;

/// A way to run the cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) ranks: usize,
    backend: &'static str,
    how: &'static str,
    /// Whether it may fail without the cases being to blame.
    pub(super) is_experiment: bool,
    extra: &'static [(&'static str, &'static str)],
}

/// Through host memory, which works on any number of devices.
pub(super) const STAGED: Layout = Layout {
    ranks: 4,
    backend: "cpu:local,cuda:local",
    how: "staged through host memory, on the devices in turns",
    is_experiment: false,
    extra: &[],
};

const NCCL: Layout = Layout { backend: "cpu:local,cuda:nccl", how: "", ..STAGED };

/// More CTAs of four ranks on one device may wait for each other forever.
const SHARED: &[(&str, &str)] =
    &[("NCCL_MULTI_RANK_GPU_ENABLE", "1"), ("NCCL_MAX_CTAS", "4"), ("NCCL_NVLS_ENABLE", "0")];

/// Ways to run over NCCL, the best first; the next one is for when an experiment fails.
pub(super) fn layouts(devices: usize, nccl: u32) -> Vec<Layout> {
    if devices >= 4 {
        return vec![Layout { how: "NCCL, a device each", ..NCCL }];
    }
    let shared =
        Layout { how: "NCCL, several ranks on a device", is_experiment: true, extra: SHARED, ..NCCL };
    let rest = match devices {
        2 | 3 => Layout { ranks: 2, how: "NCCL, a device each", ..NCCL },
        _ => Layout { ranks: 1, how: "NCCL, one rank", ..NCCL },
    };
    if nccl >= SHARES_DEVICES { vec![shared, rest] } else { vec![rest] }
}

impl Layout {
    /// What the cases are told.
    pub(super) fn env(&self) -> Vec<(&'static str, String)> {
        let told =
            [("SCONCE_GPU_RANKS", self.ranks.to_string()), ("SCONCE_BACKEND", self.backend.to_owned())];
        told.into_iter().chain(self.extra.iter().map(|(name, value)| (*name, (*value).to_owned()))).collect()
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ranks: {}", self.ranks, self.how)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_ranks_are_preferred_and_only_experiments_may_fail() {
        let ranks = |devices, nccl| layouts(devices, nccl).iter().map(|l| l.ranks).collect::<Vec<_>>();
        assert_eq!(ranks(8, 22_809), [4]);
        assert_eq!(ranks(2, 23_007), [4, 2]);
        assert_eq!(ranks(2, 22_809), [2]);
        assert_eq!(ranks(1, 23_007), [4, 1]);
        assert_eq!(ranks(1, 22_809), [1]);
        for (devices, nccl) in [(8, 23_007), (2, 23_007), (1, 23_007), (1, 22_809)] {
            let last = *layouts(devices, nccl).last().unwrap();
            assert!(!last.is_experiment, "{last}");
        }
        assert!(layouts(1, 23_007)[0].env().contains(&("NCCL_MULTI_RANK_GPU_ENABLE", "1".to_owned())));
    }
}
