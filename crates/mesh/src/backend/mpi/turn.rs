//! Turn: one collective under way, in stages: on this host, between the hosts' leaders, on this host again.
//!
//! Reductions go rank by rank on each host and then host by host, in the order of `placement.rs`, by the same kernels as
//! in shared memory: the order depends on the ranks' places alone, and every rank gets the bits that one rank made.

use std::sync::Arc;

use super::block::Block;
use super::group::{MpiGroup, Trouble};
use super::notice::Cause;
use super::wire::{Parcel, Stop};
use crate::backend::fingerprint::{FINGERPRINT_BYTES, Fingerprint};
use crate::backend::local::Endpoint;
use crate::backend::pieces::{Sink, Source, offsets};
use crate::backend::reduce::partial::Partial;
use crate::backend::reduce::reduce;
use crate::backend::{Backend as _, Call, CallName};
use crate::{DType, Error, GroupRank, Rank, ReduceOp, Result};

/// Bytes that all ranks together carry in one round.
const ROUND_BYTES: usize = 16 << 20;
/// Longest reduction that every leader makes by itself instead of a section of it.
const ONE_EXCHANGE: usize = 32 << 10;
/// Sections start on a cache line.
const LINE: usize = 64;

const GATHER: Call = Call::new(CallName::AllGather, DType::U8);
const SPREAD: Call = Call::rooted(CallName::Broadcast, DType::U8, GroupRank(0));

pub(super) struct Turn<'a> {
    pub(super) group: &'a MpiGroup,
    pub(super) call: &'a Fingerprint,
}

