//! Who sends which elements to whom so that every rank gets exactly what it lacks. Pure.

use super::box_index::{BoxIndex, Place};
use crate::{Error, Result, TensorBox};

/// A piece of one tensor that moves from one rank's box to another's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Transfer {
    /// Position of the other rank in the group.
    pub(super) peer: usize,
    /// Which of the sender's boxes holds the piece.
    pub(super) src_box: usize,
    /// Which of the receiver's boxes takes it.
    pub(super) dst_box: usize,
    /// The elements, in coordinates of the global tensor.
    pub(super) piece: TensorBox,
}

/// What one rank sends and receives of one tensor to get from one layout to another.
///
/// Every rank computes its plan from the same two layouts, without communication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExchangePlan {
    pub(super) me: usize,
    pub(super) held: Vec<TensorBox>,
    pub(super) wanted: Vec<TensorBox>,
    /// To others, by receiver.
    pub(super) send: Vec<Transfer>,
    /// From others, by sender.
    pub(super) recv: Vec<Transfer>,
    /// From this rank's own boxes.
    pub(super) own: Vec<Transfer>,
}

impl ExchangePlan {
    /// The plan of group rank `me`, from the boxes that every rank holds to those that every rank wants.
    ///
    /// Several ranks may hold the same elements: each receiver takes its own copy first, then the next rank's
    /// after it in the group, so that replicas share the sending. `may_send(from, to)` limits who serves whom.
    ///
    /// # Errors
    /// `Uncovered` if some wanted element is held by nobody; the same on every rank.
    pub fn new(
        me: usize,
        held: &[Vec<TensorBox>],
        wanted: &[Vec<TensorBox>],
        may_send: &dyn Fn(usize, usize) -> bool,
    ) -> Result<Self> {
        let index = BoxIndex::new(held);
        let service = Service { held, disjoint: index.is_disjoint(), index, may_send };
        service.check_coverage(wanted)?;
        let (own, recv) = service.incoming(me, &wanted[me]).into_iter().partition(|t| t.peer == me);
        let send = (0..held.len()).filter(|to| *to != me);
        let send = send.flat_map(|to| service.outgoing(me, to, &wanted[to])).collect();
        Ok(Self { me, held: held[me].clone(), wanted: wanted[me].clone(), send, recv, own })
    }

    /// Number of elements that this rank receives from others.
    pub fn received_numel(&self) -> usize {
        self.recv.iter().map(|t| t.piece.numel()).sum()
    }
}

/// Who serves whom.
struct Service<'a> {
    held: &'a [Vec<TensorBox>],
    index: BoxIndex<'a>,
    /// No element is held twice.
    disjoint: bool,
    may_send: &'a dyn Fn(usize, usize) -> bool,
}

impl Service<'_> {
    /// What rank `to` receives, sorted by sender; its own pieces included.
    fn incoming(&self, to: usize, wanted: &[TensorBox]) -> Vec<Transfer> {
        let mut transfers = Vec::new();
        for (dst_box, want) in wanted.iter().enumerate() {
            for place in self.holders(want, to) {
                transfers.extend(self.transfers(place, to, dst_box, want, place.rank));
            }
        }
        transfers.sort_by_key(|t| (t.peer, t.src_box));
        transfers
    }

    /// What rank `from` sends to rank `to`, in the order in which `to` takes it.
    fn outgoing(&self, from: usize, to: usize, wanted: &[TensorBox]) -> Vec<Transfer> {
        let mut transfers = Vec::new();
        if (self.may_send)(from, to) {
            for (index, _) in self.held[from].iter().enumerate() {
                let place = Place { rank: from, index };
                let parts = wanted.iter().enumerate();
                transfers
                    .extend(parts.flat_map(|(dst_box, want)| self.transfers(place, to, dst_box, want, to)));
            }
        }
        transfers
    }

    /// The parts of `want` that `place` serves to `to`: those that no earlier holder serves.
    fn transfers(
        &self,
        place: Place,
        to: usize,
        dst_box: usize,
        want: &TensorBox,
        peer: usize,
    ) -> Vec<Transfer> {
        let Some(shared) = self.held[place.rank][place.index].intersect(want) else { return vec![] };
        let mut left = vec![shared];
        let others = if self.disjoint { vec![] } else { self.holders(&left[0], to) };
        for other in others.into_iter().filter(|other| self.turn(*other, to) < self.turn(place, to)) {
            let have = &self.held[other.rank][other.index];
            left = left.iter().flat_map(|part| part.subtract(have)).collect();
        }
        let transfer = |piece| Transfer { peer, src_box: place.index, dst_box, piece };
        left.into_iter().map(transfer).collect()
    }

    /// Boxes that overlap `want` and may be sent to `to`.
    fn holders(&self, want: &TensorBox, to: usize) -> Vec<Place> {
        let mut places = self.index.overlapping(want);
        places.retain(|place| (self.may_send)(place.rank, to));
        places
    }

    /// When the rank of `place` is asked by `to`: `to` itself first, then the ranks after it.
    fn turn(&self, place: Place, to: usize) -> (usize, usize) {
        let n_ranks = self.held.len();
        ((place.rank + n_ranks - to) % n_ranks, place.index)
    }

    /// Every wanted element is held by somebody who may send it; ranks that want the same of the same are looked at
    /// once.
    fn check_coverage(&self, wanted: &[Vec<TensorBox>]) -> Result<()> {
        let mut seen = std::collections::HashSet::new();
        for (to, wanted) in wanted.iter().enumerate() {
            for want in wanted.iter().filter(|want| !want.is_empty()) {
                if self.held[to].iter().any(|have| have.contains(want)) && (self.may_send)(to, to) {
                    continue;
                }
                let holders = self.holders(want, to);
                let shared = holders.iter().map(|at| self.held[at.rank][at.index].overlap_numel(want));
                if self.disjoint && shared.sum::<usize>() == want.numel()
                    || seen.contains(&(want, holders.clone()))
                {
                    continue;
                }
                let have = holders.iter().map(|place| &self.held[place.rank][place.index]);
                if let Some(missing) = crate::boxes::uncovered_by(want, have).first() {
                    let what = format!("exchange to group rank {to}");
                    let (shape, missing) = (want.sizes.clone(), missing.to_string());
                    return Err(Error::Uncovered { what, shape, missing });
                }
                seen.insert((want, holders));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
