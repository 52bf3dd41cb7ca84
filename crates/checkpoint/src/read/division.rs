//! Which rank reads a block: whoever alone wants a part of it, and of several one that reads it for all.
//!
//! Pure, but for one gathering of what each rank wants: every rank comes to the same division.

use crate::Result;
use crate::coordinate::Ranks;
use crate::metadata::{FileMetadata, Metadata};

use super::blocks::{Marks, Wants};

/// Blocks by who reads them.
pub(super) struct Division {
    /// Those that this rank alone wants.
    pub(super) alone: Marks,
    /// Of each rank, those that it reads for several, as (file, block) in order.
    pub(super) shared: Vec<Vec<(usize, usize)>>,
}

/// Successive blocks of a file of which a rank wants about as much.
///
/// (file, first, number, weight): the weight is how many of [`PARTS`] parts it wants of each, at least one.
type Span = (usize, usize, usize, u8);

/// What a rank wants of a block is told in so many parts of it: it only decides who had best read it.
const PARTS: u64 = 16;

/// Successive blocks that one rank reads for several, at most: a disk reads them in one go.
const TOGETHER: usize = 8;

impl Division {
    /// One in which nobody reads a block: nothing is verified.
    pub(super) fn nobody(metadata: &Metadata, n_ranks: usize) -> Self {
        Self { alone: Marks::none(metadata), shared: vec![Vec::new(); n_ranks] }
    }

    /// The division of what the ranks want.
    ///
    /// Ranks: collective.
    pub(super) fn of(ranks: Ranks<'_>, metadata: &Metadata, wants: &Wants) -> Result<Self> {
        if ranks.size() == 1 {
            return Ok(Self { alone: wants.marks(), shared: vec![Vec::new()] });
        }
        let all = ranks.gather_all("share", Ok(spans(wants)))?;
        Ok(divide(ranks.position(), metadata, &all))
    }

    /// Where each shared block is.
    pub(super) fn places(&self, metadata: &Metadata) -> Places {
        let blocks = |file: &FileMetadata| vec![None; file.block_crcs.as_ref().map_or(0, Vec::len)];
        let mut places: Vec<Vec<Option<(u32, u32)>>> = metadata.files.iter().map(blocks).collect();
        for (rank, blocks) in self.shared.iter().enumerate() {
            for (nth, (file, block)) in blocks.iter().enumerate() {
                places[*file][*block] = Some((rank as u32, nth as u32));
            }
        }
        Places(places)
    }

    /// Whether any block is read for several ranks: the same on all of them.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.iter().any(|blocks| !blocks.is_empty())
    }
}

/// Of each block that is read for several, by whom, and its position among those that that rank reads.
pub(super) struct Places(Vec<Vec<Option<(u32, u32)>>>);

impl Places {
    /// The rank that reads a block, and the block's position there; `None` if it is not shared.
    pub(super) fn of(&self, file: usize, block: usize) -> Option<(usize, usize)> {
        let place = self.0[file].get(block).copied().flatten();
        place.map(|(rank, nth)| (rank as usize, nth as usize))
    }
}

fn spans(wants: &Wants) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for (file, block, bytes) in wants.iter() {
        let weight = (u64::from(bytes) * PARTS).div_ceil(crate::BLOCK_BYTES) as u8;
        match spans.last_mut() {
            Some((of, first, n, same)) if (*of, *first + *n, *same) == (file, block, weight) => *n += 1,
            _ => spans.push((file, block, 1, weight)),
        }
    }
    spans
}

/// Blocks of one rank are its own; others go to the rank that has the least to read so far, less what it would keep of
/// them: ranks read about as much, and as much as can be of what they want themselves.
fn divide(me: usize, metadata: &Metadata, all: &[Vec<Span>]) -> Division {
    let mut division = Division::nobody(metadata, all.len());
    let mut load = vec![0i64; all.len()];
    let cost = PARTS as i64;
    sweep(all, |file, first, n, wanting| {
        if let [(only, _)] = wanting {
            load[*only] += cost * n as i64;
            if *only == me {
                (first..first + n).for_each(|block| division.alone.insert(file, block));
            }
        }
    });
    sweep(all, |file, first, n, wanting| {
        if wanting.len() < 2 {
            return;
        }
        let together = (n / (4 * wanting.len())).clamp(1, TOGETHER);
        for start in (first..first + n).step_by(together) {
            let blocks = start..(start + together).min(first + n);
            let key = |(rank, weight): &&(usize, u8)| {
                (load[*rank] - i64::from(*weight) * blocks.len() as i64, *rank)
            };
            let Some((rank, _)) = wanting.iter().min_by_key(key).copied() else { continue };
            load[rank] += cost * blocks.len() as i64;
            division.shared[rank].extend(blocks.map(|block| (file, block)));
        }
    });
    division
}

