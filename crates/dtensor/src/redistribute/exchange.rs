//! Who sends which elements to whom so that every rank gets exactly what it lacks. The plan is pure; `exchange`
//! carries any number of plans out in one all_to_all.

use sconce_mesh::ProcessGroup;

use crate::{CopyRun, Error, LocalTensor, Result, TensorBox, copy_runs};

/// A piece of one tensor that moves from one rank's box to another's.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Transfer {
    /// Position of the other rank in the group.
    peer: usize,
    /// Which of the sender's boxes holds the piece.
    src_box: usize,
    /// Which of the receiver's boxes takes it.
    dst_box: usize,
    /// The elements, in coordinates of the global tensor.
    piece: TensorBox,
}

/// What one rank sends and receives of one tensor to get from one layout to another.
///
/// Every rank computes its plan from the same two layouts, without communication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExchangePlan {
    me: usize,
    held: Vec<TensorBox>,
    wanted: Vec<TensorBox>,
    send: Vec<Transfer>,
    recv: Vec<Transfer>,
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
        let mut plan =
            Self { me, held: held[me].clone(), wanted: wanted[me].clone(), send: vec![], recv: vec![] };
        for (to, wanted) in wanted.iter().enumerate() {
            let incoming = incoming(to, held, wanted, may_send)?;
            if to == me {
                plan.recv = incoming;
            } else {
                let from_me = incoming.into_iter().filter(|t| t.peer == me);
                plan.send.extend(from_me.map(|t| Transfer { peer: to, ..t }));
            }
        }
        Ok(plan)
    }

    /// Number of elements that this rank receives from others.
    pub fn received_numel(&self) -> usize {
        self.recv.iter().filter(|t| t.peer != self.me).map(|t| t.piece.numel()).sum()
    }
}

/// What rank `to` receives, sorted by sender; its own pieces included.
fn incoming(
    to: usize,
    held: &[Vec<TensorBox>],
    wanted: &[TensorBox],
    may_send: &dyn Fn(usize, usize) -> bool,
) -> Result<Vec<Transfer>> {
    let n_ranks = held.len();
    let mut transfers = Vec::new();
    for (dst_box, want) in wanted.iter().enumerate() {
        let mut left = if want.is_empty() { vec![] } else { vec![want.clone()] };
        for peer in (0..n_ranks).map(|hop| (to + hop) % n_ranks).filter(|peer| may_send(*peer, to)) {
            for (src_box, have) in held[peer].iter().enumerate() {
                let pieces = left.iter().filter_map(|part| part.intersect(have));
                transfers.extend(pieces.map(|piece| Transfer { peer, src_box, dst_box, piece }));
                left = left.iter().flat_map(|part| part.subtract(have)).collect();
            }
            if left.is_empty() {
                break;
            }
        }
        if let Some(missing) = left.first() {
            let what = format!("exchange to group rank {to}");
            return Err(Error::Uncovered { what, shape: want.sizes.clone(), missing: missing.to_string() });
        }
    }
    transfers.sort_by_key(|t| t.peer);
    Ok(transfers)
}

/// One tensor on its way from one layout to another.
pub struct Move<'t> {
    /// Who sends what.
    pub plan: ExchangePlan,
    /// What this rank holds now: the boxes that the plan was made from.
    pub src: &'t dyn LocalTensor,
    /// What this rank wants: filled.
    pub dst: &'t mut dyn LocalTensor,
}

