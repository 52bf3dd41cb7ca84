//! Notices: what ranks of one world tell each other outside of collectives, in messages of one length. Pure.

use crate::Rank;

/// Length of every notice.
pub(super) const NOTICE_BYTES: usize = 512;
/// Ranks that one notice can name.
const NAMED: usize = NOTICE_BYTES / 8 - 3;

/// Why a group fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cause {
    /// The process of this rank ended.
    Lost(Rank),
    /// This rank left the world while it was still needed.
    Left(Rank),
    /// This rank gave the group up.
    Aborted(Rank),
    /// The deadline passed without these ranks.
    Timeout(Vec<Rank>),
}

/// What a rank tells others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// A rank leaves the world in good order.
    Leaving(Rank),
    /// A rank is lost to the whole world.
    Lost(Rank),
    /// The group of this key failed.
    Failed(u64, Cause),
}

/// ```text
/// word  0      1         2         3…
///       kind   group     n ranks   ranks
/// ```
impl Notice {
    pub(super) fn encode(&self) -> Vec<u8> {
        let one = std::slice::from_ref;
        let (kind, group, ranks) = match self {
            Notice::Leaving(rank) => (1, 0, one(rank)),
            Notice::Lost(rank) => (2, 0, one(rank)),
            Notice::Failed(group, Cause::Lost(rank)) => (3, *group, one(rank)),
            Notice::Failed(group, Cause::Left(rank)) => (4, *group, one(rank)),
            Notice::Failed(group, Cause::Aborted(rank)) => (5, *group, one(rank)),
            Notice::Failed(group, Cause::Timeout(ranks)) => (6, *group, &ranks[..ranks.len().min(NAMED)]),
        };
        let words =
            [kind, group, ranks.len() as u64].into_iter().chain(ranks.iter().map(|rank| rank.0 as u64));
        let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        bytes.resize(NOTICE_BYTES, 0);
        bytes
    }

    /// `None` if the bytes are no notice.
    pub(super) fn decode(bytes: &[u8]) -> Option<Notice> {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |at: usize| words.get(at).map(|word| u64::from_le_bytes(*word));
        let (kind, group, n_ranks) = (word(0)?, word(1)?, usize::try_from(word(2)?).ok()?);
        let ranks: Option<Vec<Rank>> =
            (0..n_ranks.min(NAMED)).map(|at| word(3 + at).map(|rank| Rank(rank as usize))).collect();
        let ranks = ranks?;
        let first = ranks.first().copied();
        Some(match kind {
            1 => Notice::Leaving(first?),
            2 => Notice::Lost(first?),
            3 => Notice::Failed(group, Cause::Lost(first?)),
            4 => Notice::Failed(group, Cause::Left(first?)),
            5 => Notice::Failed(group, Cause::Aborted(first?)),
            6 => Notice::Failed(group, Cause::Timeout(ranks)),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_notice_survives_its_message() {
        let many: Vec<Rank> = (0..200).map(Rank).collect();
        let notices = [
            Notice::Leaving(Rank(3)),
            Notice::Lost(Rank(0)),
            Notice::Failed(7, Cause::Lost(Rank(1))),
            Notice::Failed(u64::MAX, Cause::Left(Rank(2))),
            Notice::Failed(1, Cause::Aborted(Rank(5))),
            Notice::Failed(1, Cause::Timeout(many[..NAMED].to_vec())),
        ];
        for notice in notices {
            let bytes = notice.encode();
            assert_eq!(bytes.len(), NOTICE_BYTES);
            assert_eq!(Notice::decode(&bytes), Some(notice));
        }
        let long = Notice::Failed(1, Cause::Timeout(many)).encode();
        assert!(
            matches!(Notice::decode(&long), Some(Notice::Failed(1, Cause::Timeout(r))) if r.len() == NAMED)
        );
    }

    #[test]
    fn foreign_bytes_are_no_notice() {
        assert_eq!(Notice::decode(&[0xff; NOTICE_BYTES]), None);
        assert_eq!(Notice::decode(&[1, 0]), None);
        assert_eq!(Notice::decode(&[0; NOTICE_BYTES]), None);
    }
}
