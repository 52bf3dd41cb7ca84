//! The collectives as rounds of an exchange: what each rank fills, and what it reads after the crossing.
//!
//! A round moves what fits in a half. Every function crosses at least one phase, also for empty buffers: there the
//! ranks compare their calls.

use super::copy::copier;
use super::exchange::Exchange;
use super::segment::DATA_BYTES;
use crate::backend::pieces::{Sink, Source, offsets};
use crate::backend::reduce::reduce;
use crate::backend::{Drain, Fill};
use crate::{DType, ReduceOp, Result};

/// Longest all_reduce in which every rank reduces everything after one crossing instead of two.
const ONE_CROSSING: usize = 32 << 10;

/// Sections and regions start on a cache line.
const LINE: usize = 64;

pub(super) fn broadcast<'a>(mut x: Exchange<'a>, buffer: &mut [u8], root: usize) -> Result<Exchange<'a>> {
    let copy_out = copier(buffer.len());
    for round in 0..rounds(buffer.len(), DATA_BYTES) {
        let chunk = part(buffer.len(), DATA_BYTES, round);
        if x.me() == root {
            x.fill()[..chunk.len()].copy_from_slice(&buffer[chunk]);
            x = x.cross()?;
        } else {
            x = x.cross()?;
            copy_out(&x.peer(root)[..chunk.len()], &mut buffer[chunk.clone()]);
        }
    }
    Ok(x)
}

pub(super) fn all_reduce<'a>(
    mut x: Exchange<'a>,
    buffer: &mut [u8],
    dtype: DType,
    op: ReduceOp,
) -> Result<Exchange<'a>> {
    if buffer.len() <= ONE_CROSSING {
        x.fill()[..buffer.len()].copy_from_slice(buffer);
        x = x.cross()?;
        let sources: Vec<&[u8]> = (0..x.ranks()).map(|g| &x.peer(g)[..buffer.len()]).collect();
        reduce(dtype, op, &sources, buffer);
        return Ok(x);
    }
    all_reduce_sections(x, buffer, dtype, op)
}

/// Every rank reduces one section of each chunk and passes it on to all.
///
/// ```text
/// round    passed on                                     taken
/// 0        terms of chunk 0                              -
/// 1        terms of chunk 1, my section of the sum of 0  the other sections of 0
/// …
/// chunks   my section of the sum of the last chunk       the other sections of the last
/// ```
///
/// The own section's place in a half is free for the sum, as nobody needs its term from there.
fn all_reduce_sections<'a>(
    mut x: Exchange<'a>,
    buffer: &mut [u8],
    dtype: DType,
    op: ReduceOp,
) -> Result<Exchange<'a>> {
    let (me, ranks, region) = (x.me(), x.ranks(), region_len(x.ranks()));
    let chunk_len = region * ranks;
    let n_chunks = rounds(buffer.len(), chunk_len);
    // Where section `g` of a chunk lies in the buffer.
    let section = |chunk: usize, g: usize, len: usize| {
        let chunk = part(len, chunk_len, chunk);
        let section_len = chunk.len().div_ceil(ranks).next_multiple_of(LINE);
        let section = part(chunk.len(), section_len, g);
        chunk.start + section.start..chunk.start + section.end
    };
    for round in 0..=n_chunks {
        if round > 0 {
            let own = section(round - 1, me, buffer.len());
            let (peers, fill) = x.views();
            let mut sources: Vec<&[u8]> =
                peers.into_iter().map(|peer| &peer[me * region..][..own.len()]).collect();
            sources[me] = &buffer[own.clone()];
            let sum = &mut fill[me * region..][..own.len()];
            reduce(dtype, op, &sources, sum);
            // Now, while it is in this core's cache.
            buffer[own].copy_from_slice(sum);
        }
        for g in x.others().filter(|_| round < n_chunks) {
            let term = section(round, g, buffer.len());
            x.fill()[g * region..][..term.len()].copy_from_slice(&buffer[term]);
        }
        x = x.cross()?;
        for g in x.others().filter(|_| round > 0) {
            let sum = section(round - 1, g, buffer.len());
            buffer[sum.clone()].copy_from_slice(&x.peer(g)[g * region..][..sum.len()]);
        }
    }
    Ok(x)
}

pub(super) fn all_gather<'a>(
    mut x: Exchange<'a>,
    input: &[u8],
    counts: &[usize],
    output: &mut [&mut [u8]],
) -> Result<Exchange<'a>> {
    let copy_out = copier(counts.iter().sum());
    let (starts, mut output) = (offsets(counts), Sink::copying(output, copy_out));
    for round in 0..rounds(longest(counts), DATA_BYTES) {
        let own = part(input.len(), DATA_BYTES, round);
        x.fill()[..own.len()].copy_from_slice(&input[own.clone()]);
        x = x.cross()?;
        output.write(starts[x.me()] + own.start, &input[own]);
        for g in x.others() {
            let chunk = part(counts[g], DATA_BYTES, round);
            output.write(starts[g] + chunk.start, &x.peer(g)[..chunk.len()]);
        }
    }
    Ok(x)
}

pub(super) fn all_gather_streamed<'a>(
    mut x: Exchange<'a>,
    input: &[u8],
    counts: &[usize],
    drain: &mut Drain<'_>,
) -> Result<Exchange<'a>> {
    for round in 0..rounds(longest(counts), DATA_BYTES) {
        let own = part(input.len(), DATA_BYTES, round);
        x.fill()[..own.len()].copy_from_slice(&input[own.clone()]);
        x = x.cross()?;
        drain(x.me(), own.start, &input[own])?;
        for g in x.others() {
            let chunk = part(counts[g], DATA_BYTES, round);
            drain(g, chunk.start, &x.peer(g)[..chunk.len()])?;
        }
    }
    Ok(x)
}

