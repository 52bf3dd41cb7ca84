//! Blocks of which several ranks want a part: one rank reads and verifies each and hands the others their pieces, so that
//! no byte is read twice, and none reaches a tensor but from the memory in which it was verified.
//!
//! ```text
//!           window 0     window 1                 one all-to-all a window, to each other rank:
//! rank 0   |b0 b1 …|    |b9 b12 …|                status | its pieces of b0 | of b1 | …
//! rank 1   |b4 b5 …|    |b13     |
//! ```
//!
//! A rank that has failed says so in its next status, and after that window all ranks stop together.

use std::ops::Range;

use sconce_mesh::{GroupRank, ProcessGroup, ReduceOp};

use super::Reads;
use super::blocks::{block_bytes, read_block};
use super::copy::open_file;
use super::division::Division;
use super::request;
use super::stream::{Cursor, Stream};
use super::takers::Takers;
use crate::coordinate::Ranks;
use crate::storage::PageBuffer;
use crate::{BLOCK_BYTES, Error, Result};

/// Bytes before the pieces of a window: as many as keep these aligned.
const STATUS_BYTES: usize = 64;
const WELL: u8 = 1;
const FAILED: u8 = 2;

/// One rank's side of the exchange.
pub(super) struct Exchange<'e, 'p> {
    reads: &'e Reads<'p>,
    group: &'e ProcessGroup,
    threads: usize,
    /// Blocks that a rank reads before it hands on what is in them, which is the memory that an exchange takes: one for
    /// each thread of the rank that has most, as they are still in a cache then. 4 ranks of a thread each turned 1 GiB of
    /// rows into columns in 170 ms, with 2 blocks in 200 to 240 and with 8 in 240 to 270.
    window: usize,
    division: &'e Division,
    /// What each rank gets of the blocks that this one reads.
    give: Vec<Stream>,
}

impl<'e, 'p> Exchange<'e, 'p> {
    /// Tells every rank what this one takes of the blocks that it reads.
    ///
    /// Ranks: collective.
    ///
    /// # Errors
    /// `Mesh`; `ValueMismatch` for ranks that do not understand each other.
    pub(super) fn prepare(
        reads: &'e Reads<'p>,
        (group, ranks): (&'e ProcessGroup, Ranks<'_>),
        division: &'e Division,
        takers: &Takers<'_, '_>,
    ) -> Result<Self> {
        let asked = request::trade(group, takers.asked())?;
        let threads = ranks.threads();
        let mut window = [threads as i64];
        group.all_reduce(&mut window, ReduceOp::Max)?;
        let me = group.group_rank().0;
        let places = division.places(reads.metadata);
        let mine = |file: usize, block: usize| places.of(file, block).filter(|(rank, _)| *rank == me);
        let stream = |asked: &Vec<u8>| {
            let items = request::decode(asked, reads.metadata)?;
            Ok(Stream::new(&division.shared[me], items, |file, block| Some(mine(file, block)?.1)))
        };
        let give = asked.iter().map(stream).collect::<Result<_>>()?;
        Ok(Self { reads, group, threads, window: window[0] as usize, division, give })
    }

    /// Reads, hands on and takes, window by window. A rank whose `outcome` is an error already only tells the others.
    ///
    /// Ranks: collective.
    ///
    /// # Errors
    /// This rank's own, or `Mesh`.
    pub(super) fn run(&self, takers: &mut Takers<'_, '_>, mut outcome: Result<()>) -> Result<()> {
        let longest = self.division.shared.iter().map(Vec::len).max().unwrap_or(0);
        let mut buffers: Vec<_> = (0..self.window).map(|_| PageBuffer::default()).collect();
        for nth in 0..longest.div_ceil(self.window) {
            let window = Window { exchange: self, nth };
            if outcome.is_ok() {
                outcome = window.read(&mut buffers).and_then(|()| window.keep(&buffers, takers));
            }
            let given = outcome.is_ok().then_some(buffers.as_slice());
            let has_failed = window.hand_on(given, takers, &mut outcome)?;
            if has_failed {
                break;
            }
        }
        outcome
    }
}

/// One window of every rank.
struct Window<'w, 'e, 'p> {
    exchange: &'w Exchange<'e, 'p>,
    nth: usize,
}

