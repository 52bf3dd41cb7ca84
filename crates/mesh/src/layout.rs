//! MeshLayout: which rank stands where in an n-dimensional grid. Pure.
//!
//! ```text
//! shape [2, 3], dims (replicate, shard)       shard →
//!                                            0   1   2
//!   ranks are row-major:        replicate 0  r0  r1  r2      groups along shard:     [r0 r1 r2] [r3 r4 r5]
//!   the last dim is adjacent         ↓    1  r3  r4  r5      groups along replicate: [r0 r3] [r1 r4] [r2 r5]
//! ```

use crate::Rank;

/// A grid of ranks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct MeshLayout {
    shape: Vec<usize>,
    /// Row-major, one for each place.
    ranks: Vec<Rank>,
}

impl MeshLayout {
    /// `ranks` in row-major order; `None` if the shape has not as many places.
    pub(crate) fn row_major(shape: &[usize], ranks: &[Rank]) -> Option<Self> {
        let size = shape.iter().try_fold(1usize, |size, len| size.checked_mul(*len))?;
        (size == ranks.len()).then(|| MeshLayout { shape: shape.to_vec(), ranks: ranks.to_vec() })
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// Where `rank` stands, one coordinate a dim.
    pub(crate) fn coordinate_of(&self, rank: Rank) -> Option<Vec<usize>> {
        let index = self.ranks.iter().position(|other| *other == rank)?;
        Some(coordinate(&self.shape, index))
    }

    /// The same ranks along one dim.
    pub(crate) fn flatten(&self) -> MeshLayout {
        MeshLayout { shape: vec![self.ranks.len()], ranks: self.ranks.clone() }
    }

    /// The rank at a coordinate inside the shape.
    fn rank_at(&self, coordinate: &[usize]) -> Rank {
        let index = self.shape.iter().zip(coordinate).fold(0, |index, (len, at)| index * len + at);
        self.ranks[index]
    }

    /// All lists of ranks that differ only in their coordinate along `dim`, which orders them.
    pub(crate) fn groups_along(&self, dim: usize) -> Vec<Vec<Rank>> {
        self.slices(&[dim]).into_iter().map(|slice| slice.ranks).collect()
    }

    /// The grids along `dims`, in that order of dims: one for each setting of all other dims.
    pub(crate) fn slices(&self, dims: &[usize]) -> Vec<MeshLayout> {
        let fixed: Vec<usize> = (0..self.shape.len()).filter(|dim| !dims.contains(dim)).collect();
        let fixed_shape: Vec<usize> = fixed.iter().map(|dim| self.shape[*dim]).collect();
        let settings = (0..fixed_shape.iter().product()).map(|index| coordinate(&fixed_shape, index));
        settings.map(|setting| self.slice(dims, &fixed, &setting)).collect()
    }

    fn slice(&self, dims: &[usize], fixed: &[usize], setting: &[usize]) -> MeshLayout {
        let shape: Vec<usize> = dims.iter().map(|dim| self.shape[*dim]).collect();
        let mut place = vec![0; self.shape.len()];
        fixed.iter().zip(setting).for_each(|(dim, at)| place[*dim] = *at);
        let ranks = (0..shape.iter().product()).map(|index| {
            dims.iter().zip(coordinate(&shape, index)).for_each(|(dim, at)| place[*dim] = at);
            self.rank_at(&place)
        });
        MeshLayout { ranks: ranks.collect(), shape }
    }
}

/// Row-major coordinate of place `index`.
fn coordinate(shape: &[usize], mut index: usize) -> Vec<usize> {
    let mut coordinate = vec![0; shape.len()];
    for (at, len) in coordinate.iter_mut().zip(shape).rev() {
        (*at, index) = (index % len, index / len);
    }
    coordinate
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row_major(shape: &[usize]) -> MeshLayout {
        let ranks: Vec<Rank> = (0..shape.iter().product()).map(Rank).collect();
        MeshLayout::row_major(shape, &ranks).unwrap()
    }

    fn groups(shape: &[usize], dim: usize) -> Vec<Vec<usize>> {
        let groups = row_major(shape).groups_along(dim);
        groups.iter().map(|ranks| ranks.iter().map(|rank| rank.0).collect()).collect()
    }

    #[test]
    fn groups_along_a_dim_are_rows_and_columns() {
        assert_eq!(groups(&[2, 3], 0), [[0, 3], [1, 4], [2, 5]]);
        assert_eq!(groups(&[2, 3], 1), [[0, 1, 2], [3, 4, 5]]);
        assert_eq!(groups(&[2, 2, 2], 1), [[0, 2], [1, 3], [4, 6], [5, 7]]);
        assert_eq!(groups(&[3], 0), [[0, 1, 2]]);
    }

    #[test]
    fn every_rank_is_in_one_group_of_each_dim() {
        for shape in [&[4][..], &[2, 2], &[3, 1, 2], &[2, 3, 2]] {
            let layout = row_major(shape);
            for dim in 0..shape.len() {
                let mut ranks = layout.groups_along(dim).concat();
                ranks.sort();
                assert_eq!(ranks, layout.ranks(), "{shape:?} along {dim}");
            }
        }
    }

    #[test]
    fn coordinates_find_their_rank_again() {
        let layout = row_major(&[2, 3, 2]);
        for rank in layout.ranks() {
            assert_eq!(layout.rank_at(&layout.coordinate_of(*rank).unwrap()), *rank);
        }
        assert_eq!(layout.coordinate_of(Rank(7)), Some(vec![1, 0, 1]));
        assert_eq!(layout.coordinate_of(Rank(12)), None);
    }

    #[test]
    fn a_slice_keeps_the_requested_order_of_dims() {
        let layout = row_major(&[2, 3]);
        let [transposed] = &layout.slices(&[1, 0])[..] else { panic!("one slice of all dims") };
        assert_eq!(transposed.shape(), [3, 2]);
        assert_eq!(transposed.ranks(), [0, 3, 1, 4, 2, 5].map(Rank));
    }

    #[test]
    fn a_mesh_without_dims_has_one_rank() {
        assert_eq!(row_major(&[]).slices(&[]).len(), 1);
    }

    #[test]
    fn a_shape_with_another_number_of_places_is_no_layout() {
        for shape in [&[2][..], &[2, 0], &[usize::MAX, 2], &[2, 2]] {
            assert_eq!(MeshLayout::row_major(shape, &[0, 1, 2].map(Rank)), None, "{shape:?}");
        }
    }
}
