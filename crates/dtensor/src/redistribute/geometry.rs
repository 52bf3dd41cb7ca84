//! What each rank of a mesh holds under given placements, and how many elements ranks lack of what they want. Pure.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use crate::{Placement, chunk_range};

/// One tensor on one mesh; remembers the layouts that it was asked for.
pub(super) struct Geometry<'a> {
    shape: &'a [usize],
    mesh_shape: &'a [usize],
    layouts: RefCell<HashMap<Vec<usize>, Rc<Layout>>>,
    /// By mesh dims, as bits: the positions of the mesh whose coordinates are 0 along all other dims.
    positions: RefCell<HashMap<u128, Rc<[usize]>>>,
}

/// What every rank of the mesh holds.
pub(super) struct Layout {
    /// Along each tensor dim of each rank, row-major.
    ranges: Vec<Range<usize>>,
    /// The mesh dims that split, as bits.
    splitting: u128,
    /// Ranks that hold the same element: chunks tile what is split, so that their number is that along all other dims.
    copies: usize,
}

impl<'a> Geometry<'a> {
    pub(super) fn new(shape: &'a [usize], mesh_shape: &'a [usize]) -> Self {
        Self { shape, mesh_shape, layouts: RefCell::default(), positions: RefCell::default() }
    }

    /// What ranks hold where each mesh dim splits the given tensor dim; what is no tensor dim splits nothing.
    pub(super) fn layout(&self, dims: &[usize]) -> Rc<Layout> {
        if let Some(known) = self.layouts.borrow().get(dims) {
            return Rc::clone(known);
        }
        let ndim = self.shape.len();
        let mut ranges: Vec<Range<usize>> = Vec::with_capacity(self.n_ranks() * ndim);
        for nth in 0..self.n_ranks() {
            let first = ranges.len();
            ranges.extend(self.shape.iter().map(|len| 0..*len));
            let mut stride = self.n_ranks();
            for (dim, n_chunks) in dims.iter().zip(self.mesh_shape) {
                stride /= n_chunks;
                if *dim < ndim {
                    let held = &mut ranges[first + dim];
                    let chunk = chunk_range(held.len(), *n_chunks, nth / stride % n_chunks);
                    *held = held.start + chunk.start..held.start + chunk.end;
                }
            }
        }
        let splitting = |mesh_dim: &usize| dims[*mesh_dim] < ndim;
        let copies = (0..dims.len()).filter(|dim| !splitting(dim)).map(|dim| self.mesh_shape[dim]).product();
        let splitting = (0..dims.len()).filter(splitting).map(|dim| 1 << dim).sum();
        let layout = Rc::new(Layout { ranges, splitting, copies });
        self.layouts.borrow_mut().insert(dims.to_vec(), Rc::clone(&layout));
        layout
    }

    /// Number of dims of the tensor.
    pub(super) fn ndim(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements of the whole tensor.
    pub(super) fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements that all ranks together hold.
    pub(super) fn held_numel(&self, layout: &Layout) -> usize {
        self.numel() * layout.copies
    }

    /// Elements of `to` that the ranks do not hold under `from`, over all ranks.
    pub(super) fn lacking(&self, from: &Layout, to: &Layout) -> usize {
        // Ranks that differ along dims that neither splits hold and want the same.
        let positions = self.positions(from.splitting | to.splitting);
        let common = |nth: &usize| overlap_numel(self.ranges(from, *nth), self.ranges(to, *nth));
        let n_alike = self.n_ranks() / positions.len();
        self.held_numel(to) - n_alike * positions.iter().map(common).sum::<usize>()
    }

    /// True if the ranks along `mesh_dim` together hold what each of them wants, every element once.
    pub(super) fn adds_up(&self, mesh_dim: usize, from: &Layout, to: &Layout) -> bool {
        let stride: usize = self.mesh_shape[mesh_dim + 1..].iter().product();
        let n = self.mesh_shape[mesh_dim];
        (0..self.n_ranks()).all(|nth| {
            let first = nth - nth / stride % n * stride;
            let wanted = self.ranges(to, nth);
            let along = (0..n).map(|i| overlap_numel(self.ranges(from, first + i * stride), wanted));
            along.sum::<usize>() == wanted.iter().map(Range::len).product::<usize>()
        })
    }

    /// Ranks along `mesh_dims` together.
    pub(super) fn group_size(&self, mesh_dims: impl Iterator<Item = usize>) -> usize {
        mesh_dims.map(|dim| self.mesh_shape[dim]).product()
    }

    /// The mesh dims over which `to` gathers the shards of `from`, if that is all that differs and the shards along
    /// them tile what each rank wants.
    pub(super) fn gathered_dims(&self, from: &[Placement], to: &[Placement]) -> Option<Vec<usize>> {
        let changed: Vec<usize> =
            (0..from.len()).filter(|dim| from[*dim] != to[*dim] && self.mesh_shape[*dim] > 1).collect();
        let gathers = changed.iter().all(|dim| to[*dim] == Placement::Replicate && !from[*dim].is_partial());
        (gathers && self.tiles(from, &changed)).then_some(changed)
    }

    /// True if the ranks along `mesh_dims` hold chunks of one box: no later mesh dim outside of them splits the same
    /// tensor dim further.
    fn tiles(&self, placements: &[Placement], mesh_dims: &[usize]) -> bool {
        mesh_dims.iter().all(|dim| {
            let mut later = (*dim + 1..placements.len()).filter(|other| !mesh_dims.contains(other));
            later.all(|other| placements[other] != placements[*dim] || self.mesh_shape[other] == 1)
        })
    }

    fn n_ranks(&self) -> usize {
        self.mesh_shape.iter().product()
    }

    /// What the `nth` rank holds.
    fn ranges<'l>(&self, layout: &'l Layout, nth: usize) -> &'l [Range<usize>] {
        &layout.ranges[nth * self.shape.len()..][..self.shape.len()]
    }

    fn positions(&self, dims: u128) -> Rc<[usize]> {
        let find = || {
            let first = |nth: &usize| {
                let at = coordinate(self.mesh_shape, *nth);
                at.iter().enumerate().all(|(dim, index)| *index == 0 || dims >> dim & 1 == 1)
            };
            (0..self.n_ranks()).filter(first).collect()
        };
        Rc::clone(self.positions.borrow_mut().entry(dims).or_insert_with(find))
    }
}

/// Number of elements that two boxes have in common.
fn overlap_numel(a: &[Range<usize>], b: &[Range<usize>]) -> usize {
    a.iter().zip(b).map(|(a, b)| a.end.min(b.end).saturating_sub(a.start.max(b.start))).product()
}

/// The coordinate of the `nth` position of a row-major mesh.
pub(crate) fn coordinate(mesh_shape: &[usize], nth: usize) -> Vec<usize> {
    let mut left = nth;
    let mut at = vec![0; mesh_shape.len()];
    for dim in (0..mesh_shape.len()).rev() {
        at[dim] = left % mesh_shape[dim];
        left /= mesh_shape[dim];
    }
    at
}
