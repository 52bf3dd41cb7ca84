//! What one rank hands to another of the blocks that it reads: pieces of items, block by block. Pure; both ends have the
//! same stream and so need no words about it.

use std::ops::Range;

use super::runs::ItemRuns;

/// Pieces that go from the reader of blocks to one rank: for each of the reader's blocks in order, for each item in order,
/// the item's bytes in the block.
pub(super) struct Stream {
    /// The reader's blocks, as (file, block).
    blocks: Vec<(usize, usize)>,
    pub(super) items: Vec<ItemRuns>,
    /// Where the items of each block begin in `touching`; one more than there are blocks.
    starts: Vec<u32>,
    /// Positions of the items that touch a block, one block after the other.
    touching: Vec<u32>,
}

/// How far a stream has gone.
pub(super) struct Cursor {
    /// Position of the block among the reader's.
    block: usize,
    /// Position in `touching` of what comes after `item`.
    next: usize,
    item: usize,
    /// What is left of the item's bytes in the block.
    left: Range<usize>,
}

impl Stream {
    /// The stream of `items`, whose receiver has them in the same order. `place` is where a (file, block) is among
    /// `blocks`, if it is.
    pub(super) fn new(
        blocks: &[(usize, usize)],
        items: Vec<ItemRuns>,
        place: impl Fn(usize, usize) -> Option<usize>,
    ) -> Self {
        let mut pairs = Vec::new();
        for (nth, runs) in items.iter().enumerate() {
            let places = runs.blocks().filter_map(|block| Some((block, place(runs.file(), block)?)));
            let held = places.filter(|(block, _)| !runs.in_block(*block).is_empty());
            pairs.extend(held.map(|(_, place)| (place as u32, nth as u32)));
        }
        pairs.sort_unstable();
        let starts =
            (0..=blocks.len()).map(|b| pairs.partition_point(|(place, _)| (*place as usize) < b) as u32);
        let (starts, blocks) = (starts.collect(), blocks.to_vec());
        Self { blocks, items, starts, touching: pairs.into_iter().map(|(_, item)| item).collect() }
    }

    /// The bytes of a range of the reader's blocks.
    pub(super) fn len_bytes(&self, blocks: Range<usize>) -> usize {
        let of_block = |at: usize| {
            let touching = &self.touching[self.starts[at] as usize..self.starts[at + 1] as usize];
            let bytes = |item: &u32| self.items[*item as usize].in_block(self.blocks[at].1).len();
            touching.iter().map(bytes).sum::<usize>()
        };
        blocks.map(of_block).sum()
    }

    /// A cursor at the beginning of a block of the reader's.
    pub(super) fn at(&self, block: usize) -> Cursor {
        Cursor { block, next: self.starts[block] as usize, item: 0, left: 0..0 }
    }

    /// Goes on by `len` bytes: calls `each` with the pieces that they are: position of the block among the reader's, of the
    /// item, which of the item's bytes.
    pub(super) fn go<E>(
        &self,
        cursor: &mut Cursor,
        mut len: usize,
        mut each: impl FnMut(usize, usize, Range<usize>) -> Result<(), E>,
    ) -> Result<(), E> {
        while len > 0 {
            if cursor.left.is_empty() {
                self.next(cursor);
            }
            let start = cursor.left.start;
            cursor.left.start = cursor.left.end.min(start + len);
            len -= cursor.left.start - start;
            each(cursor.block, cursor.item, start..cursor.left.start)?;
        }
        Ok(())
    }

    fn next(&self, cursor: &mut Cursor) {
        while self.starts[cursor.block + 1] as usize == cursor.next {
            cursor.block += 1;
        }
        cursor.item = self.touching[cursor.next] as usize;
        cursor.next += 1;
        cursor.left = self.items[cursor.item].in_block(self.blocks[cursor.block].1);
    }
}