impl Window<'_, '_, '_> {
    /// The positions of a rank's blocks that are in it.
    fn blocks(&self, rank: usize) -> Range<usize> {
        let Exchange { window, division, .. } = self.exchange;
        let n = division.shared[rank].len();
        (self.nth * window).min(n)..((self.nth + 1) * window).min(n)
    }

    fn me(&self) -> usize {
        self.exchange.group.group_rank().0
    }

    /// Reads this rank's blocks and compares their checksums.
    fn read(&self, buffers: &mut [PageBuffer]) -> Result<()> {
        let Exchange { reads, division, threads, .. } = self.exchange;
        let blocks = &division.shared[self.me()][self.blocks(self.me())];
        let read = |(at, buffer): (&(usize, usize), &mut PageBuffer)| {
            let (file, block) = *at;
            read_block(block, &reads.metadata.files[file], open_file(&reads.files, file), buffer)
        };
        let each = blocks.len().div_ceil(*threads).max(1);
        let mut parts = blocks.chunks(each).zip(buffers.chunks_mut(each));
        let read_part = |(blocks, buffers): (&[_], &mut [_])| blocks.iter().zip(buffers).try_for_each(read);
        std::thread::scope(|scope| {
            let first = parts.next();
            let others: Vec<_> = parts.map(|part| scope.spawn(move || read_part(part))).collect();
            let first = first.map_or(Ok(()), read_part);
            let died = || Err(super::targets::thread_died());
            let others = others.into_iter().map(|other| other.join().unwrap_or_else(|_| died()));
            std::iter::once(first).chain(others).collect()
        })
    }

    /// The bytes of a block that this rank has read.
    fn bytes<'b>(&'b self, buffers: &'b [PageBuffer], place: usize) -> &'b [u8] {
        let Exchange { reads, division, .. } = self.exchange;
        let (file, block) = division.shared[self.me()][place];
        let data = open_file(&reads.files, file);
        block_bytes(
            block,
            &reads.metadata.files[file],
            data,
            &buffers[place - self.nth * self.exchange.window],
        )
    }

    /// Copies what this rank itself wants of its blocks.
    fn keep(&self, buffers: &[PageBuffer], takers: &mut Takers<'_, '_>) -> Result<()> {
        let me = self.me();
        let blocks = self.blocks(me);
        let stream = &self.exchange.give[me];
        let mut cursor = stream.at(blocks.start);
        stream.go(&mut cursor, stream.len_bytes(blocks), |place, item, range| {
            let bytes = self.bytes(buffers, place);
            takers.write(me, item, range, &mut |run, to| {
                let from = (run.offset_bytes % BLOCK_BYTES) as usize;
                to.copy_from_slice(&bytes[from..from + run.len_bytes]);
            })
        })
    }

    /// Hands on the pieces of this rank's blocks, none if it has failed, and takes those of the others'. Whether any rank
    /// had failed before; whatever fails here is noted in `outcome`.
    fn hand_on(
        &self,
        given: Option<&[PageBuffer]>,
        takers: &mut Takers<'_, '_>,
        outcome: &mut Result<()>,
    ) -> Result<bool> {
        let Exchange { group, give, .. } = self.exchange;
        let (me, n) = (self.me(), group.size());
        let count = |g: usize, stream: &Stream, reader: usize| match g == me {
            true => 0,
            false => STATUS_BYTES + stream.len_bytes(self.blocks(reader)),
        };
        let send: Vec<usize> = (0..n).map(|g| count(g, &give[g], me)).collect();
        let receive: Vec<usize> = (0..n).map(|g| count(g, takers.stream(g), g)).collect();
        let mut gone: Vec<Cursor> = give.iter().map(|stream| stream.at(self.blocks(me).start)).collect();
        let mut come: Vec<Cursor> = (0..n).map(|g| takers.stream(g).at(self.blocks(g).start)).collect();
        let mut has_failed = vec![false; n];
        has_failed[me] = given.is_none();
        let status = if given.is_some() { WELL } else { FAILED };
        group.all_to_all_streamed::<Error>(
            &send,
            &receive,
            |GroupRank(g), offset, bytes| {
                let (head, mut rest) =
                    bytes.split_at_mut(STATUS_BYTES.saturating_sub(offset).min(bytes.len()));
                head.fill(status);
                let Some(buffers) = given else {
                    rest.fill(0);
                    return Ok(());
                };
                give[g].go(&mut gone[g], rest.len(), |place, item, range| {
                    let block = self.bytes(buffers, place);
                    for run in give[g].items[item].pieces(range) {
                        let from = (run.offset_bytes % BLOCK_BYTES) as usize;
                        let to;
                        (to, rest) = std::mem::take(&mut rest).split_at_mut(run.len_bytes);
                        to.copy_from_slice(&block[from..from + run.len_bytes]);
                    }
                    Ok(())
                })
            },
            |GroupRank(g), offset, bytes| {
                let (head, mut rest) = bytes.split_at(STATUS_BYTES.saturating_sub(offset).min(bytes.len()));
                has_failed[g] |= head.iter().any(|byte| *byte != WELL);
                if has_failed[g] || outcome.is_err() {
                    return Ok(());
                }
                *outcome = takers.go(g, &mut come[g], rest.len(), &mut |run, to| {
                    let from;
                    (from, rest) = rest.split_at(run.len_bytes);
                    to.copy_from_slice(from);
                });
                Ok(())
            },
        )?;
        Ok(has_failed.contains(&true))
    }
}
