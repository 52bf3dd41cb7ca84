//! Block: bytes that lie aligned for every dtype, as messages are sent from and received into.

/// Bytes at an address that any element type may have.
pub(super) struct Block {
    words: Box<[u64]>,
    len: usize,
}

impl Block {
    pub(super) fn zeroed(len: usize) -> Block {
        Block { words: vec![0; len.div_ceil(8)].into_boxed_slice(), len }
    }

    pub(super) fn of(bytes: &[u8]) -> Block {
        let mut block = Block::zeroed(bytes.len());
        block.bytes_mut().copy_from_slice(bytes);
        block
    }

    /// The first `len` bytes of what `words` hold.
    pub(super) fn from_words(words: Box<[u64]>, len: usize) -> Block {
        let len = len.min(words.len() * 8);
        Block { words, len }
    }

    pub(super) fn into_words(self) -> Box<[u64]> {
        self.words
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}
