//! The failure record: why a group failed, written once by the rank that found out, read by all.
//!
//! It lies in the group's segment, so that ranks that had not noticed yet return the same cause.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering};

use super::barrier::Word;
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
    Record::of(mapping).write_first(cause, LOOKS, spin_loop)
}

/// The recorded cause, if there is a complete one.
pub(super) fn read(mapping: &Mapping) -> Option<Cause> {
    Record::of(mapping).read()
}

/// The words of a failure record.
struct Record<'a, W> {
    state: &'a W,
    kind: &'a W,
    rank: &'a W,
    /// One for each group rank.
    arrived: Vec<&'a W>,
}

impl<'a> Record<'a, AtomicU32> {
    fn of(mapping: &'a Mapping) -> Self {
        let arrived = |rank| mapping.rank_word(rank, RankWord::FailureArrived);
        Record {
            state: mapping.group_word(GroupWord::FailureState),
            kind: mapping.group_word(GroupWord::FailureKind),
            rank: mapping.group_word(GroupWord::FailureRank),
            arrived: (0..mapping.geometry().ranks()).map(arrived).collect(),
        }
    }
}

impl<W: Word> Record<'_, W> {
    fn write_first(&self, cause: Cause, looks: usize, mut pause: impl FnMut()) -> Cause {
        if self.state.replace(EMPTY, WRITING) {
            self.write(&cause);
            self.state.store(COMPLETE, Ordering::Release);
            return cause;
        }
        for _ in 0..looks {
            if let Some(first) = self.read() {
                return first;
            }
            pause();
        }
        cause
    }

    fn read(&self) -> Option<Cause> {
        if self.state.load(Ordering::Acquire) != COMPLETE {
            return None;
        }
        let rank = self.rank.load(Ordering::Relaxed) as usize;
        match self.kind.load(Ordering::Relaxed) {
            1 => Some(Cause::Departed(rank)),
            2 => {
                let arrived = self.arrived.iter().map(|word| word.load(Ordering::Relaxed) == 1);
                Some(Cause::Timeout(arrived.collect()))
            }
            _ => Some(Cause::Aborted(rank)),
        }
    }

    fn write(&self, cause: &Cause) {
        self.kind.store(cause.kind(), Ordering::Relaxed);
        match cause {
            Cause::Departed(rank) | Cause::Aborted(rank) => self.rank.store(*rank as u32, Ordering::Relaxed),
            Cause::Timeout(arrived) => {
                for (word, arrived) in self.arrived.iter().zip(arrived) {
                    word.store(u32::from(*arrived), Ordering::Relaxed);
                }
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

    #[test]
    fn all_ranks_that_find_out_at_the_same_time_return_one_whole_cause() {
        use loom::sync::atomic::AtomicU32;
        use loom::thread;

        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let words: loom::sync::Arc<[AtomicU32; 5]> = loom::sync::Arc::default();
            let ranks = [Cause::Departed(1), Cause::Timeout(vec![true, false])].map(|cause| {
                let words = loom::sync::Arc::clone(&words);
                thread::spawn(move || {
                    let [state, kind, rank, first, second] = &*words;
                    let record = Record { state, kind, rank, arrived: vec![first, second] };
                    record.write_first(cause, usize::MAX, thread::yield_now)
                })
            });
            let told = ranks.map(|rank| rank.join().unwrap());
            assert_eq!(told[0], told[1]);
            assert!([Cause::Departed(1), Cause::Timeout(vec![true, false])].contains(&told[0]), "{told:?}");
        });
    }
}
