//! The collectives of tensors on CUDA devices: every argument check stands here, once, above all backends.
//!
//! They follow those of host memory: same order on all ranks, same errors, lengths and counts in elements. A call returns
//! once its result is there, so that nobody sees a buffer that is still written; [`ProcessGroup::issue`] makes it run beside
//! computation. Of NCCL's reductions all ranks get the same bits, but ranks are not combined in the order of the group.

use super::check::{at_most, in_group, invalid, len_is, n_counts, total};
use crate::backend::device::Parts;
use crate::backend::{Call, CallName};
use crate::cuda::{CudaBytes, CudaBytesMut};
use crate::{DType, GroupRank, ProcessGroup, ReduceOp, Result};

impl ProcessGroup {
    /// [`ProcessGroup::broadcast`] of device memory.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `root`.
    ///
    /// # Source
    /// `ncclBroadcast`.
    pub fn cuda_broadcast(&self, buffer: &mut CudaBytesMut<'_>, root: GroupRank) -> Result<()> {
        in_group("broadcast", root, self.size())?;
        let call = Call::rooted(CallName::Broadcast, buffer.dtype(), root);
        let received = if self.group_rank() == root { 0 } else { buffer.len_bytes() };
        self.on_device((call, None), (buffer.len_bytes(), received), |device, host| {
            device.broadcast(host, call, buffer, root)
        })
    }

    /// [`ProcessGroup::all_reduce`] of device memory.
    ///
    /// # Errors
    /// `InvalidArgument` for i16 through NCCL.
    ///
    /// # Source
    /// `ncclAllReduce`, in place.
    pub fn cuda_all_reduce(&self, buffer: &mut CudaBytesMut<'_>, op: ReduceOp) -> Result<()> {
        let call = Call::new(CallName::AllReduce, buffer.dtype());
        let bytes = buffer.len_bytes();
        self.on_device((call, Some(op)), (bytes, bytes), |device, host| {
            device.all_reduce(host, call, buffer, op)
        })
    }

