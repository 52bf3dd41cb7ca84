//! Point to point: one rank sends, another receives, and no other rank takes part.
//!
//! Each direction between two ranks is a channel of its own, opened at its first use, so that neither ranks that send
//! to each other nor rings wait in a circle once the sends are issued asynchronously.

use super::check::{in_group, invalid};
use crate::backend::{Call, CallName};
use crate::{Element, GroupRank, ProcessGroup, Result};

impl ProcessGroup {
    /// Sends the buffer to group rank `to` and returns once that rank has received it.
    ///
    /// Shapes: `[n]` on both ranks.
    /// Ranks:  this one and `to`, which calls [`ProcessGroup::recv`] as many times, in the same order.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `to` or it is this one; `Mismatch` if `to` expects another length or
    /// dtype; what the group failed of, if it did.
    ///
    /// # Source
    /// `torch.distributed.send`, without tags. It never buffers, as `MPI_Ssend`: see
    /// [`ProcessGroup::issue_send`] for ranks that send to each other.
    pub fn send<T: Element>(&self, buffer: &[T], to: GroupRank) -> Result<()> {
        let channel = self.peer_channel("send", to, (self.group_rank(), to))?;
        let bytes = bytemuck::cast_slice(buffer);
        channel.backend()?.all_gather(call::<T>(), bytes, &[bytes.len(), 0], &mut [])
    }

    /// Receives the buffer from group rank `from`.
    ///
    /// Shapes: `[n]` on both ranks.
    /// Ranks:  this one and `from`, which calls [`ProcessGroup::send`] as many times, in the same order.
    ///
    /// # Errors
    /// As [`ProcessGroup::send`].
    ///
    /// # Source
    /// `torch.distributed.recv`, without tags and with a named source.
    pub fn recv<T: Element>(&self, buffer: &mut [T], from: GroupRank) -> Result<()> {
        let channel = self.peer_channel("recv", from, (from, self.group_rank()))?;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(buffer);
        channel.backend()?.all_gather(call::<T>(), &[], &[bytes.len(), 0], &mut [bytes])
    }

    fn peer_channel(
        &self,
        op: &'static str,
        peer: GroupRank,
        (from, to): (GroupRank, GroupRank),
    ) -> Result<ProcessGroup> {
        in_group(op, peer, self.size())?;
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        match self.lane(from, to) {
            Some(lane) => self.channel(&lane, from, to),
            None => Err(invalid(op, "peer", "another rank than this one".into(), peer)),
        }
    }
}

fn call<T: Element>() -> Call {
    Call::new(CallName::SendRecv, T::DTYPE)
}
