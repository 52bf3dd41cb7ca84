//! The failure record: why a group failed, written once by the rank that found out, read by all.
//!
//! It lies in the group's segment, so that ranks that had not noticed yet return the same cause.

use std::hint::spin_loop;
use std::sync::atomic::Ordering;

use super::ffi::Mapping;
use super::segment::{GroupWord, RankWord};

const EMPTY: u32 = 0;
const WRITING: u32 = 1;
const COMPLETE: u32 = 2;

/// How often to look again at a record that is being written: far longer than that takes, short for a writer
/// that died meanwhile.
const LOOKS: usize = 10_000;

/// Why a group failed. Ranks are group ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cause {
    /// This rank left while the others still needed it.
    Departed(usize),
    /// The deadline passed; for each rank, whether it had arrived.
    Timeout(Vec<bool>),
    /// This rank gave up.
    Aborted(usize),
}

impl Cause {
    fn kind(&self) -> u32 {
        match self {
            Cause::Departed(_) => 1,
            Cause::Timeout(_) => 2,
            Cause::Aborted(_) => 3,
        }
    }
}

/// Records `cause` unless the group has failed already, and returns the cause that counts.
pub(super) fn record(mapping: &Mapping, cause: Cause) -> Cause {
    let state = mapping.group_word(GroupWord::FailureState);
    if state.compare_exchange(EMPTY, WRITING, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        write(mapping, &cause);
        state.store(COMPLETE, Ordering::Release);
        return cause;
    }
    for _ in 0..LOOKS {
        if let Some(first) = read(mapping) {
            return first;
        }
        spin_loop();
    }
    cause
}

/// The recorded cause, if there is a complete one.
pub(super) fn read(mapping: &Mapping) -> Option<Cause> {
    if mapping.group_word(GroupWord::FailureState).load(Ordering::Acquire) != COMPLETE {
        return None;
    }
    let rank = mapping.group_word(GroupWord::FailureRank).load(Ordering::Relaxed) as usize;
    match mapping.group_word(GroupWord::FailureKind).load(Ordering::Relaxed) {
        1 => Some(Cause::Departed(rank)),
        2 => Some(Cause::Timeout((0..mapping.geometry().ranks()).map(|g| had_arrived(mapping, g)).collect())),
        _ => Some(Cause::Aborted(rank)),
    }
}

fn had_arrived(mapping: &Mapping, rank: usize) -> bool {
    mapping.rank_word(rank, RankWord::FailureArrived).load(Ordering::Relaxed) == 1
}

fn write(mapping: &Mapping, cause: &Cause) {
    mapping.group_word(GroupWord::FailureKind).store(cause.kind(), Ordering::Relaxed);
    match cause {
        Cause::Departed(rank) | Cause::Aborted(rank) => {
            mapping.group_word(GroupWord::FailureRank).store(*rank as u32, Ordering::Relaxed);
        }
        Cause::Timeout(arrived) => {
            for (rank, arrived) in arrived.iter().enumerate() {
                let word = mapping.rank_word(rank, RankWord::FailureArrived);
                word.store(u32::from(*arrived), Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::segment::Geometry;
    use super::*;

    #[test]
    fn the_first_cause_counts_for_all() {
        for first in [Cause::Departed(2), Cause::Timeout(vec![true, false, true]), Cause::Aborted(0)] {
            let mapping = Mapping::anonymous(Geometry::new(3)).unwrap();
            assert_eq!(read(&mapping), None);
            assert_eq!(record(&mapping, first.clone()), first);
            assert_eq!(record(&mapping, Cause::Departed(1)), first);
            assert_eq!(read(&mapping), Some(first));
        }
    }
}