pub(super) fn reduce_scatter<'a>(
    mut x: Exchange<'a>,
    (dtype, op): (DType, ReduceOp),
    input: &[&[u8]],
    counts: &[usize],
    output: &mut [u8],
) -> Result<Exchange<'a>> {
    let (starts, input, region) = (offsets(counts), Source::new(input), region_len(x.ranks()));
    let (me, mut scratch) = (x.me(), Vec::new());
    for round in 0..rounds(longest(counts), region) {
        for g in x.others() {
            let chunk = part(counts[g], region, round);
            input.read(starts[g] + chunk.start, &mut x.fill()[g * region..][..chunk.len()]);
        }
        x = x.cross()?;
        let chunk = part(output.len(), region, round);
        let mut sources: Vec<&[u8]> =
            (0..x.ranks()).map(|g| &x.peer(g)[me * region..][..chunk.len()]).collect();
        sources[me] = own_part(&input, starts[me] + chunk.start, chunk.len(), &mut scratch);
        reduce(dtype, op, &sources, &mut output[chunk]);
    }
    Ok(x)
}

/// The bytes from `offset` where they lie, or copied to `scratch` if they lie in several pieces.
fn own_part<'a>(input: &Source<'a>, offset: usize, len: usize, scratch: &'a mut Vec<u64>) -> &'a [u8] {
    if let Some(bytes) = input.contiguous(offset, len) {
        return bytes;
    }
    scratch.resize(len.div_ceil(8), 0);
    let bytes = &mut bytemuck::cast_slice_mut(scratch)[..len];
    input.read(offset, bytes);
    bytes
}

pub(super) fn all_to_all<'a>(
    mut x: Exchange<'a>,
    input: &[u8],
    send: &[usize],
    output: &mut [u8],
    receive: &[usize],
    longest: usize,
) -> Result<Exchange<'a>> {
    let (from, to, region) = (offsets(send), offsets(receive), region_len(x.ranks()));
    let (me, copy_out) = (x.me(), copier(output.len()));
    copy_out(&input[from[me]..][..send[me]], &mut output[to[me]..][..receive[me]]);
    for round in 0..rounds(longest, region) {
        for g in x.others() {
            let chunk = part(send[g], region, round);
            x.fill()[g * region..][..chunk.len()].copy_from_slice(&input[from[g]..][chunk]);
        }
        x = x.cross()?;
        for g in x.others() {
            let chunk = part(receive[g], region, round);
            copy_out(&x.peer(g)[me * region..][..chunk.len()], &mut output[to[g]..][chunk]);
        }
    }
    Ok(x)
}

pub(super) fn all_to_all_streamed<'a>(
    mut x: Exchange<'a>,
    send: &[usize],
    receive: &[usize],
    (fill, drain): (&mut Fill<'_>, &mut Drain<'_>),
    longest: usize,
) -> Result<Exchange<'a>> {
    let (region, me) = (region_len(x.ranks()), x.me());
    for round in 0..rounds(longest, region) {
        for g in x.others() {
            let chunk = part(send[g], region, round);
            fill(g, chunk.start, &mut x.fill()[g * region..][..chunk.len()])?;
        }
        x = x.cross()?;
        for g in x.others() {
            let chunk = part(receive[g], region, round);
            drain(g, chunk.start, &x.peer(g)[me * region..][..chunk.len()])?;
        }
    }
    Ok(x)
}

/// Publishes what each rank sends and expects, and checks that they agree; returns the longest part of any pair.
///
/// # Errors
/// `Mismatch`, naming the first pair that disagrees.
pub(super) fn agree_on_counts<'a>(
    mut x: Exchange<'a>,
    send: &[usize],
    receive: &[usize],
) -> Result<(Exchange<'a>, usize)> {
    let counts: Vec<u64> = send.iter().chain(receive).map(|count| *count as u64).collect();
    x.fill()[..counts.len() * 8].copy_from_slice(bytemuck::cast_slice(&counts));
    x = x.cross()?;
    let count = |g: usize, at: usize| bytemuck::cast_slice::<u8, u64>(&x.peer(g)[..16 * x.ranks()])[at];
    let mut longest = 0;
    for (from, to) in (0..x.ranks()).flat_map(|from| (0..x.ranks()).map(move |to| (from, to))) {
        let (sent, expected) = (count(from, to), count(to, x.ranks() + from));
        if sent != expected {
            let sender = format!("{} sending {sent} bytes to group rank {to}", x.name());
            let receiver = format!("{} expecting {expected} bytes from group rank {from}", x.name());
            return Err(x.mismatch(from, sender, to, receiver));
        }
        longest = longest.max(sent as usize);
    }
    Ok((x, longest))
}

/// Rounds that it takes to move `len` bytes; at least one.
fn rounds(len: usize, per_round: usize) -> usize {
    len.div_ceil(per_round).max(1)
}

/// The `index`-th part of `len` bytes cut into pieces of `part_len`; empty past the end.
fn part(len: usize, part_len: usize, index: usize) -> std::ops::Range<usize> {
    let start = (index * part_len).min(len);
    start..(start + part_len).min(len)
}

fn longest(counts: &[usize]) -> usize {
    counts.iter().copied().max().unwrap_or(0)
}

/// Bytes of a half for each of `ranks` destinations.
fn region_len(ranks: usize) -> usize {
    DATA_BYTES / ranks / LINE * LINE
}
