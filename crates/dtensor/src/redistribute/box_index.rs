//! BoxIndex: which of many boxes overlap a given one, without looking at all of them. Pure.

use crate::TensorBox;

/// A box of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) rank: usize,
    /// Which of the rank's boxes.
    pub(super) index: usize,
}

/// Boxes sorted by where they begin along the dim that tells them apart best.
///
/// ```text
///   along `dim`:   |--a--|        |-----c-----|      ends so far: a, a, c, d
///                  |-b-|              |-d--|         wanted from here |: skip while the ends so far lie before it
/// ```
pub(super) struct BoxIndex<'a> {
    boxes: &'a [Vec<TensorBox>],
    dim: usize,
    /// By offset along `dim`; empty boxes are left out.
    sorted: Vec<Place>,
    /// For each of `sorted`, the largest end along `dim` up to it.
    ends: Vec<usize>,
}

impl<'a> BoxIndex<'a> {
    /// An index of each rank's boxes.
    pub(super) fn new(boxes: &'a [Vec<TensorBox>]) -> Self {
        let places = boxes
            .iter()
            .enumerate()
            .flat_map(|(rank, boxes)| (0..boxes.len()).map(move |index| Place { rank, index }));
        let at = |place: &Place| &boxes[place.rank][place.index];
        let mut sorted: Vec<Place> = places.filter(|place| !at(place).is_empty()).collect();
        let ndim = sorted.first().map_or(0, |place| at(place).offsets.len());
        let distinct = |dim: &usize| {
            let mut offsets: Vec<usize> = sorted.iter().map(|place| at(place).offsets[*dim]).collect();
            offsets.sort_unstable();
            offsets.dedup();
            offsets.len()
        };
        let dim = (0..ndim).max_by_key(distinct).unwrap_or(0);
        if ndim > 0 {
            sorted.sort_by_key(|place| at(place).offsets[dim]);
        }
        let ends = sorted.iter().scan(0, |end, place| {
            let own = at(place).offsets.get(dim).map_or(0, |offset| offset + at(place).sizes[dim]);
            *end = own.max(*end);
            Some(*end)
        });
        Self { boxes, dim, ends: ends.collect(), sorted }
    }

    /// True if no element lies in two of the boxes.
    pub(super) fn is_disjoint(&self) -> bool {
        self.sorted.iter().all(|at| self.overlapping(&self.boxes[at.rank][at.index]).len() == 1)
    }

    /// The boxes that hold an element of `wanted`.
    pub(super) fn overlapping(&self, wanted: &TensorBox) -> Vec<Place> {
        let candidates = match wanted.offsets.get(self.dim) {
            None => 0..self.sorted.len(),
            Some(start) => {
                let end = start + wanted.sizes[self.dim];
                let offset = |place: &Place| self.boxes[place.rank][place.index].offsets[self.dim];
                let first = self.ends.partition_point(|end| end <= start);
                let last = self.sorted.partition_point(|place| offset(place) < end);
                first..last.max(first)
            }
        };
        let overlaps = |place: &&Place| {
            self.boxes[place.rank][place.index].overlap_numel(wanted) > 0 && !wanted.is_empty()
        };
        self.sorted[candidates].iter().filter(overlaps).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn boxes() -> impl Strategy<Value = Vec<Vec<TensorBox>>> {
        let one = prop::collection::vec((0usize..9, 0usize..4), 2);
        let one = one.prop_map(|dims| {
            let (offsets, sizes) = dims.into_iter().unzip();
            TensorBox { offsets, sizes }
        });
        prop::collection::vec(prop::collection::vec(one, 0..4), 1..8)
    }

    proptest! {
        #[test]
        fn exactly_the_overlapping_boxes_are_found(all in boxes(), wanted in boxes()) {
            let index = BoxIndex::new(&all);
            for wanted in wanted.iter().flatten() {
                let mut found = index.overlapping(wanted);
                found.sort();
                let places = all.iter().enumerate().flat_map(|(rank, boxes)| {
                    (0..boxes.len()).map(move |index| Place { rank, index })
                });
                let expected: Vec<Place> =
                    places.filter(|p| all[p.rank][p.index].intersect(wanted).is_some()).collect();
                prop_assert_eq!(found, expected);
            }
            let flat: Vec<&TensorBox> = all.iter().flatten().collect();
            let overlap = |a: usize| (0..a).any(|b| flat[a].intersect(flat[b]).is_some());
            prop_assert_eq!(index.is_disjoint(), !(0..flat.len()).any(overlap));
        }
    }

    #[test]
    fn scalars_overlap_each_other() {
        let all = vec![vec![TensorBox::whole(&[])]; 3];
        assert_eq!(BoxIndex::new(&all).overlapping(&TensorBox::whole(&[])).len(), 3);
    }
}