/// Carries out all `moves` in one all_to_all.
///
/// Ranks: collective over `group`; every rank passes the same tensors in the same order.
///
/// # Errors
/// `ShapeMismatch` if a tensor's boxes are not its plan's; whatever the collective reports.
pub fn exchange(group: &ProcessGroup, moves: &mut [Move<'_>]) -> Result<()> {
    moves.iter().try_for_each(check_boxes)?;
    let n_ranks = group.size();
    let mut outgoing: Vec<Vec<u8>> = vec![Vec::new(); n_ranks];
    for item in moves.iter() {
        pack(item, &mut outgoing)?;
    }
    let send_counts: Vec<usize> = outgoing.iter().map(Vec::len).collect();
    let recv_counts = recv_counts(moves, n_ranks);
    let mut incoming = vec![0u8; recv_counts.iter().sum()];
    group.all_to_all_uneven(&outgoing.concat(), &send_counts, &mut incoming, &recv_counts)?;
    let mut starts = exclusive_sums(&recv_counts);
    for item in moves.iter_mut() {
        unpack(item, &incoming, &mut starts)?;
    }
    Ok(())
}

fn check_boxes(item: &Move<'_>) -> Result<()> {
    for (role, tensor, expected) in
        [("source", item.src, &item.plan.held), ("destination", &*item.dst, &item.plan.wanted)]
    {
        if tensor.local_boxes() != expected {
            return Err(Error::ShapeMismatch {
                what: format!("boxes of an exchange's {role}"),
                expected: expected.iter().flat_map(|b| b.sizes.clone()).collect(),
                got: tensor.local_boxes().iter().flat_map(|b| b.sizes.clone()).collect(),
            });
        }
    }
    Ok(())
}

fn recv_counts(moves: &[Move<'_>], n_ranks: usize) -> Vec<usize> {
    let mut counts = vec![0; n_ranks];
    for item in moves {
        for transfer in item.plan.recv.iter().filter(|t| t.peer != item.plan.me) {
            counts[transfer.peer] += transfer.piece.numel() * item.dst.dtype().size_bytes();
        }
    }
    counts
}

fn exclusive_sums(counts: &[usize]) -> Vec<usize> {
    counts.iter().scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect()
}

/// Appends every piece that others need, row-major, to their buffers; copies this rank's own to a buffer of its own.
fn pack(item: &Move<'_>, outgoing: &mut [Vec<u8>]) -> Result<()> {
    let size = item.src.dtype().size_bytes();
    for transfer in &item.plan.send {
        let (piece, have) = (&transfer.piece, &item.plan.held[transfer.src_box]);
        let buffer = &mut outgoing[transfer.peer];
        item.src.read_box(transfer.src_box, &mut |bytes| {
            for CopyRun { src, len, .. } in copy_runs(piece, have, piece) {
                buffer.extend_from_slice(&bytes[src * size..(src + len) * size]);
            }
        })?;
    }
    Ok(())
}

fn unpack(item: &mut Move<'_>, incoming: &[u8], starts: &mut [usize]) -> Result<()> {
    let size = item.dst.dtype().size_bytes();
    for transfer in &item.plan.recv {
        let (piece, want) = (&transfer.piece, &item.plan.wanted[transfer.dst_box]);
        if transfer.peer == item.plan.me {
            copy_own(item.src, item.dst, &item.plan, transfer)?;
            continue;
        }
        let start = starts[transfer.peer];
        starts[transfer.peer] += piece.numel() * size;
        let received = &incoming[start..starts[transfer.peer]];
        item.dst.write_box(transfer.dst_box, &mut |bytes| {
            for CopyRun { src, dst, len } in copy_runs(piece, piece, want) {
                bytes[dst * size..(dst + len) * size]
                    .copy_from_slice(&received[src * size..(src + len) * size]);
            }
        })?;
    }
    Ok(())
}

/// Copies a piece that this rank holds already. The source's lock is released before the destination's is taken:
/// the two may alias.
fn copy_own(
    src: &dyn LocalTensor,
    dst: &mut dyn LocalTensor,
    plan: &ExchangePlan,
    own: &Transfer,
) -> Result<()> {
    let size = src.dtype().size_bytes();
    let (have, want) = (&plan.held[own.src_box], &plan.wanted[own.dst_box]);
    let mut piece = Vec::with_capacity(own.piece.numel() * size);
    src.read_box(own.src_box, &mut |bytes| {
        for CopyRun { src, len, .. } in copy_runs(&own.piece, have, &own.piece) {
            piece.extend_from_slice(&bytes[src * size..(src + len) * size]);
        }
    })?;
    dst.write_box(own.dst_box, &mut |bytes| {
        for CopyRun { src, dst, len } in copy_runs(&own.piece, &own.piece, want) {
            bytes[dst * size..(dst + len) * size].copy_from_slice(&piece[src * size..(src + len) * size]);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_boxes;

    #[test]
    fn a_rank_that_holds_what_it_wants_receives_nothing() {
        let whole = vec![vec![TensorBox::whole(&[4])]; 3];
        let plan = ExchangePlan::new(1, &whole, &whole, &|_, _| true).unwrap();
        assert_eq!((plan.received_numel(), plan.send.len()), (0, 0));
    }

    #[test]
    fn flat_runs_to_rows_receive_exactly_what_is_lacking() {
        // 3 ranks hold 10 elements of a [5, 2] tensor as runs 0..4, 4..8, 8..10 and want rows 0..2, 2..4, 4..5.
        let held: Vec<_> = [(0, 4), (4, 4), (8, 2)].map(|(s, n)| run_boxes(&[5, 2], s, n)).to_vec();
        let wanted: Vec<_> = [(0, 4), (4, 4), (8, 2)].map(|(s, n)| run_boxes(&[5, 2], s, n)).to_vec();
        let shifted: Vec<_> = [(0, 3), (3, 5), (8, 2)].map(|(s, n)| run_boxes(&[5, 2], s, n)).to_vec();
        let same: usize = (0..3)
            .map(|me| ExchangePlan::new(me, &held, &wanted, &|_, _| true).unwrap().received_numel())
            .sum();
        let moved: usize = (0..3)
            .map(|me| ExchangePlan::new(me, &shifted, &wanted, &|_, _| true).unwrap().received_numel())
            .sum();
        assert_eq!((same, moved), (0, 1));
    }

    #[test]
    fn an_element_that_nobody_holds_is_named() {
        let held = vec![vec![TensorBox { offsets: vec![0], sizes: vec![3] }]];
        let refused = ExchangePlan::new(0, &held, &[vec![TensorBox::whole(&[4])]], &|_, _| true).unwrap_err();
        let expected = "exchange to group rank 0: no rank holds box [3]+[1] of shape [4]";
        assert_eq!(refused.to_string(), expected);
    }
}
