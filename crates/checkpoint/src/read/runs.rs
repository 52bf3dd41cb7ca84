//! The byte runs of an item, each to be had by the place of its bytes among the item's. Pure arithmetic.
//!
//! ```text
//! file     |····aaaa····bbbb····|····cccc····        runs of an item, row-major; | is a block's end
//! item      aaaabbbbcccc                             its bytes in order: 0..8 lie in the first block
//! ```

use std::ops::Range;

use sconce_dtensor::{CopyRuns, TensorBox};

use crate::metadata::{BLOCK_BYTES, TensorStorageMetadata};

/// One contiguous piece of a file that goes to one contiguous piece of a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadRun {
    /// Position in the metadata's files.
    pub(super) file: usize,
    /// Where it begins in the file.
    pub(super) offset_bytes: u64,
    /// Where it goes inside the box's bytes.
    pub(super) dst_bytes: usize,
    /// Its length, never 0.
    pub(super) len_bytes: usize,
}

impl ReadRun {
    /// The part that lies between two offsets of the file.
    pub(super) fn within(self, start: u64, end: u64) -> Self {
        let from = self.offset_bytes.max(start);
        let to = (self.offset_bytes + self.len_bytes as u64).min(end);
        let skipped = (from - self.offset_bytes) as usize;
        let (dst_bytes, len_bytes) = (self.dst_bytes + skipped, (to - from) as usize);
        Self { offset_bytes: from, dst_bytes, len_bytes, ..self }
    }

    /// The part that goes to a range of the box's bytes.
    pub(super) fn into_range(self, range: &Range<usize>) -> Option<Self> {
        let from = self.dst_bytes.max(range.start);
        let to = (self.dst_bytes + self.len_bytes).min(range.end);
        let offset_bytes = self.offset_bytes + (from - self.dst_bytes) as u64;
        (from < to).then(|| Self { offset_bytes, dst_bytes: from, len_bytes: to - from, ..self })
    }
}

/// All byte runs of an item: the longest that there are, in row-major order, all of one length.
#[derive(Debug, Clone)]
pub(super) struct ItemRuns {
    file: usize,
    /// Where the chunk begins in the file.
    start: u64,
    size: usize,
    runs: CopyRuns,
}

impl ItemRuns {
    /// The runs of a part of a chunk whose destination is the box `wanted`.
    pub(super) fn new(
        part: &TensorBox,
        chunk: usize,
        saved: &TensorStorageMetadata,
        wanted: &TensorBox,
    ) -> Self {
        let chunk = &saved.chunks[chunk];
        let runs = CopyRuns::new(part, &chunk.bounds, wanted);
        Self { file: chunk.file, start: chunk.offset_bytes, size: saved.dtype.size_bytes(), runs }
    }

    /// The file in which they all lie, by its position in the metadata.
    pub(super) fn file(&self) -> usize {
        self.file
    }

    /// Every run.
    pub(super) fn iter(&self) -> impl Iterator<Item = ReadRun> {
        (0..self.runs.count()).map(|nth| self.run(nth))
    }

    /// The blocks from the first that a run touches to the last.
    pub(super) fn blocks(&self) -> Range<usize> {
        let Some(last) = self.runs.count().checked_sub(1) else { return 0..0 };
        let (first, last) = (self.run(0), self.run(last));
        let end = last.offset_bytes + last.len_bytes as u64;
        (first.offset_bytes / BLOCK_BYTES) as usize..end.div_ceil(BLOCK_BYTES) as usize
    }

    /// Which of the item's bytes lie in a block.
    pub(super) fn in_block(&self, block: usize) -> Range<usize> {
        let start = block as u64 * BLOCK_BYTES;
        self.before(start)..self.before(start + BLOCK_BYTES)
    }

    /// The pieces of runs that a range of the item's bytes is.
    pub(super) fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = ReadRun> {
        let len = self.run_bytes().max(1);
        (range.start / len..range.end.div_ceil(len)).map(move |nth| {
            let run = self.run(nth);
            let from = range.start.max(nth * len) - nth * len;
            let to = range.end.min((nth + 1) * len) - nth * len;
            let (offset_bytes, dst_bytes) = (run.offset_bytes + from as u64, run.dst_bytes + from);
            ReadRun { offset_bytes, dst_bytes, len_bytes: to - from, ..run }
        })
    }

    /// Where in the box's bytes a range of the item's bytes goes, from the first to the last.
    pub(super) fn destination(&self, range: Range<usize>) -> Range<usize> {
        let len = self.run_bytes().max(1);
        let place = |byte: usize| self.run(byte / len).dst_bytes + byte % len;
        if range.is_empty() { 0..0 } else { place(range.start)..place(range.end - 1) + 1 }
    }

