//! Backend: the small object-safe contract between a process group and what moves its bytes.
//!
//! It knows bytes and dtypes, not Rust element types, and checks no arguments: `collective.rs` has done so.

mod call;
#[cfg(feature = "cuda")]
pub(crate) mod device;
#[cfg(feature = "test-faults")]
pub(crate) mod faulted;
pub(crate) mod fingerprint;
pub(crate) mod local;
#[cfg(feature = "mpi")]
pub(crate) mod mpi;
#[cfg(feature = "nccl")]
pub(crate) mod nccl;
pub(crate) mod pieces;
pub(crate) mod recorded;
pub(crate) mod reduce;
pub(crate) mod solo;
#[cfg(any(feature = "nccl", test))]
pub(crate) mod splits;

pub(crate) use call::{Call, CallName};

use std::sync::Arc;
use std::time::Duration;

use crate::{Error, GroupRank, Rank, ReduceOp, Result};

/// What a rank must know of a group to join it.
pub(crate) struct Membership {
    pub(crate) group: String,
    pub(crate) ranks: Arc<[Rank]>,
    pub(crate) group_rank: usize,
    pub(crate) timeout: Duration,
}

/// What a rank tells the ranks of a parent group before groups of it are made.
pub(crate) struct Invitation {
    pub(crate) text: String,
    /// The door behind the text, if this rank opened one.
    pub(crate) offer: Option<local::Offer>,
}

/// One rank's membership of a world: what makes its groups. Dropping it leaves the world.
pub(crate) trait WorldBackend: Send + Sync {
    /// Prepares for the group of `ranks`, if this rank gets a new one.
    fn invite(&self, ranks: Option<&[Rank]>) -> Result<Invitation>;

    /// Joins the new group, if any; `texts` are the invitations of all ranks of the parent, who all call it.
    ///
    /// # Errors
    /// `Timeout`, `PeerLost`, `Backend`.
    fn open(
        &self,
        group: Option<Membership>,
        invitation: Invitation,
        texts: &[(Rank, String)],
    ) -> Result<Option<Box<dyn Backend>>>;

    /// Opens the channel between the two ranks of `channel`, of which the first sends.
    ///
    /// # Errors
    /// `Timeout` if the other rank does not come; `PeerLost`, `Backend`.
    fn channel(&self, channel: Membership) -> Result<Box<dyn Backend>>;
}

/// The text of `rank`; empty if it is not among them.
pub(crate) fn text_of(texts: &[(Rank, String)], rank: Rank) -> &str {
    texts.iter().find(|(other, _)| *other == rank).map_or("", |(_, text)| text)
}

/// Fills bytes of the part for a group rank, from an offset in that part.
pub(crate) type Fill<'f> = dyn FnMut(usize, usize, &mut [u8]) -> Result<()> + 'f;

/// Takes bytes of the part from a group rank, from an offset in that part.
pub(crate) type Drain<'d> = dyn FnMut(usize, usize, &[u8]) -> Result<()> + 'd;

/// One rank's end of one group.
///
/// Call order: all ranks of the group issue the same calls in the same order. A backend that can tell answers
/// `Mismatch` on every rank where they do not.
///
/// Units: every count is in bytes and a multiple of the element size of `call.dtype`; there is one count per
/// group rank. *Pieces* are slices whose concatenation is the logical buffer. It may be longer than the pieces
/// together: what would be written past their end is dropped, what would be read there is zero.
///
/// Errors: after the first error a group is failed and answers every later call with that error.
pub(crate) trait Backend: Send + Sync {
    /// Returns once every rank has called it.
    fn barrier(&self) -> Result<()>;

    /// Copies the buffer of `root` over every other rank's.
    fn broadcast(&self, call: Call, buffer: &mut [u8], root: GroupRank) -> Result<()>;

    /// Replaces every rank's buffer by the reduction of all, in group-rank order, so with equal bits.
    fn all_reduce(&self, call: Call, buffer: &mut [u8], op: ReduceOp) -> Result<()>;

    /// Writes all inputs, in group-rank order, to the output pieces. `counts[g]` bytes come from rank g.
    fn all_gather(&self, call: Call, input: &[u8], counts: &[usize], output: &mut [&mut [u8]]) -> Result<()>;

    /// Reduces the inputs and leaves part g, `counts[g]` bytes, in the output of rank g.
    fn reduce_scatter(
        &self,
        call: Call,
        op: ReduceOp,
        input: &[&[u8]],
        counts: &[usize],
        output: &mut [u8],
    ) -> Result<()>;

    /// Sends part g of `input` to rank g. `send[g]` and `receive[g]` bytes go to and come from rank g; the even
    /// form (all counts equal) is told by `call.name` so that ranks need not compare their counts.
    fn all_to_all(
        &self,
        call: Call,
        input: &[u8],
        send: &[usize],
        output: &mut [u8],
        receive: &[usize],
    ) -> Result<()>;

    /// `all_gather` whose result goes to `drain` in pieces, each rank's in ascending order, this one's included.
    fn all_gather_streamed(
        &self,
        call: Call,
        input: &[u8],
        counts: &[usize],
        drain: &mut Drain<'_>,
    ) -> Result<()> {
        let mut output = aligned(counts.iter().sum());
        let output = &mut bytemuck::cast_slice_mut(&mut output)[..counts.iter().sum()];
        self.all_gather(call, input, counts, &mut [output])?;
        let starts = pieces::offsets(counts);
        (0..counts.len()).try_for_each(|g| drain(g, 0, &output[starts[g]..][..counts[g]]))
    }

    /// Uneven `all_to_all` whose parts are made and taken in pieces, each rank's in ascending order. No rank sends to
    /// itself. Where a backend has no way of its own, the parts are staged.
    fn all_to_all_streamed(
        &self,
        call: Call,
        send: &[usize],
        receive: &[usize],
        fill: &mut Fill<'_>,
        drain: &mut Drain<'_>,
    ) -> Result<()> {
        let (mut input, mut output) = (aligned(send.iter().sum()), aligned(receive.iter().sum()));
        let input = &mut bytemuck::cast_slice_mut(&mut input)[..send.iter().sum()];
        let output = &mut bytemuck::cast_slice_mut(&mut output)[..receive.iter().sum()];
        let (from, to) = (pieces::offsets(send), pieces::offsets(receive));
        (0..send.len()).try_for_each(|g| fill(g, 0, &mut input[from[g]..][..send[g]]))?;
        self.all_to_all(call, input, send, output, receive)?;
        (0..receive.len()).try_for_each(|g| drain(g, 0, &output[to[g]..][..receive[g]]))
    }

    /// Returns once every rank has called it for the same collective, which the ranks then carry out by other means.
    /// `counts` are those of all ranks, or none if they differ from rank to rank.
    #[cfg(feature = "nccl")]
    fn roll_call(&self, call: Call, op: Option<ReduceOp>, counts: &[usize]) -> Result<()>;

    /// Looks, without waiting, whether the group is well as far as this rank can tell.
    #[cfg(feature = "nccl")]
    fn watch(&self) -> Result<()> {
        self.failure().map_or(Ok(()), Err)
    }

    /// Fails the group on every rank, with `Aborted` naming this one; pending calls return too.
    fn abort(&self);

    /// Why the group failed, if it did.
    fn failure(&self) -> Option<Error>;
}

/// Room for `len_bytes` bytes that may be viewed as any element type.
fn aligned(len_bytes: usize) -> Vec<u64> {
    vec![0; len_bytes.div_ceil(8)]
}
