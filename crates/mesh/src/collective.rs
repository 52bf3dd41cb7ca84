//! The collectives of a process group, typed: every argument check stands here, once, above all backends.
//!
//! Lengths and counts are in elements. Empty buffers are fine everywhere. A collective is called by all ranks of
//! the group, in the same order; where ranks differ in what they call, all get `Mismatch`.
//!
//! All return, besides what they say: `Mismatch`; `PeerLost` if a rank of the world died or one of the group left;
//! `Timeout` naming who arrived and who did not; `Aborted`; and, after any of these, the same error at every later
//! call. `InvalidArgument` alone concerns only the caller, sends nothing and leaves the group as it was.

mod check;
#[cfg(feature = "cuda")]
mod device;
mod objects;
mod p2p;
mod rooted;
mod streamed;

pub(crate) use self::check::in_group;
use self::check::{len_is, n_counts, total};
use crate::backend::{Call, CallName};
use crate::{Element, GroupRank, ProcessGroup, ReduceOp, Result};

impl ProcessGroup {
    /// Returns once every rank of the group has called it.
    ///
    /// # Source
    /// `torch.distributed.barrier`.
    pub fn barrier(&self) -> Result<()> {
        self.backend()?.barrier()
    }

    /// Copies the buffer of `root` to all other ranks.
    ///
    /// Shapes: `[n]` on every rank.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `root`.
    ///
    /// # Source
    /// `torch.distributed.broadcast`, but `root` is a group rank.
    pub fn broadcast<T: Element>(&self, buffer: &mut [T], root: GroupRank) -> Result<()> {
        in_group("broadcast", root, self.size())?;
        let call = Call::rooted(CallName::Broadcast, T::DTYPE, root);
        self.backend()?.broadcast(call, bytemuck::cast_slice_mut(buffer), root)
    }

    /// Replaces the buffer by the reduction of all ranks' buffers, with the same bits on every rank.
    ///
    /// Shapes: `[n]` on every rank.
    ///
    /// # Source
    /// `torch.distributed.all_reduce`.
    pub fn all_reduce<T: Element>(&self, buffer: &mut [T], op: ReduceOp) -> Result<()> {
        self.backend()?.all_reduce(call::<T>(CallName::AllReduce), bytemuck::cast_slice_mut(buffer), op)
    }

