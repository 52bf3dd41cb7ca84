//! Which rank verifies a block that several ranks read.

use super::blocks::Marks;
use crate::Result;
use crate::coordinate::Ranks;

/// The blocks that this rank verifies: those that it alone touches, and its share of the others.
///
/// Ranks: collective.
pub(super) fn divide(ranks: Ranks<'_>, touched: &Marks) -> Result<Marks> {
    if ranks.size() == 1 {
        return Ok(touched.clone());
    }
    let all = ranks.gather_all("share", Ok(spans(touched)))?;
    Ok(share_of(ranks.position(), touched, &all))
}

/// Successive blocks of a file: (file, first, number).
type Span = (usize, usize, usize);

fn spans(marks: &Marks) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for (file, block) in marks.iter() {
        match spans.last_mut() {
            Some((of, first, n)) if *of == file && *first + *n == block => *n += 1,
            _ => spans.push((file, block, 1)),
        }
    }
    spans
}

/// Of k ranks that touch a block, the one at position `block % k` verifies it.
fn share_of(me: usize, touched: &Marks, all: &[Vec<Span>]) -> Marks {
    let mut counts = std::collections::HashMap::<(usize, usize), (usize, usize)>::new();
    for (rank, spans) in all.iter().enumerate() {
        for (file, first, n) in spans {
            for block in *first..first + n {
                let (before, total) = counts.entry((*file, block)).or_default();
                *before += usize::from(rank < me);
                *total += 1;
            }
        }
    }
    touched.filtered(|file, block| {
        counts.get(&(file, block)).is_none_or(|(before, total)| block % total == *before)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::{BLOCK_BYTES, FileMetadata, Metadata};
    use crate::read::copy::ReadRun;
    use crate::tree::Node;

    #[test]
    fn every_touched_block_is_verified_by_exactly_one_rank_that_touches_it() {
        let file = |n: usize| FileMetadata {
            name: String::new(),
            len_bytes: n as u64 * BLOCK_BYTES,
            block_crcs: Some(vec![0; n]),
        };
        let metadata = Metadata { tensors: vec![], files: vec![file(7), file(5)], tree: Node::None };
        let touches = |spans: &[Span]| {
            let mut marks = Marks::none(&metadata);
            for (file, first, n) in spans {
                let (offset_bytes, len_bytes) = (*first as u64 * BLOCK_BYTES + 5, n * (1 << 20) - 10);
                marks.mark(&ReadRun { file: *file, offset_bytes, dst_bytes: 0, len_bytes });
            }
            marks
        };
        let ranks =
            [touches(&[(0, 0, 7)]), touches(&[(0, 2, 3), (1, 0, 5)]), touches(&[(0, 0, 4), (1, 4, 1)])];
        let all: Vec<Vec<Span>> = ranks.iter().map(spans).collect();
        let mut verified: Vec<_> =
            (0..3).flat_map(|rank| share_of(rank, &ranks[rank], &all).iter().collect::<Vec<_>>()).collect();
        verified.sort_unstable();
        let expected: Vec<_> = (0..7).map(|b| (0, b)).chain((0..5).map(|b| (1, b))).collect();
        assert_eq!(verified, expected);
    }
}
