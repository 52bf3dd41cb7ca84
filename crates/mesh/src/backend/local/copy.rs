//! Copies of results that are too long to stay in a cache: past the caches, where the processor can.

#![allow(unsafe_code, reason = "stores past the caches are intrinsics on pointers")]

/// Results of this length on are copied past the caches: with those of the other ranks they fill the last level, so that
/// little is still there when the caller looks at it.
const STREAMED: usize = 8 << 20;

/// How the parts of a result of `len` bytes in all are copied to their places.
pub(super) fn copier(len: usize) -> fn(&[u8], &mut [u8]) {
    if len >= STREAMED { copy_past_caches } else { |from, to| to.copy_from_slice(from) }
}

/// Copies `from` to `to`, of equal length, by stores that do not read the destination into a cache first, which is a third of
/// what an ordinary copy moves.
///
/// For what is too long to be in a cache still when someone looks at it; on processors other than x86-64 an ordinary copy.
///
/// # Panics
/// The lengths differ.
#[cfg(target_arch = "x86_64")]
pub fn copy_past_caches(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{__m128i, _mm_sfence, _mm_stream_si128};
    const LINE: usize = 64;
    const VECTOR: usize = size_of::<__m128i>();

    assert_eq!(from.len(), to.len(), "a copy between slices of one length");
    if to.len() < 2 * LINE {
        // Perhaps no whole line.
        return to.copy_from_slice(from);
    }
    let head = to.as_ptr().align_offset(LINE);
    let lines_len = (to.len() - head) / LINE * LINE;
    let (from_head, from_rest) = from.split_at(head);
    let (from_lines, from_tail) = from_rest.split_at(lines_len);
    let (to_head, to_rest) = to.split_at_mut(head);
    let (to_lines, to_tail) = to_rest.split_at_mut(lines_len);
    to_head.copy_from_slice(from_head);
    let to_vectors: &mut [__m128i] = bytemuck::cast_slice_mut(to_lines);
    for (to, from) in to_vectors.iter_mut().zip(from_lines.chunks_exact(VECTOR)) {
        let vector = bytemuck::pod_read_unaligned(from);
        // SAFETY: `to` is an exclusive reference to an aligned vector; the fence below orders the store before all others.
        unsafe { _mm_stream_si128(to, vector) };
    }
    // SAFETY: it takes SSE, which every x86-64 has.
    unsafe { _mm_sfence() };
    to_tail.copy_from_slice(from_tail);
}

/// Copies `from` to `to`, of equal length.
///
/// # Panics
/// The lengths differ.
#[cfg(not(target_arch = "x86_64"))]
pub fn copy_past_caches(from: &[u8], to: &mut [u8]) {
    to.copy_from_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streamed_copy_fills_its_place_and_nothing_else() {
        let from: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        for start in 0..70 {
            for len in [0, 1, 15, 63, 64, 65, 127, 128, 200, 777] {
                let mut to = vec![0xee; 1000];
                copy_past_caches(&from[7..7 + len], &mut to[start..start + len]);
                assert_eq!(to[start..start + len], from[7..7 + len], "{len} bytes from {start}");
                assert!(to[..start].iter().chain(&to[start + len..]).all(|byte| *byte == 0xee));
            }
        }
    }
}