/// Calls `each` with successive blocks that the same ranks want, in order: file, first, number, (rank, weight) of each.
fn sweep(all: &[Vec<Span>], mut each: impl FnMut(usize, usize, usize, &[(usize, u8)])) {
    let of_rank = |(rank, spans): (usize, &Vec<Span>)| {
        let spans = spans.iter().map(move |(file, first, n, weight)| ((*file, *first), *n, rank, *weight));
        spans.collect::<Vec<_>>()
    };
    let mut spans: Vec<_> = all.iter().enumerate().flat_map(of_rank).collect();
    spans.sort_unstable();
    let mut next = spans.into_iter().peekable();
    // Where each open span ends, and the rank and weight beside it.
    let (mut ends, mut open): (Vec<usize>, Vec<(usize, u8)>) = (Vec::new(), Vec::new());
    let mut at = (0, 0);
    loop {
        if open.is_empty() {
            let Some((begin, ..)) = next.peek() else { return };
            at = *begin;
        }
        while let Some((_, n, rank, weight)) = next.next_if(|(begin, ..)| *begin == at) {
            ends.push(at.1 + n);
            open.push((rank, weight));
        }
        let next_begin = next.peek().filter(|(begin, ..)| begin.0 == at.0).map(|(begin, ..)| begin.1);
        let Some(end) = ends.iter().copied().chain(next_begin).min() else { return };
        each(at.0, at.1, end - at.1, &open);
        at.1 = end;
        let is_open: Vec<bool> = ends.iter().map(|until| *until > end).collect();
        let mut keep = is_open.iter();
        open.retain(|_| keep.next() == Some(&true));
        ends.retain(|until| *until > end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::BLOCK_BYTES;
    use crate::tree::Node;

    fn metadata(files: &[usize]) -> Metadata {
        let file = |n: &usize| FileMetadata {
            name: String::new(),
            len_bytes: *n as u64 * BLOCK_BYTES,
            block_crcs: Some(vec![0; *n]),
        };
        Metadata { tensors: vec![], files: files.iter().map(file).collect(), tree: Node::None }
    }

    type Blocks = Vec<(usize, usize)>;

    /// Every block that a rank reads, by rank: alone, and for several.
    fn read_by(files: &[usize], all: &[Vec<Span>]) -> Vec<(Blocks, Blocks)> {
        let metadata = metadata(files);
        let divisions: Vec<_> = (0..all.len()).map(|rank| divide(rank, &metadata, all)).collect();
        assert!(divisions.iter().all(|d| d.shared == divisions[0].shared), "the same on every rank");
        let each = divisions.iter().enumerate();
        each.map(|(rank, d)| (d.alone.iter().collect(), d.shared[rank].clone())).collect()
    }

    #[test]
    fn every_wanted_block_is_read_by_exactly_one_rank_that_wants_it() {
        let all = [
            vec![(0, 0, 7, 16)],
            vec![(0, 2, 3, 1), (1, 0, 5, 16)],
            vec![(0, 0, 1, 2), (0, 1, 3, 3), (1, 4, 1, 16)],
        ];
        let read = read_by(&[7, 5], &all);
        let mut blocks: Vec<_> =
            read.iter().flat_map(|(alone, shared)| alone.iter().chain(shared).copied()).collect();
        blocks.sort_unstable();
        assert_eq!(blocks, (0..7).map(|b| (0, b)).chain((0..5).map(|b| (1, b))).collect::<Vec<_>>());
        for ((alone, shared), spans) in read.iter().zip(&all) {
            let wants =
                |at: &(usize, usize)| spans.iter().any(|s| s.0 == at.0 && (s.1..s.1 + s.2).contains(&at.1));
            assert!(alone.iter().chain(shared).all(wants));
        }
        assert_eq!(read[0].0, [(0, 5), (0, 6)]);
    }

    #[test]
    fn what_all_want_alike_is_read_by_all_alike() {
        let read = read_by(&[1000, 600], &vec![vec![(0, 0, 1000, 4), (1, 0, 600, 4)]; 4]);
        assert!(read.iter().all(|(alone, shared)| alone.is_empty() && shared.len() == 400));
    }

    #[test]
    fn a_rank_with_much_of_its_own_reads_less_for_others() {
        let read = read_by(&[300], &[vec![(0, 0, 200, 16)], vec![(0, 100, 200, 16)]]);
        let n = |rank: usize| (read[rank].0.len(), read[rank].1.len());
        assert_eq!((n(0), n(1)), ((100, 52), (100, 48)));
        let read = read_by(&[300], &[vec![(0, 0, 300, 16)], vec![(0, 200, 100, 16)]]);
        assert_eq!((read[0].1.len(), read[1].1.len()), (0, 100));
    }

    #[test]
    fn whoever_wants_most_of_a_block_reads_it_if_that_is_fair() {
        let mostly = |mine: usize| {
            let weight = |block: usize| if block % 2 == mine { 16 } else { 1 };
            (0..40).map(|block| (0, block, 1, weight(block))).collect::<Vec<Span>>()
        };
        let read = read_by(&[40], &[mostly(0), mostly(1)]);
        assert!(read.iter().enumerate().all(|(rank, (_, shared))| shared.iter().all(|(_, b)| b % 2 == rank)));
    }
}
