//! Staged: CUDA memory through host memory and the group's backend for that. It needs no NCCL, and serves several ranks on
//! one device; every byte crosses the bus twice.

use super::{DeviceBackend, Parts};
use crate::backend::{Backend, Call, aligned};
use crate::cuda::{CudaBytes, CudaBytesMut, read_chunks, write_chunks};
use crate::{GroupRank, ReduceOp, Result};

pub(crate) struct Staged;

impl DeviceBackend for Staged {
    fn broadcast(
        &self,
        host: &dyn Backend,
        call: Call,
        buffer: &mut CudaBytesMut<'_>,
        root: GroupRank,
    ) -> Result<()> {
        let mut staged = Host::of(&buffer.to_read())?;
        host.broadcast(call, staged.bytes_mut(), root)?;
        staged.put(buffer)
    }

    fn all_reduce(
        &self,
        host: &dyn Backend,
        call: Call,
        buffer: &mut CudaBytesMut<'_>,
        op: ReduceOp,
    ) -> Result<()> {
        let mut staged = Host::of(&buffer.to_read())?;
        host.all_reduce(call, staged.bytes_mut(), op)?;
        staged.put(buffer)
    }

    fn all_gather(
        &self,
        host: &dyn Backend,
        call: Call,
        input: &CudaBytes<'_>,
        counts: &[usize],
        output: &mut [CudaBytesMut<'_>],
    ) -> Result<()> {
        let input = Host::of(input)?;
        let mut gathered: Vec<Host> = output.iter().map(|piece| Host::zeros(piece.len_bytes())).collect();
        let mut pieces: Vec<&mut [u8]> = gathered.iter_mut().map(Host::bytes_mut).collect();
        host.all_gather(call, input.bytes(), counts, &mut pieces)?;
        gathered.iter().zip(output).try_for_each(|(staged, piece)| staged.put(piece))
    }

    fn reduce_scatter(
        &self,
        host: &dyn Backend,
        (call, op): (Call, ReduceOp),
        input: &[CudaBytes<'_>],
        counts: &[usize],
        output: &mut CudaBytesMut<'_>,
    ) -> Result<()> {
        let input = input.iter().map(Host::of).collect::<Result<Vec<_>>>()?;
        let pieces: Vec<&[u8]> = input.iter().map(Host::bytes).collect();
        let mut reduced = Host::zeros(output.len_bytes());
        host.reduce_scatter(call, op, &pieces, counts, reduced.bytes_mut())?;
        reduced.put(output)
    }

    fn all_to_all(&self, host: &dyn Backend, call: Call, parts: Parts<'_, '_, '_>) -> Result<()> {
        let Parts { input, send, output, receive } = parts;
        let (input, mut received) = (Host::of(input)?, Host::zeros(output.len_bytes()));
        host.all_to_all(call, input.bytes(), send, received.bytes_mut(), receive)?;
        received.put(output)
    }
}

/// A copy in host memory, aligned for any element type.
struct Host {
    words: Vec<u64>,
    len_bytes: usize,
}

impl Host {
    fn zeros(len_bytes: usize) -> Host {
        Host { words: aligned(len_bytes), len_bytes }
    }

    fn of(device: &CudaBytes<'_>) -> Result<Host> {
        let mut host = Host::zeros(device.len_bytes());
        let bytes = host.bytes_mut();
        read_chunks(device, |at, chunk| bytes[at..at + chunk.len()].copy_from_slice(chunk))?;
        Ok(host)
    }

    fn put(&self, device: &mut CudaBytesMut<'_>) -> Result<()> {
        let bytes = self.bytes();
        write_chunks(device, |at, chunk| {
            let len = chunk.len();
            chunk.copy_from_slice(&bytes[at..at + len]);
        })
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len_bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len_bytes]
    }
}
