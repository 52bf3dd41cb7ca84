//! DeviceBackend: the contract between a process group and what moves bytes between CUDA devices, beside the group's own
//! backend for host memory. As that one, it checks no arguments: `collective/device.rs` has done so.

mod staged;

pub(crate) use staged::Staged;

use super::{Backend, Call};
use crate::cuda::{CudaBytes, CudaBytesMut};
use crate::{GroupRank, ReduceOp, Result};

/// One rank's end of one group, for memory of its CUDA device.
///
/// Every method is given the group's backend for host memory, `host`, over which ranks find each other, agree on what they
/// call, and learn of each other's failures. Units and pieces are as for [`Backend`]: bytes, and slices whose concatenation
/// is the logical buffer. A call returns once its results are there.
///
/// Errors: `InvalidArgument` before anything was sent; after any other the group is failed on all ranks.
pub(crate) trait DeviceBackend: Send + Sync {
    /// Copies the buffer of `root` over every other rank's.
    fn broadcast(
        &self,
        host: &dyn Backend,
        call: Call,
        buffer: &mut CudaBytesMut<'_>,
        root: GroupRank,
    ) -> Result<()>;

    /// Replaces every rank's buffer by the reduction of all, with equal bits.
    fn all_reduce(
        &self,
        host: &dyn Backend,
        call: Call,
        buffer: &mut CudaBytesMut<'_>,
        op: ReduceOp,
    ) -> Result<()>;

    /// Writes all inputs, in group-rank order, to the output pieces. `counts[g]` bytes come from rank g.
    fn all_gather(
        &self,
        host: &dyn Backend,
        call: Call,
        input: &CudaBytes<'_>,
        counts: &[usize],
        output: &mut [CudaBytesMut<'_>],
    ) -> Result<()>;

    /// Reduces the inputs and leaves part g, `counts[g]` bytes, in the output of rank g.
    fn reduce_scatter(
        &self,
        host: &dyn Backend,
        call: (Call, ReduceOp),
        input: &[CudaBytes<'_>],
        counts: &[usize],
        output: &mut CudaBytesMut<'_>,
    ) -> Result<()>;

    /// Sends part g of `input` to rank g; `send[g]` and `receive[g]` bytes go to and come from rank g.
    fn all_to_all(&self, host: &dyn Backend, call: Call, parts: Parts<'_, '_, '_>) -> Result<()>;
}

/// What an `all_to_all` sends and receives; part g begins where part g - 1 ends.
pub(crate) struct Parts<'p, 'i, 'o> {
    pub(crate) input: &'p CudaBytes<'i>,
    pub(crate) send: &'p [usize],
    pub(crate) output: &'p mut CudaBytesMut<'o>,
    pub(crate) receive: &'p [usize],
}
