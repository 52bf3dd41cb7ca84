//! Which part of a tensor a rank holds: uneven and empty shards included. Pure.

use std::ops::Range;

use crate::{Placement, TensorBox};

/// The part of `0..len` that chunk `index` of `n_chunks` holds.
///
/// Full chunks are ceil(len / n_chunks) long; later ones are short, then empty (an empty one starts at `len`).
///
/// # Source
/// `torch.chunk`, as `Shard._split_tensor` uses it.
///
/// ```
/// use sconce_dtensor::chunk_range;
///
/// let chunks: Vec<_> = (0..4).map(|i| chunk_range(6, 4, i)).collect();
/// assert_eq!(chunks, [0..2, 2..4, 4..6, 6..6]);
/// ```
pub fn chunk_range(len: usize, n_chunks: usize, index: usize) -> Range<usize> {
    let full = len.div_ceil(n_chunks);
    let start = (full * index).min(len);
    start..(start + full).min(len)
}

/// The box that the rank at `coordinate` of a mesh of `mesh_shape` holds of a tensor of `shape`.
///
/// `Partial` holds what `Replicate` holds: a whole term.
pub fn local_box(
    shape: &[usize],
    mesh_shape: &[usize],
    coordinate: &[usize],
    placements: &[Placement],
) -> TensorBox {
    let mut held = TensorBox::whole(shape);
    for ((placement, n_chunks), index) in placements.iter().zip(mesh_shape).zip(coordinate) {
        if let Some(dim) = placement.shard_dim(shape.len()) {
            let range = chunk_range(held.sizes[dim], *n_chunks, *index);
            // What is empty lies at the end of the tensor, as in torch, not at that of the part that was split.
            held.offsets[dim] = if range.is_empty() { shape[dim] } else { held.offsets[dim] + range.start };
            held.sizes[dim] = range.len();
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn six_rows_over_four_ranks_leave_the_last_empty_at_the_end() {
        let part = local_box(&[6, 3], &[4], &[3], &[Placement::Shard(0)]);
        assert_eq!(part, TensorBox { offsets: vec![6, 0], sizes: vec![0, 3] });
    }

    #[test]
    fn two_mesh_dims_split_one_tensor_dim_left_to_right() {
        let both = [Placement::Shard(0), Placement::Shard(0)];
        let rows: Vec<_> = [[0, 0], [0, 1], [1, 0], [1, 1]]
            .map(|at| local_box(&[7], &[2, 2], &at, &both))
            .map(|b| (b.offsets[0], b.sizes[0]))
            .to_vec();
        assert_eq!(rows, [(0, 2), (2, 2), (4, 2), (6, 1)]);
    }

    proptest! {
        #[test]
        fn chunks_tile_the_length_and_only_shrink(len in 0usize..50, n in 1usize..9) {
            let chunks: Vec<_> = (0..n).map(|i| chunk_range(len, n, i)).collect();
            prop_assert_eq!(chunks[0].start, 0);
            prop_assert_eq!(chunks[n - 1].end, len);
            prop_assert!(chunks.windows(2).all(|w| w[0].end == w[1].start && w[0].len() >= w[1].len()));
        }
    }
}