impl<'a> Turn<'a> {
    /// The group in shared memory, if all its ranks are on this host.
    pub(super) fn on_one_host(&self) -> Option<&'a Endpoint> {
        let inner = self.group.inner.as_ref().filter(|_| self.n_hosts() == 1)?;
        inner.set_patience(self.group.patience_on_host());
        Some(inner)
    }

    pub(super) fn done_on_host(&self, result: Result<()>) -> Result<(), Trouble> {
        result.map_err(|error| self.group.trouble_on_host(error))
    }

    /// Compares all ranks' calls.
    pub(super) fn agree(&self) -> Result<(), Trouble> {
        let mut own = [0; FINGERPRINT_BYTES];
        self.call.write(&mut own);
        let all = self.all_gather_records(&own)?;
        let expected = Fingerprint::read(&all[0]);
        for (g, got) in all.iter().map(|bytes| Fingerprint::read(bytes)).enumerate() {
            if got != expected {
                return Err(self.mismatch(0, expected.describe(), g, got.describe()));
            }
        }
        Ok(())
    }

    /// Compares what each rank sends with what the others expect; returns the longest part of any pair.
    pub(super) fn agree_on_counts(&self, send: &[usize], receive: &[usize]) -> Result<usize, Trouble> {
        let n = self.n_ranks();
        let own: Vec<u64> = send.iter().chain(receive).map(|count| *count as u64).collect();
        let all = self.all_gather_records(bytemuck::cast_slice(&own))?;
        let counts: Vec<Vec<u64>> = all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect();
        for (from, to) in (0..n).flat_map(|from| (0..n).map(move |to| (from, to))) {
            let (sent, expected) = (counts[from][to], counts[to][n + from]);
            if sent != expected {
                let sender = format!("{} sending {sent} bytes to group rank {to}", self.call.name());
                let receiver =
                    format!("{} expecting {expected} bytes from group rank {from}", self.call.name());
                return Err(self.mismatch(from, sender, to, receiver));
            }
        }
        Ok(counts.iter().flat_map(|counts| &counts[..n]).copied().max().unwrap_or(0) as usize)
    }

    pub(super) fn broadcast(&self, buffer: &mut [u8], root: usize) -> Result<(), Trouble> {
        let (root_host, root_place) = self.group.placement.locate(root);
        let is_root_host = self.host() == root_host;
        for chunk in buffer.chunks_mut(ROUND_BYTES) {
            if is_root_host && let Some(inner) = self.inner(self.group.patience_on_host()) {
                self.done_on_host(inner.broadcast(SPREAD, chunk, GroupRank(root_place)))?;
            }
            if self.leads() {
                self.broadcast_across(chunk, root_host)?;
            }
            if !is_root_host {
                self.spread(chunk)?;
            }
        }
        Ok(())
    }

    /// The root's leader sends each leader a part, and the leaders exchange the parts, so that none sends all twice.
    fn broadcast_across(&self, chunk: &mut [u8], root_host: usize) -> Result<(), Trouble> {
        let (n, host, len) = (self.n_hosts(), self.host(), chunk.len());
        let part_len = if len <= ONE_EXCHANGE { len } else { len.div_ceil(n - 1) };
        // The part that a host passes on; with short chunks every host gets the whole at once.
        let nth = |h: usize| if h < root_host { h } else { h.saturating_sub(1) };
        let whole = part_len == len;
        let part = |h: usize| if whole { 0..len } else { self::part(len, part_len, nth(h)) };
        let lens: Vec<usize> =
            (0..n).map(|h| if h == root_host && host != root_host { part(host).len() } else { 0 }).collect();
        let out = |h: usize| (host == root_host).then(|| Arc::new(Block::of(&chunk[part(h)])));
        let mut blocks = self.across(out, &lens)?;
        if host == root_host {
            return Ok(());
        }
        let own = Arc::new(blocks.swap_remove(root_host));
        chunk[part(host)].copy_from_slice(own.bytes());
        if whole {
            return Ok(());
        }
        let others: Vec<bool> = (0..n).map(|h| h != root_host && h != host).collect();
        let lens: Vec<usize> = (0..n).map(|h| if others[h] { part(h).len() } else { 0 }).collect();
        let blocks = self.across(|h| others[h].then(|| Arc::clone(&own)), &lens)?;
        for (h, block) in blocks.iter().enumerate().filter(|(h, _)| others[*h]) {
            chunk[part(h)].copy_from_slice(block.bytes());
        }
        Ok(())
    }

    pub(super) fn all_reduce(&self, buffer: &mut [u8], dtype: DType, op: ReduceOp) -> Result<(), Trouble> {
        let partial = Partial::new(dtype, op, self.n_ranks());
        for chunk in buffer.chunks_mut(ROUND_BYTES / 2) {
            let mut sum = Block::zeroed(partial.len(chunk.len()));
            partial.widen(chunk, sum.bytes_mut());
            self.reduce_on_host(sum.bytes_mut(), partial)?;
            if self.leads() {
                self.reduce_across(sum.bytes_mut(), partial)?;
                partial.finish(sum.bytes_mut(), chunk);
            }
            self.spread(chunk)?;
        }
        Ok(())
    }

    pub(super) fn all_gather(
        &self,
        input: &[u8],
        counts: &[usize],
        output: &mut [&mut [u8]],
    ) -> Result<(), Trouble> {
        let (starts, mut output, per_rank) = (offsets(counts), Sink::new(output), self.per_rank());
        for round in 0..rounds(counts, per_rank) {
            let chunks: Vec<_> = counts.iter().map(|count| part(*count, per_rank, round)).collect();
            let lens: Vec<usize> = chunks.iter().map(|chunk| chunk.len()).collect();
            let own = &input[part(input.len(), per_rank, round)];
            let all = self.gather_all(own, &lens)?;
            let mut at = 0;
            for g in self.group.placement.carried() {
                output.write(starts[g] + chunks[g].start, &all.bytes()[at..at + lens[g]]);
                at += lens[g];
            }
        }
        Ok(())
    }

    pub(super) fn reduce_scatter(
        &self,
        (dtype, op): (DType, ReduceOp),
        input: &[&[u8]],
        counts: &[usize],
        output: &mut [u8],
    ) -> Result<(), Trouble> {
        let partial = Partial::new(dtype, op, self.n_ranks());
        let (starts, input, per_rank) = (offsets(counts), Source::new(input), self.per_rank());
        for round in 0..rounds(counts, per_rank) {
            let chunks: Vec<_> = counts.iter().map(|count| part(*count, per_rank, round)).collect();
            let lens: Vec<usize> = chunks.iter().map(|chunk| chunk.len()).collect();
            let mut carried = Block::zeroed(lens.iter().sum());
            let mut at = 0;
            for g in self.group.placement.carried() {
                input.read(starts[g] + chunks[g].start, &mut carried.bytes_mut()[at..at + lens[g]]);
                at += lens[g];
            }
            let own = self.reduce_to_hosts(&carried, &lens, partial)?;
            let before: usize =
                self.group.placement.mates().iter().take_while(|g| **g != self.me()).map(|g| lens[*g]).sum();
            output[chunks[self.me()].clone()].copy_from_slice(&own.bytes()[before..before + lens[self.me()]]);
        }
        Ok(())
    }

    /// Reduces what all ranks carry, and leaves this host its ranks' parts.
    fn reduce_to_hosts(&self, carried: &Block, lens: &[usize], partial: Partial) -> Result<Block, Trouble> {
        let by_host = self.group.placement.by_host(lens);
        let starts: Vec<usize> = offsets(&by_host).into_iter().map(|start| partial.len(start)).collect();
        let mut own = Block::zeroed(by_host[self.host()]);
        let mut sum = Block::zeroed(partial.len(carried.bytes().len()));
        partial.widen(carried.bytes(), sum.bytes_mut());
        self.reduce_on_host(sum.bytes_mut(), partial)?;
        if self.leads() {
            let section = |h: usize| Block::of(&sum.bytes()[starts[h]..starts[h] + partial.len(by_host[h])]);
            let len = partial.len(by_host[self.host()]);
            let mut blocks = self.across(|h| Some(Arc::new(section(h))), &vec![len; self.n_hosts()])?;
            blocks[self.host()] = section(self.host());
            let mut total = Block::zeroed(len);
            let sources: Vec<&[u8]> = blocks.iter().map(Block::bytes).collect();
            reduce(partial.dtype(), partial.op(), &sources, total.bytes_mut());
            partial.finish(total.bytes_mut(), own.bytes_mut());
        }
        self.spread(own.bytes_mut())?;
        Ok(own)
    }

    /// Every rank sends to every other by itself: there is nothing that a leader could join.
    pub(super) fn all_to_all(
        &self,
        input: &[u8],
        send: &[usize],
        output: &mut [u8],
        receive: &[usize],
        longest: usize,
    ) -> Result<(), Trouble> {
        let (from, to, per_rank, me) = (offsets(send), offsets(receive), self.per_rank(), self.me());
        output[to[me]..][..receive[me]].copy_from_slice(&input[from[me]..][..send[me]]);
        let others: Vec<usize> = (me + 1..me + self.n_ranks()).map(|g| g % self.n_ranks()).collect();
        for round in 0..rounds(&[longest], per_rank) {
            let parcel = |g: &usize| Parcel {
                peer: self.group.membership.ranks[*g].0,
                out: Some(Arc::new(Block::of(&input[from[*g]..][part(send[*g], per_rank, round)]))),
                len_in: part(receive[*g], per_rank, round).len(),
            };
            let blocks = self.exchange(others.iter().map(parcel).collect())?;
            for (g, block) in others.iter().zip(blocks) {
                output[to[*g]..][part(receive[*g], per_rank, round)].copy_from_slice(block.bytes());
            }
        }
        Ok(())
    }

    /// One record of the same length from every rank, by group rank.
    fn all_gather_records(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Trouble> {
        let all = self.gather_all(own, &vec![own.len(); self.n_ranks()])?;
        let mut records = vec![Vec::new(); self.n_ranks()];
        for (g, record) in self.group.placement.carried().zip(all.bytes().chunks(own.len().max(1))) {
            records[g] = record.to_vec();
        }
        Ok(records)
    }

    /// What all ranks give, in the order in which it is carried.
    fn gather_all(&self, own: &[u8], lens: &[usize]) -> Result<Block, Trouble> {
        let (mut all, host) = (Block::zeroed(lens.iter().sum()), self.gather_on_host(own, lens)?);
        if self.leads() {
            let by_host = self.group.placement.by_host(lens);
            let host = Arc::new(host);
            let blocks = self.across(|_| Some(Arc::clone(&host)), &by_host)?;
            for ((h, start), len) in offsets(&by_host).into_iter().enumerate().zip(&by_host) {
                let block = if h == self.host() { host.bytes() } else { blocks[h].bytes() };
                all.bytes_mut()[start..start + len].copy_from_slice(block);
            }
        }
        self.spread(all.bytes_mut())?;
        Ok(all)
    }

    /// What the ranks of this host give, on its leader.
    fn gather_on_host(&self, own: &[u8], lens: &[usize]) -> Result<Block, Trouble> {
        let Some(inner) = self.inner(self.group.patience_on_host()) else { return Ok(Block::of(own)) };
        let lens: Vec<usize> = self.group.placement.mates().iter().map(|g| lens[*g]).collect();
        let mut whole = Block::zeroed(if self.leads() { lens.iter().sum() } else { 0 });
        self.done_on_host(inner.all_gather(GATHER, own, &lens, &mut [whole.bytes_mut()]))?;
        Ok(whole)
    }

    /// The leader's bytes on all ranks of this host.
    fn spread(&self, bytes: &mut [u8]) -> Result<(), Trouble> {
        // Should another rank of this host be missing, the leader must know before other leaders miss it.
        let group = self.group;
        let patience = if self.leads() { group.patience_on_host() } else { group.patience_for_leader() };
        let Some(inner) = self.inner(patience) else { return Ok(()) };
        self.done_on_host(inner.broadcast(SPREAD, bytes, GroupRank(0)))
    }

    /// Leaves the reduction over this host on its leader: every rank reduces a section.
    fn reduce_on_host(&self, sum: &mut [u8], partial: Partial) -> Result<(), Trouble> {
        let Some(inner) = self.inner(self.group.patience_on_host()) else { return Ok(()) };
        let mates = self.group.placement.mates();
        let section_len = sum.len().div_ceil(mates.len()).next_multiple_of(LINE);
        let lens: Vec<usize> = (0..mates.len()).map(|at| part(sum.len(), section_len, at).len()).collect();
        let place = mates.iter().position(|g| *g == self.me()).unwrap_or(0);
        let mut own = Block::zeroed(lens[place]);
        let call = Call::new(CallName::ReduceScatter, partial.dtype());
        self.done_on_host(inner.reduce_scatter(call, partial.op(), &[sum], &lens, own.bytes_mut()))?;
        let mut leaders = [&mut sum[..]];
        let output = if self.leads() { &mut leaders[..] } else { &mut [] };
        self.done_on_host(inner.all_gather(GATHER, own.bytes(), &lens, output))
    }

    /// Replaces each leader's sum by that over all hosts: long ones by sections, of which each leader reduces one.
    fn reduce_across(&self, sum: &mut [u8], partial: Partial) -> Result<(), Trouble> {
        let (n, host) = (self.n_hosts(), self.host());
        let section_len =
            if sum.len() <= ONE_EXCHANGE { sum.len() } else { sum.len().div_ceil(n).next_multiple_of(LINE) };
        let whole = section_len == sum.len();
        let section = |h: usize| if whole { 0..sum.len() } else { part(sum.len(), section_len, h) };
        let sections: Vec<_> = (0..n).map(section).collect();
        let own = sections[host].clone();
        let mut blocks =
            self.across(|h| Some(Arc::new(Block::of(&sum[sections[h].clone()]))), &vec![own.len(); n])?;
        blocks[host] = Block::of(&sum[own.clone()]);
        let sources: Vec<&[u8]> = blocks.iter().map(Block::bytes).collect();
        let mut total = Block::zeroed(own.len());
        reduce(partial.dtype(), partial.op(), &sources, total.bytes_mut());
        sum[own].copy_from_slice(total.bytes());
        if whole {
            return Ok(());
        }
        let total = Arc::new(total);
        let lens: Vec<usize> = sections.iter().map(|section| section.len()).collect();
        let blocks = self.across(|_| Some(Arc::clone(&total)), &lens)?;
        for (h, block) in blocks.iter().enumerate().filter(|(h, _)| *h != host) {
            sum[sections[h].clone()].copy_from_slice(block.bytes());
        }
        Ok(())
    }

    /// Sends `out(h)` to the leader of each other host and receives `lens[h]` bytes from it; empty for this host.
    fn across(
        &self,
        out: impl Fn(usize) -> Option<Arc<Block>>,
        lens: &[usize],
    ) -> Result<Vec<Block>, Trouble> {
        let others: Vec<usize> = (0..self.n_hosts()).filter(|h| *h != self.host()).collect();
        let leader = |h: usize| self.group.membership.ranks[self.group.placement.hosts()[h][0]].0;
        let parcel = |h: &usize| Parcel { peer: leader(*h), out: out(*h), len_in: lens[*h] };
        let mut blocks = self.exchange(others.iter().map(parcel).collect())?;
        blocks.insert(self.host(), Block::zeroed(0));
        Ok(blocks)
    }

    fn exchange(&self, parcels: Vec<Parcel>) -> Result<Vec<Block>, Trouble> {
        let group = self.group;
        let exchanged = group.wire.exchange(parcels, group.tags, group.patience_across(), group.key);
        exchanged.map_err(|stop| match stop {
            Stop::Cause(cause) => Trouble::Cause(cause),
            Stop::Deadline(ranks) => Trouble::Cause(Cause::Timeout(ranks.into_iter().map(Rank).collect())),
            Stop::Fault(error) => Trouble::Error(error),
        })
    }

    fn mismatch(&self, expected_rank: usize, expected: String, got_rank: usize, got: String) -> Trouble {
        let ranks = &self.group.membership.ranks;
        Trouble::Error(Error::Mismatch {
            group: self.group.membership.group.clone(),
            seq: self.call.seq(),
            expected_rank: ranks[expected_rank],
            expected,
            got_rank: ranks[got_rank],
            got,
        })
    }

    fn inner(&self, patience: std::time::Duration) -> Option<&'a Endpoint> {
        let inner = self.group.inner.as_ref()?;
        inner.set_patience(patience);
        Some(inner)
    }

    fn me(&self) -> usize {
        self.group.membership.group_rank
    }

    fn n_ranks(&self) -> usize {
        self.group.membership.ranks.len()
    }

    fn host(&self) -> usize {
        self.group.placement.host()
    }

    fn n_hosts(&self) -> usize {
        self.group.placement.hosts().len()
    }

    fn leads(&self) -> bool {
        self.group.placement.leads()
    }

    /// Bytes of each rank in one round.
    fn per_rank(&self) -> usize {
        (ROUND_BYTES / self.n_ranks() / LINE * LINE).max(1 << 14)
    }
}

/// Rounds that it takes to move `counts`.
fn rounds(counts: &[usize], per_round: usize) -> usize {
    counts.iter().copied().max().unwrap_or(0).div_ceil(per_round)
}

/// The `index`-th part of `len` bytes cut into pieces of `part_len`; empty past the end.
fn part(len: usize, part_len: usize, index: usize) -> std::ops::Range<usize> {
    let start = (index * part_len).min(len);
    start..(start + part_len).min(len)
}