    /// Gathers the inputs of all ranks, in group-rank order.
    ///
    /// Shapes: `[n]` → `[group_size · n]`.
    ///
    /// # Errors
    /// `InvalidArgument` if `output` has another length.
    ///
    /// # Source
    /// `torch.distributed.all_gather_into_tensor`.
    pub fn all_gather_into<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        len_is("all_gather_into", "length of output", self.size().checked_mul(input.len()), output.len())?;
        self.all_gather_bytes(&vec![input.len(); self.size()], input, &mut [output])
    }

    /// Gathers the inputs of all ranks straight into many slices, whose concatenation is the output.
    ///
    /// Shapes: `[n]` → slices of at most `group_size · n` elements together. The output may be *shorter* than what
    /// is gathered: the excess, which is padding, is dropped.
    ///
    /// # Errors
    /// `InvalidArgument` if the slices are longer than what is gathered.
    pub fn all_gather_vectored<T: Element>(&self, input: &[T], output: &mut [&mut [T]]) -> Result<()> {
        let got = output.iter().map(|slice| slice.len()).sum();
        check::at_most("all_gather_vectored", "length of output", self.size().checked_mul(input.len()), got)?;
        self.all_gather_bytes(&vec![input.len(); self.size()], input, output)
    }

    /// Gathers inputs of different lengths; `counts[g]` elements come from group rank g.
    ///
    /// Shapes: `[counts[group_rank]]` → `[Σ counts]`.
    ///
    /// # Errors
    /// `InvalidArgument` if there is not one count a rank, or a length does not fit the counts.
    ///
    /// # Source
    /// `torch.distributed.all_gather` with a list of tensors of different sizes.
    pub fn all_gather_uneven<T: Element>(
        &self,
        input: &[T],
        counts: &[usize],
        output: &mut [T],
    ) -> Result<()> {
        const OP: &str = "all_gather_uneven";
        n_counts(OP, "number of counts", self.size(), counts.len())?;
        len_is(OP, "length of input", Some(counts[self.group_rank().0]), input.len())?;
        len_is(OP, "length of output", total(counts), output.len())?;
        self.all_gather_bytes(counts, input, &mut [output])
    }

    /// Reduces all inputs and leaves part `group_rank` of the result in `output`.
    ///
    /// Shapes: `[group_size · n]` → `[n]`.
    ///
    /// # Errors
    /// `InvalidArgument` if `input` has another length.
    ///
    /// # Source
    /// `torch.distributed.reduce_scatter_tensor`.
    pub fn reduce_scatter<T: Element>(&self, input: &[T], output: &mut [T], op: ReduceOp) -> Result<()> {
        len_is("reduce_scatter", "length of input", self.size().checked_mul(output.len()), input.len())?;
        self.reduce_scatter_bytes(&vec![output.len(); self.size()], &[input], output, op)
    }

    /// [`ProcessGroup::reduce_scatter`] of an input that is the concatenation of many slices.
    ///
    /// Shapes: slices of at most `group_size · n` elements together → `[n]`. What is missing at the end of the
    /// input, which is padding, counts as zeros.
    ///
    /// # Errors
    /// `InvalidArgument` if the slices are longer than `group_size · n`.
    pub fn reduce_scatter_vectored<T: Element>(
        &self,
        input: &[&[T]],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        let got = input.iter().map(|slice| slice.len()).sum();
        check::at_most(
            "reduce_scatter_vectored",
            "length of input",
            self.size().checked_mul(output.len()),
            got,
        )?;
        self.reduce_scatter_bytes(&vec![output.len(); self.size()], input, output, op)
    }

    /// Reduces all inputs and leaves `counts[group_rank]` elements in `output`, after those of the ranks before.
    ///
    /// Shapes: `[Σ counts]` → `[counts[group_rank]]`.
    ///
    /// # Errors
    /// `InvalidArgument` if there is not one count a rank, or a length does not fit the counts.
    ///
    /// # Source
    /// `torch.distributed.reduce_scatter` with a list of tensors of different sizes.
    pub fn reduce_scatter_uneven<T: Element>(
        &self,
        input: &[T],
        counts: &[usize],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        const OP: &str = "reduce_scatter_uneven";
        n_counts(OP, "number of counts", self.size(), counts.len())?;
        len_is(OP, "length of input", total(counts), input.len())?;
        len_is(OP, "length of output", Some(counts[self.group_rank().0]), output.len())?;
        self.reduce_scatter_bytes(counts, &[input], output, op)
    }

    /// Sends part g of the input to group rank g, and receives one part from each.
    ///
    /// Shapes: `[group_size · n]` → `[group_size · n]`.
    ///
    /// # Errors
    /// `InvalidArgument` if the lengths differ or are no multiple of the group size.
    ///
    /// # Source
    /// `torch.distributed.all_to_all_single`.
    pub fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        const OP: &str = "all_to_all";
        len_is(OP, "length of output", Some(input.len()), output.len())?;
        let counts = vec![input.len() / self.size(); self.size()];
        len_is(OP, "length of input, a multiple of the group size", total(&counts), input.len())?;
        self.all_to_all_bytes(CallName::AllToAll, input, &counts, output, &counts)
    }

    /// Sends `send_counts[g]` elements to group rank g and receives `receive_counts[g]` from it.
    ///
    /// Shapes: `[Σ send_counts]` → `[Σ receive_counts]`. Parts lie in group-rank order.
    ///
    /// # Errors
    /// `InvalidArgument` if there is not one count a rank, or a length does not fit the counts; `Mismatch` on all
    /// ranks if one expects another count than is sent to it.
    ///
    /// # Source
    /// `torch.distributed.all_to_all_single` with split sizes.
    pub fn all_to_all_uneven<T: Element>(
        &self,
        input: &[T],
        send_counts: &[usize],
        output: &mut [T],
        receive_counts: &[usize],
    ) -> Result<()> {
        const OP: &str = "all_to_all_uneven";
        n_counts(OP, "number of send counts", self.size(), send_counts.len())?;
        n_counts(OP, "number of receive counts", self.size(), receive_counts.len())?;
        len_is(OP, "length of input", total(send_counts), input.len())?;
        len_is(OP, "length of output", total(receive_counts), output.len())?;
        let me = self.group_rank().0;
        len_is(OP, "count this rank receives from itself", Some(send_counts[me]), receive_counts[me])?;
        self.all_to_all_bytes(CallName::AllToAllUneven, input, send_counts, output, receive_counts)
    }

    fn all_gather_bytes<T: Element>(
        &self,
        counts: &[usize],
        input: &[T],
        output: &mut [&mut [T]],
    ) -> Result<()> {
        let mut output: Vec<&mut [u8]> =
            output.iter_mut().map(|slice| bytemuck::cast_slice_mut(slice)).collect();
        let call = call::<T>(CallName::AllGather);
        self.backend()?.all_gather(call, bytemuck::cast_slice(input), &in_bytes::<T>(counts), &mut output)
    }

    fn reduce_scatter_bytes<T: Element>(
        &self,
        counts: &[usize],
        input: &[&[T]],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        let input: Vec<&[u8]> = input.iter().map(|slice| bytemuck::cast_slice(slice)).collect();
        let (call, output) = (call::<T>(CallName::ReduceScatter), bytemuck::cast_slice_mut(output));
        self.backend()?.reduce_scatter(call, op, &input, &in_bytes::<T>(counts), output)
    }

    fn all_to_all_bytes<T: Element>(
        &self,
        name: CallName,
        input: &[T],
        send: &[usize],
        output: &mut [T],
        receive: &[usize],
    ) -> Result<()> {
        let (send, receive) = (in_bytes::<T>(send), in_bytes::<T>(receive));
        let (input, output) = (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(output));
        self.backend()?.all_to_all(call::<T>(name), input, &send, output, &receive)
    }
}

fn call<T: Element>(name: CallName) -> Call {
    Call::new(name, T::DTYPE)
}

/// Counts of elements that exist as slices, so that the products fit.
fn in_bytes<T: Element>(counts: &[usize]) -> Vec<usize> {
    counts.iter().map(|count| count * size_of::<T>()).collect()
}

#[cfg(test)]
mod tests;
