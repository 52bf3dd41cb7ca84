//! Carries exchange plans out: any number of tensors in one all_to_all, each byte from where it lies to where it
//! belongs, with nothing staged but what crosses between ranks.

use std::ops::Range;

use sconce_mesh::ProcessGroup;

use super::ExchangePlan;
use super::exchange::Transfer;
use crate::{Error, LocalTensor, Result, TensorBox, copy_runs};

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
/// `ShapeMismatch` if a tensor's boxes are not its plan's, `DTypeMismatch` if source and destination differ; what the
/// tensors and the collective report.
pub fn exchange(group: &ProcessGroup, moves: &mut [Move<'_>]) -> Result<()> {
    moves.iter().try_for_each(check)?;
    for item in moves.iter_mut() {
        copy_own(item)?;
    }
    let n_ranks = group.size();
    let (mut outgoing, mut incoming) = (Lanes::new(n_ranks), Lanes::new(n_ranks));
    for (nth, item) in moves.iter().enumerate() {
        let size = item.src.dtype().size_bytes();
        for transfer in &item.plan.send {
            outgoing
                .push(transfer.peer, Part::packed(nth, transfer, Side::source(&item.plan, transfer), size));
        }
        for transfer in &item.plan.recv {
            incoming
                .push(transfer.peer, Part::packed(nth, transfer, Side::target(&item.plan, transfer), size));
        }
    }
    let (send, recv) = (outgoing.counts.clone(), incoming.counts.clone());
    let moves = std::cell::RefCell::new(moves);
    let fill = |to: sconce_mesh::GroupRank, _offset: usize, bytes: &mut [u8]| {
        let moves = moves.borrow();
        outgoing.walk(to.0, bytes.len(), &mut |part, chunk| {
            let src = moves[part.item].src;
            src.read_box(part.index, &mut |held| {
                part.copy(chunk.clone(), |at, run| bytes[at].copy_from_slice(&held[run]))
            })
        })
    };
    let drain = |from: sconce_mesh::GroupRank, _offset: usize, bytes: &[u8]| {
        let mut moves = moves.borrow_mut();
        incoming.walk(from.0, bytes.len(), &mut |part, chunk| {
            let dst = &mut moves[part.item].dst;
            dst.write_box(part.index, &mut |wanted| {
                part.copy(chunk.clone(), |at, run| wanted[run].copy_from_slice(&bytes[at]))
            })
        })
    };
    group.all_to_all_streamed(&send, &recv, fill, drain)
}

fn check(item: &Move<'_>) -> Result<()> {
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
    let (expected, got) = (item.src.dtype(), item.dst.dtype());
    if expected != got {
        return Err(Error::DTypeMismatch { what: "an exchange's destination".into(), expected, got });
    }
    Ok(())
}

/// Bytes of a rank's own elements that are copied at a time, through a buffer that stays in the cache: source and
/// destination may share a lock, so that they cannot be lent at once.
const OWN_CHUNK: usize = 256 << 10;

fn copy_own(item: &mut Move<'_>) -> Result<()> {
    let size = item.src.dtype().size_bytes();
    let longest = item.plan.own.iter().map(|t| t.piece.numel() * size).max().unwrap_or(0);
    let mut buffer = vec![0; longest.min(OWN_CHUNK)];
    for transfer in &item.plan.own {
        let mut from = Part::packed(0, transfer, Side::source(&item.plan, transfer), size);
        let mut to = Part::packed(0, transfer, Side::target(&item.plan, transfer), size);
        while from.left > 0 {
            let chunk = 0..from.left.min(OWN_CHUNK);
            item.src.read_box(transfer.src_box, &mut |held| {
                from.copy(chunk.clone(), |at, run| buffer[at].copy_from_slice(&held[run]));
            })?;
            item.dst.write_box(transfer.dst_box, &mut |wanted| {
                to.copy(chunk.clone(), |at, run| wanted[run].copy_from_slice(&buffer[at]));
            })?;
        }
    }
    Ok(())
}

/// One end of a transfer: the box that holds the piece, and which of the rank's boxes it is.
struct Side<'p> {
    outer: &'p TensorBox,
    index: usize,
}

impl<'p> Side<'p> {
    fn source(plan: &'p ExchangePlan, transfer: &Transfer) -> Self {
        Self { outer: &plan.held[transfer.src_box], index: transfer.src_box }
    }

    fn target(plan: &'p ExchangePlan, transfer: &Transfer) -> Self {
        Self { outer: &plan.wanted[transfer.dst_box], index: transfer.dst_box }
    }
}

/// A piece of a box whose bytes are taken in row-major order, some at a time.
pub(super) struct Part {
    /// Which move it belongs to.
    item: usize,
    /// Which box of the tensor.
    index: usize,
    /// Byte ranges inside the box that are still to come.
    runs: Box<dyn Iterator<Item = Range<usize>>>,
    /// What is left of the run that was begun.
    begun: Range<usize>,
    /// Bytes still to come, `begun` included.
    left: usize,
}

impl Part {
    fn packed(item: usize, transfer: &Transfer, side: Side<'_>, size: usize) -> Self {
        Self { item, ..Self::new(&transfer.piece, side.outer, side.index, size) }
    }

    /// `piece` of the box `outer`, of elements of `size` bytes.
    pub(super) fn new(piece: &TensorBox, outer: &TensorBox, index: usize, size: usize) -> Self {
        let runs = copy_runs(piece, outer, piece).map(move |run| run.src * size..(run.src + run.len) * size);
        Self { item: 0, index, runs: Box::new(runs), begun: 0..0, left: piece.numel() * size }
    }

    /// The next bytes, as many as `chunk` of a buffer is long: where each lies in the buffer, and where in the box.
    pub(super) fn copy(&mut self, mut chunk: Range<usize>, mut each: impl FnMut(Range<usize>, Range<usize>)) {
        self.left -= chunk.len();
        while !chunk.is_empty() {
            if self.begun.is_empty() {
                let Some(next) = self.runs.next() else { unreachable!("a piece is as long as its runs") };
                self.begun = next;
            }
            let len = chunk.len().min(self.begun.len());
            each(chunk.start..chunk.start + len, self.begun.start..self.begun.start + len);
            chunk.start += len;
            self.begun.start += len;
        }
    }
}

/// What goes to, or comes from, each other rank: pieces one after the other.
struct Lanes {
    counts: Vec<usize>,
    parts: Vec<std::collections::VecDeque<Part>>,
}

impl Lanes {
    fn new(n_ranks: usize) -> Self {
        Self { counts: vec![0; n_ranks], parts: (0..n_ranks).map(|_| Default::default()).collect() }
    }

    fn push(&mut self, peer: usize, part: Part) {
        self.counts[peer] += part.left;
        self.parts[peer].push_back(part);
    }

    /// Hands `take` the parts that the next `len` bytes of a peer's lane cover, and which of these bytes each covers.
    fn walk(
        &mut self,
        peer: usize,
        len: usize,
        take: &mut dyn FnMut(&mut Part, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut at = 0;
        while at < len {
            let Some(part) = self.parts[peer].front_mut() else {
                unreachable!("a lane is as long as its count")
            };
            let chunk = at..at + part.left.min(len - at);
            at = chunk.end;
            take(part, chunk)?;
            if part.left == 0 {
                self.parts[peer].pop_front();
            }
        }
        Ok(())
    }
}