    /// How many of the item's bytes lie before an offset of the file.
    fn before(&self, offset_bytes: u64) -> usize {
        let len = self.run_bytes();
        let is_before = |nth: usize| self.run(nth).offset_bytes + len as u64 <= offset_bytes;
        let (mut low, mut high) = (0, self.runs.count());
        while low < high {
            let middle = low.midpoint(high);
            if is_before(middle) { low = middle + 1 } else { high = middle }
        }
        let cut = if low == self.runs.count() {
            0
        } else {
            offset_bytes.saturating_sub(self.run(low).offset_bytes) as usize
        };
        low * len + cut
    }

    fn run_bytes(&self) -> usize {
        self.runs.run_len() * self.size
    }

    fn run(&self, nth: usize) -> ReadRun {
        let run = self.runs.run(nth);
        ReadRun {
            file: self.file,
            offset_bytes: self.start + (run.src * self.size) as u64,
            dst_bytes: run.dst * self.size,
            len_bytes: run.len * self.size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::ChunkStorageMetadata;
    use proptest::prelude::*;
    use sconce_dtensor::DType;

    /// Columns of a matrix whose rows begin at an odd place, so that runs lie across the ends of blocks.
    fn runs(offset_bytes: u64, columns: usize, first: usize, n: usize) -> ItemRuns {
        let bounds = TensorBox::whole(&[700, columns]);
        let part = TensorBox { offsets: vec![3, first], sizes: vec![690, n] };
        let wanted = TensorBox { offsets: vec![0, first], sizes: vec![700, n + 2] };
        let chunks = vec![ChunkStorageMetadata { bounds, file: 0, offset_bytes }];
        let saved = TensorStorageMetadata {
            fqn: String::new(),
            dtype: DType::F32,
            shape: vec![700, columns + 2],
            chunks,
        };
        ItemRuns::new(&part, 0, &saved, &wanted)
    }

    proptest! {
        #[test]
        fn the_blocks_together_hold_every_byte_of_every_run_once_in_order(
            offset in 0u64..3 << 20, columns in 1usize..4000, cut in 1usize..100_000,
        ) {
            let runs = runs(offset, columns, columns / 3, columns - columns / 3);
            let (mut pieces, mut at) = (Vec::new(), 0);
            for block in runs.blocks() {
                let range = runs.in_block(block);
                prop_assert_eq!(range.start, at);
                at = range.end;
                for from in range.clone().step_by(cut) {
                    pieces.extend(runs.pieces(from..(from + cut).min(range.end)).map(|piece| (block, piece)));
                }
            }
            let whole: usize = runs.iter().map(|run| run.len_bytes).sum();
            prop_assert_eq!(at, whole);
            let bytes = |run: ReadRun| {
                (0..run.len_bytes as u64).step_by(4).map(move |n| (run.offset_bytes + n, run.dst_bytes as u64 + n))
            };
            for (block, piece) in &pieces {
                let in_block = piece.offset_bytes / BLOCK_BYTES;
                prop_assert!(piece.len_bytes > 0 && in_block == *block as u64);
                prop_assert!((piece.offset_bytes + piece.len_bytes as u64 - 1) / BLOCK_BYTES == in_block);
            }
            // Pieces may begin inside an element: a comparison of single bytes would take long, of lengths it is exact.
            let total: usize = pieces.iter().map(|(_, piece)| piece.len_bytes).sum();
            prop_assert_eq!(total, whole);
            let mut merged: Vec<ReadRun> = Vec::new();
            for (_, piece) in pieces {
                match merged.last_mut() {
                    Some(last)
                        if last.offset_bytes + last.len_bytes as u64 == piece.offset_bytes
                            && last.dst_bytes + last.len_bytes == piece.dst_bytes =>
                    {
                        last.len_bytes += piece.len_bytes;
                    }
                    _ => merged.push(piece),
                }
            }
            let mut expected: Vec<ReadRun> = Vec::new();
            for run in runs.iter() {
                match expected.last_mut() {
                    Some(last)
                        if last.offset_bytes + last.len_bytes as u64 == run.offset_bytes
                            && last.dst_bytes + last.len_bytes == run.dst_bytes =>
                    {
                        last.len_bytes += run.len_bytes;
                    }
                    _ => expected.push(run),
                }
            }
            prop_assert_eq!(&merged, &expected);
            prop_assert_eq!(merged.iter().copied().flat_map(bytes).count(), whole / 4);
        }
    }
}
