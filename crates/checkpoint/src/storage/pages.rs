//! Memory that begins on a page.

/// What direct I/O asks of memory, offsets and lengths; and where the kernel copies to fastest: reads of cached files to the
/// byte 16 of a page, where allocators put large vectors, took 1.3 times as long.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Bytes of which the first lies at the beginning of a page, used again and again.
#[derive(Debug, Default)]
pub(crate) struct PageBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    /// `len` bytes, whatever they hold: those of before, or zeros.
    pub(crate) fn resized(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + PAGE_BYTES {
            self.memory = vec![0; len + PAGE_BYTES];
        }
        let address = self.memory.as_ptr() as usize;
        (self.start, self.len) = (address.next_multiple_of(PAGE_BYTES) - address, len);
        self.bytes_mut()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_begin_on_a_page_at_any_length_and_wherever_the_buffer_goes() {
        let mut buffer = PageBuffer::default();
        for len in [0, 1, 4096, 5000, 1 << 20, 3] {
            let bytes = buffer.resized(len);
            assert_eq!((bytes.len(), bytes.as_ptr() as usize % PAGE_BYTES), (len, 0));
            bytes.fill(7);
        }
        let moved = Box::new(buffer);
        assert_eq!((moved.bytes(), moved.bytes().as_ptr() as usize % PAGE_BYTES), (&[7; 3][..], 0));
    }
}