    /// [`ProcessGroup::all_gather_vectored`] of device memory: one input a rank, all equally long, into many pieces.
    ///
    /// Shapes: `[n]` → pieces of at most `group_size · n` elements together; what does not fit is dropped.
    ///
    /// # Errors
    /// `InvalidArgument` if the pieces are longer than what is gathered, or of another dtype or device.
    ///
    /// # Source
    /// `ncclAllGather`.
    pub fn cuda_all_gather(&self, input: &CudaBytes<'_>, output: &mut [CudaBytesMut<'_>]) -> Result<()> {
        let limit = self.size().checked_mul(numel(input));
        let got = output.iter().map(|piece| piece.len_bytes() / piece.dtype().size_bytes()).sum();
        at_most("all_gather", "length of output", limit, got)?;
        self.gather_pieces(input, &vec![input.len_bytes(); self.size()], output)
    }

    /// [`ProcessGroup::all_gather_uneven`] of device memory.
    ///
    /// # Errors
    /// `InvalidArgument` if there is not one count a rank, a length does not fit the counts, or output is of another dtype
    /// or device.
    ///
    /// # Source
    /// `ncclSend` and `ncclRecv` in one group.
    pub fn cuda_all_gather_uneven(
        &self,
        input: &CudaBytes<'_>,
        counts: &[usize],
        output: &mut CudaBytesMut<'_>,
    ) -> Result<()> {
        const OP: &str = "all_gather_uneven";
        n_counts(OP, "number of counts", self.size(), counts.len())?;
        len_is(OP, "length of input", Some(counts[self.group_rank().0]), numel(input))?;
        len_is(OP, "length of output", total(counts), numel(&output.to_read()))?;
        let counts = in_bytes(counts, input.dtype());
        let len = output.len_bytes();
        self.gather_pieces(input, &counts, &mut [output.range_mut(0..len)])
    }

    /// [`ProcessGroup::reduce_scatter_vectored`] of device memory: pieces that together are the input, to one part a rank.
    ///
    /// Shapes: pieces of at most `group_size · n` elements together → `[n]`; what is missing at the end counts as zeros.
    ///
    /// # Errors
    /// `InvalidArgument` if the pieces are longer, or of another dtype or device; for i16 through NCCL.
    ///
    /// # Source
    /// `ncclReduceScatter`.
    pub fn cuda_reduce_scatter(
        &self,
        input: &[CudaBytes<'_>],
        output: &mut CudaBytesMut<'_>,
        op: ReduceOp,
    ) -> Result<()> {
        let limit = self.size().checked_mul(numel(&output.to_read()));
        at_most("reduce_scatter", "length of input", limit, input.iter().map(numel).sum())?;
        self.reduce_parts(input, &vec![output.len_bytes(); self.size()], output, op)
    }

    /// [`ProcessGroup::reduce_scatter_uneven`] of device memory.
    ///
    /// # Errors
    /// `InvalidArgument` if there is not one count a rank, a length does not fit the counts, or output is of another dtype
    /// or device; for i16 through NCCL.
    ///
    /// # Source
    /// One `ncclReduce` a rank, in one group.
    pub fn cuda_reduce_scatter_uneven(
        &self,
        input: &CudaBytes<'_>,
        counts: &[usize],
        output: &mut CudaBytesMut<'_>,
        op: ReduceOp,
    ) -> Result<()> {
        const OP: &str = "reduce_scatter_uneven";
        n_counts(OP, "number of counts", self.size(), counts.len())?;
        len_is(OP, "length of input", total(counts), numel(input))?;
        len_is(OP, "length of output", Some(counts[self.group_rank().0]), numel(&output.to_read()))?;
        let whole = input.range(0..input.len_bytes());
        self.reduce_parts(&[whole], &in_bytes(counts, input.dtype()), output, op)
    }

    /// [`ProcessGroup::all_to_all`] of device memory.
    ///
    /// # Errors
    /// `InvalidArgument` if lengths differ or are no multiple of the group size, or output is of another dtype or device.
    pub fn cuda_all_to_all(&self, input: &CudaBytes<'_>, output: &mut CudaBytesMut<'_>) -> Result<()> {
        const OP: &str = "all_to_all";
        len_is(OP, "length of output", Some(numel(input)), numel(&output.to_read()))?;
        let counts = vec![numel(input) / self.size(); self.size()];
        len_is(OP, "length of input, a multiple of the group size", total(&counts), numel(input))?;
        let counts = in_bytes(&counts, input.dtype());
        self.swap_parts(CallName::AllToAll, Parts { input, send: &counts, output, receive: &counts })
    }

    /// [`ProcessGroup::all_to_all_uneven`] of device memory.
    ///
    /// # Errors
    /// `InvalidArgument` if there is not one count a rank, a length does not fit the counts, or output is of another dtype
    /// or device; `Mismatch` on all ranks if one expects another count than is sent to it.
    ///
    /// # Source
    /// `ncclSend` and `ncclRecv` in one group.
    pub fn cuda_all_to_all_uneven(
        &self,
        input: &CudaBytes<'_>,
        send_counts: &[usize],
        output: &mut CudaBytesMut<'_>,
        receive_counts: &[usize],
    ) -> Result<()> {
        const OP: &str = "all_to_all_uneven";
        n_counts(OP, "number of send counts", self.size(), send_counts.len())?;
        n_counts(OP, "number of receive counts", self.size(), receive_counts.len())?;
        len_is(OP, "length of input", total(send_counts), numel(input))?;
        len_is(OP, "length of output", total(receive_counts), numel(&output.to_read()))?;
        let me = self.group_rank().0;
        len_is(OP, "count this rank receives from itself", Some(send_counts[me]), receive_counts[me])?;
        let (send, receive) = (in_bytes(send_counts, input.dtype()), in_bytes(receive_counts, input.dtype()));
        self.swap_parts(CallName::AllToAllUneven, Parts { input, send: &send, output, receive: &receive })
    }

    fn gather_pieces(
        &self,
        input: &CudaBytes<'_>,
        counts: &[usize],
        output: &mut [CudaBytesMut<'_>],
    ) -> Result<()> {
        let call = Call::new(CallName::AllGather, input.dtype());
        output.iter().try_for_each(|piece| alike(call, input, &piece.to_read()))?;
        let bytes: usize = counts.iter().sum();
        self.on_device((call, None), (bytes, bytes - input.len_bytes()), |device, host| {
            device.all_gather(host, call, input, counts, output)
        })
    }

    fn reduce_parts(
        &self,
        input: &[CudaBytes<'_>],
        counts: &[usize],
        output: &mut CudaBytesMut<'_>,
        op: ReduceOp,
    ) -> Result<()> {
        let call = Call::new(CallName::ReduceScatter, output.dtype());
        input.iter().try_for_each(|piece| alike(call, &output.to_read(), piece))?;
        let sizes = (counts.iter().sum(), (self.size() - 1) * output.len_bytes());
        self.on_device((call, Some(op)), sizes, |device, host| {
            device.reduce_scatter(host, (call, op), input, counts, output)
        })
    }

    fn swap_parts(&self, name: CallName, parts: Parts<'_, '_, '_>) -> Result<()> {
        let call = Call::new(name, parts.input.dtype());
        alike(call, parts.input, &parts.output.to_read())?;
        let received = parts.output.len_bytes() - parts.receive[self.group_rank().0];
        let sizes = (parts.input.len_bytes().max(parts.output.len_bytes()), received);
        self.on_device((call, None), sizes, |device, host| device.all_to_all(host, call, parts))
    }
}

fn numel(bytes: &CudaBytes<'_>) -> usize {
    bytes.len_bytes() / bytes.dtype().size_bytes()
}

/// Counts of elements that exist on a device, so that the products fit.
fn in_bytes(counts: &[usize], dtype: DType) -> Vec<usize> {
    counts.iter().map(|count| count * dtype.size_bytes()).collect()
}

/// Refuses memory of another dtype or device.
fn alike(call: Call, first: &CudaBytes<'_>, other: &CudaBytes<'_>) -> Result<()> {
    let op = call.name.name();
    if first.dtype() != other.dtype() {
        return Err(invalid(op, "dtype", first.dtype().to_string(), other.dtype()));
    }
    if first.context() != other.context() {
        let expected = format!("CUDA device {}", first.context().ordinal());
        return Err(invalid(op, "device", expected, format!("CUDA device {}", other.context().ordinal())));
    }
    Ok(())
}
