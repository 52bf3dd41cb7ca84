//! What each rank of a mesh holds under given placements, and how many elements a step moves. Pure.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::step::Action;
use crate::{Placement, TensorBox, local_box};

/// One tensor on one mesh; remembers the boxes of placements that it was asked for.
pub(super) struct Geometry<'a> {
    pub(super) shape: &'a [usize],
    pub(super) mesh_shape: &'a [usize],
    boxes: RefCell<HashMap<Vec<Placement>, Rc<[TensorBox]>>>,
}

impl<'a> Geometry<'a> {
    pub(super) fn new(shape: &'a [usize], mesh_shape: &'a [usize]) -> Self {
        Self { shape, mesh_shape, boxes: RefCell::default() }
    }

    /// The box of each coordinate of the mesh, row-major.
    fn boxes(&self, placements: &[Placement]) -> Rc<[TensorBox]> {
        if let Some(known) = self.boxes.borrow().get(placements) {
            return Rc::clone(known);
        }
        let n_ranks = self.mesh_shape.iter().product::<usize>();
        let held =
            |nth| local_box(self.shape, self.mesh_shape, &coordinate(self.mesh_shape, nth), placements);
        let boxes: Rc<[TensorBox]> = (0..n_ranks).map(held).collect();
        self.boxes.borrow_mut().insert(placements.to_vec(), Rc::clone(&boxes));
        boxes
    }

    fn numel(&self, placements: &[Placement]) -> usize {
        self.boxes(placements).iter().map(TensorBox::numel).sum()
    }

    /// Elements of `to` that the ranks do not hold under `from`, over all ranks.
    fn lacking(&self, from: &[Placement], to: &[Placement]) -> usize {
        let (held, wanted) = (self.boxes(from), self.boxes(to));
        let each = held.iter().zip(wanted.iter());
        each.map(|(held, wanted)| wanted.numel() - wanted.overlap_numel(held)).sum()
    }

    /// Ranks along `mesh_dims` together.
    fn group_size(&self, mesh_dims: &[usize]) -> usize {
        mesh_dims.iter().map(|dim| self.mesh_shape[*dim]).product()
    }

    /// Elements that all ranks receive in a reduction over `mesh_dims` that leaves the tensor under `to`: each rank
    /// takes the others' terms of the part that it reduces, and from an all_reduce also the others' results.
    pub(super) fn reduction_numel(&self, mesh_dims: &[usize], action: &Action, to: &[Placement]) -> usize {
        let n = self.group_size(mesh_dims);
        match action {
            Action::AllReduce { .. } => 2 * (n - 1) * (self.numel(to) / n),
            _ => (n - 1) * self.numel(to),
        }
    }

    /// The one step between placements of which the same reductions are pending, and what it moves; `None` if they
    /// are equal.
    pub(super) fn movement(&self, from: &[Placement], to: &[Placement]) -> Option<(Action, usize)> {
        if from == to {
            return None;
        }
        let lacking = self.lacking(from, to);
        let action = if lacking == 0 {
            Action::Slice
        } else if let Some(mesh_dims) = self.gathered_dims(from, to) {
            Action::AllGather { mesh_dims }
        } else {
            Action::Exchange
        };
        Some((action, lacking))
    }

    /// The mesh dims over which `to` gathers the shards of `from`, if that is all that differs and the shards along
    /// them tile what each rank wants.
    fn gathered_dims(&self, from: &[Placement], to: &[Placement]) -> Option<Vec<usize>> {
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

    /// True if no rank wants what it does not hold.
    pub(super) fn shrinks(&self, from: &[Placement], to: &[Placement]) -> bool {
        self.boxes(from).iter().zip(self.boxes(to).iter()).all(|(held, wanted)| held.contains(wanted))
    }

    /// True if the ranks along `mesh_dim` together hold what each of them wants, every element once.
    pub(super) fn adds_up(&self, mesh_dim: usize, from: &[Placement], to: &[Placement]) -> bool {
        let (held, wanted) = (self.boxes(from), self.boxes(to));
        let stride: usize = self.mesh_shape[mesh_dim + 1..].iter().product();
        let n = self.mesh_shape[mesh_dim];
        (0..held.len()).all(|nth| {
            let first = nth - nth / stride % n * stride;
            let along = (0..n).map(|i| held[first + i * stride].overlap_numel(&wanted[nth]));
            along.sum::<usize>() == wanted[nth].numel()
        })
    }
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
