//! Where everything lies in a group's shared segment. Pure arithmetic, no memory.
//!
//! ```text
//! 0          64        128       192       256         256 + 64·ranks   page
//! | arrivals | phase   | lost    | failure | one line per rank … |      …  | half 0 | half 1 | half 0 | half 1 | …
//! |<------------------------- control: u32 words, accessed atomically --->|<---- rank 0 --->|<---- rank 1 --->|
//!
//! half = | fingerprint, 4 KiB | data, 1 MiB |
//! ```
//!
//! Each control word that ranks write at the same time has a cache line of its own.

/// Data bytes of one half. 4 ranks on 2 cores gathered 64 MiB in 15 to 17 ms with 1 MiB, in
/// 19 with 2 MiB and in 17 or more with 512 KiB.
pub(super) const DATA_BYTES: usize = 1 << 20;
/// Bytes before a half's data, so that the data starts on a page.
pub(super) const HEADER_BYTES: usize = 4096;
/// Bytes of one half.
pub(super) const HALF_BYTES: usize = HEADER_BYTES + DATA_BYTES;

const PAGE: usize = 4096;
const WORDS_PER_LINE: usize = 16;
const GROUP_LINES: usize = 4;

/// Control words of the phase barrier, on which the soundness of `ffi.rs` rests: reached only there, written only by
/// `barrier.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BarrierWord {
    /// How many ranks have arrived at the next phase.
    Arrivals,
    /// The last phase that all ranks reached; waiters sleep on it.
    Phase,
    /// The phase that this rank arrived at last.
    Arrived(usize),
    /// 1 once the halves of this rank belong to a `Stage`.
    Claimed(usize),
}

/// Other control words of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GroupWord {
    /// Of a world: 1 + the rank that was lost first, or 0.
    Lost,
    /// State of the failure record: 0 none, 1 being written, 2 complete.
    FailureState,
    /// Why the group failed.
    FailureKind,
    /// The rank that it concerns.
    FailureRank,
}

/// Other control words of each rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RankWord {
    /// Of a world: whether the rank takes part, left or was lost.
    Membership,
    /// In a failure record: 1 if it had arrived.
    FailureArrived,
}

/// Sizes and offsets of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    ranks: usize,
}

impl Geometry {
    pub(super) const fn new(ranks: usize) -> Self {
        Geometry { ranks }
    }

    pub(super) const fn ranks(self) -> usize {
        self.ranks
    }

    /// Index of a word of the barrier in the control area.
    pub(super) const fn barrier_word(self, word: BarrierWord) -> usize {
        match word {
            BarrierWord::Arrivals => 0,
            BarrierWord::Phase => WORDS_PER_LINE,
            BarrierWord::Arrived(rank) => (GROUP_LINES + rank) * WORDS_PER_LINE,
            BarrierWord::Claimed(rank) => (GROUP_LINES + rank) * WORDS_PER_LINE + 1,
        }
    }

    /// Index of a word of the group in the control area.
    pub(super) const fn group_word(self, word: GroupWord) -> usize {
        match word {
            GroupWord::Lost => 2 * WORDS_PER_LINE,
            GroupWord::FailureState => 3 * WORDS_PER_LINE,
            GroupWord::FailureKind => 3 * WORDS_PER_LINE + 1,
            GroupWord::FailureRank => 3 * WORDS_PER_LINE + 2,
        }
    }

    /// Index of a word of group rank `rank` in the control area.
    pub(super) const fn rank_word(self, rank: usize, word: RankWord) -> usize {
        (GROUP_LINES + rank) * WORDS_PER_LINE + 2 + word as usize
    }

    /// Length of the control area in words.
    pub(super) const fn control_words(self) -> usize {
        self.control_bytes() / 4
    }

    const fn control_bytes(self) -> usize {
        ((GROUP_LINES + self.ranks) * WORDS_PER_LINE * 4).next_multiple_of(PAGE)
    }

    /// Offset of a half in bytes; `parity` is 0 or 1.
    pub(super) const fn half_offset(self, rank: usize, parity: usize) -> usize {
        self.control_bytes() + (2 * rank + parity) * HALF_BYTES
    }

    /// Length of the segment in bytes.
    pub(super) const fn len_bytes(self) -> usize {
        self.half_offset(self.ranks, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_aligned_disjoint_and_end_the_segment() {
        for ranks in [1, 2, 3, 64, 1000] {
            let geometry = Geometry::new(ranks);
            let mut end = geometry.control_words() * 4;
            for rank in 0..ranks {
                for parity in 0..2 {
                    let offset = geometry.half_offset(rank, parity);
                    assert_eq!((offset, offset % PAGE), (end, 0), "rank {rank} of {ranks}");
                    end = offset + HALF_BYTES;
                }
            }
            assert_eq!(end, geometry.len_bytes());
        }
    }

    #[test]
    fn the_last_control_word_lies_in_the_control_area() {
        for ranks in [1, 59, 60, 61, 1000] {
            let geometry = Geometry::new(ranks);
            let last = geometry.rank_word(ranks - 1, RankWord::FailureArrived);
            assert!(last < geometry.control_words(), "{ranks} ranks");
        }
    }
}
