//! Pieces: byte slices whose concatenation is one logical buffer. Pure.
//!
//! ```text
//! logical   0        5     8               16     20
//!           |piece 0 |p. 1 |    piece 2    |  tail |      tail: reads as zeros, writes are dropped
//! ```

/// Where each piece starts in the logical buffer; one entry more than pieces.
fn starts<'a>(lens: impl Iterator<Item = usize> + 'a) -> Vec<usize> {
    let mut starts = vec![0];
    let mut end = 0;
    for len in lens {
        end += len;
        starts.push(end);
    }
    starts
}

/// Index of the piece that holds byte `offset`, which lies before the end of the last.
fn piece_at(starts: &[usize], offset: usize) -> usize {
    starts.partition_point(|start| *start <= offset) - 1
}

/// A logical buffer to read.
pub(crate) struct Source<'a> {
    pieces: &'a [&'a [u8]],
    starts: Vec<usize>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(pieces: &'a [&'a [u8]]) -> Self {
        Source { pieces, starts: starts(pieces.iter().map(|piece| piece.len())) }
    }

    fn len(&self) -> usize {
        self.starts[self.pieces.len()]
    }

    /// The bytes from `offset` as they lie, if they lie in one piece.
    pub(crate) fn contiguous(&self, offset: usize, len: usize) -> Option<&'a [u8]> {
        if offset >= self.len() {
            return None;
        }
        let at = piece_at(&self.starts, offset);
        let begin = offset - self.starts[at];
        self.pieces[at].get(begin..begin + len)
    }

    /// Copies the bytes from `offset` to fill `to`; past the last piece they are zero.
    pub(crate) fn read(&self, mut offset: usize, mut to: &mut [u8]) {
        while !to.is_empty() && offset < self.len() {
            let at = piece_at(&self.starts, offset);
            let from = &self.pieces[at][offset - self.starts[at]..];
            let len = from.len().min(to.len());
            let (now, rest) = to.split_at_mut(len);
            now.copy_from_slice(&from[..len]);
            (to, offset) = (rest, offset + len);
        }
        to.fill(0);
    }
}

/// A logical buffer to write.
pub(crate) struct Sink<'a, 'b> {
    pieces: &'a mut [&'b mut [u8]],
    starts: Vec<usize>,
    copy: fn(&[u8], &mut [u8]),
}

impl<'a, 'b> Sink<'a, 'b> {
    pub(crate) fn new(pieces: &'a mut [&'b mut [u8]]) -> Self {
        Self::copying(pieces, |from, to| to.copy_from_slice(from))
    }

    /// One that is written by `copy`, of slices of equal length.
    pub(crate) fn copying(pieces: &'a mut [&'b mut [u8]], copy: fn(&[u8], &mut [u8])) -> Self {
        let starts = starts(pieces.iter().map(|piece| piece.len()));
        Sink { pieces, starts, copy }
    }

    /// Copies `from` to `offset`; what lies past the last piece is dropped.
    pub(crate) fn write(&mut self, mut offset: usize, mut from: &[u8]) {
        while !from.is_empty() && offset < self.starts[self.pieces.len()] {
            let at = piece_at(&self.starts, offset);
            let to = &mut self.pieces[at][offset - self.starts[at]..];
            let len = to.len().min(from.len());
            (self.copy)(&from[..len], &mut to[..len]);
            (from, offset) = (&from[len..], offset + len);
        }
    }
}

/// Offsets of consecutive parts of the given sizes.
pub(crate) fn offsets(counts: &[usize]) -> Vec<usize> {
    let mut next = 0;
    let place = |count: &usize| {
        next += count;
        next - count
    };
    counts.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECES: [&[u8]; 4] = [&[1, 2, 3], &[], &[4], &[5, 6, 7, 8]];

    #[test]
    fn a_read_across_pieces_is_their_concatenation_then_zeros() {
        let source = Source::new(&PIECES);
        let whole = [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0];
        for offset in 0..whole.len() {
            for len in 0..=whole.len() - offset {
                let mut got = vec![9; len];
                source.read(offset, &mut got);
                assert_eq!(got, whole[offset..offset + len], "offset {offset}, len {len}");
            }
        }
    }

    #[test]
    fn only_bytes_of_one_piece_are_contiguous() {
        let source = Source::new(&PIECES);
        assert_eq!(source.contiguous(4, 4), Some(&[5, 6, 7, 8][..]));
        assert_eq!(source.contiguous(2, 2), None);
        assert_eq!(source.contiguous(7, 2), None);
        assert_eq!(source.contiguous(8, 1), None);
    }

    #[test]
    fn a_write_past_the_last_piece_is_dropped() {
        let (mut a, mut b) = ([0; 2], [0; 3]);
        let mut pieces = [&mut a[..], &mut [], &mut b[..]];
        let mut sink = Sink::new(&mut pieces);
        sink.write(1, &[1, 2, 3, 4, 5, 6]);
        sink.write(9, &[7]);
        assert_eq!((a, b), ([0, 1], [2, 3, 4]));
    }

    #[test]
    fn no_pieces_read_as_zeros_and_swallow_writes() {
        let mut got = [1; 2];
        Source::new(&[]).read(0, &mut got);
        assert_eq!(got, [0; 2]);
        Sink::new(&mut []).write(0, &[1]);
    }
}
