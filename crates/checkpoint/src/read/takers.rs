//! What this rank takes of blocks that are read for several: from whom, and where in its tensors it goes.

use std::ops::Range;

use sconce_dtensor::{Fqn, LocalTensor, OrderedMap};

use super::Reads;
use super::division::{Division, Places};
use super::runs::{ItemRuns, ReadRun};
use super::stream::{Cursor, Stream};
use crate::plan::ReadItem;
use crate::{Error, Result};

/// The tensors of this rank and what goes into them, by who reads it.
pub(super) struct Takers<'e, 't> {
    /// The items asked of each rank.
    asked: Vec<Vec<&'e ReadItem>>,
    streams: Vec<(Stream, Vec<Target>)>,
    tensors: Vec<Tensor<'e, 't>>,
}

/// Where the bytes of an item go: position of the tensor in the reads, of the box in the tensor.
#[derive(Clone, Copy)]
struct Target {
    tensor: usize,
    index: usize,
}

struct Tensor<'e, 't> {
    fqn: &'e str,
    tensor: &'e mut (dyn LocalTensor + 't),
    is_written: bool,
}

impl<'e, 't> Takers<'e, 't> {
    /// What this rank takes of the division's shared blocks.
    pub(super) fn new(
        reads: &'e Reads<'_>,
        division: &Division,
        mut tensors: OrderedMap<Fqn, &'e mut (dyn LocalTensor + 't)>,
    ) -> Self {
        let places = division.places(reads.metadata);
        let n_ranks = division.shared.len();
        let mut asked = vec![Vec::new(); n_ranks];
        let mut takes: Vec<(Vec<ItemRuns>, Vec<Target>)> = vec![Default::default(); n_ranks];
        let mut lent = Vec::new();
        for of_tensor in &reads.tensors {
            let Some(tensor) = tensors.remove(&Fqn(of_tensor.fqn.to_owned())) else { continue };
            for (index, items) in &of_tensor.boxes {
                for item in items {
                    let saved = &reads.metadata.tensors[item.saved];
                    let wanted = &tensor.local_boxes()[*index];
                    let runs = ItemRuns::new(&item.part, item.chunk, saved, wanted);
                    for reader in readers(&runs, &places) {
                        asked[reader].push(*item);
                        takes[reader].0.push(runs.clone());
                        takes[reader].1.push(Target { tensor: lent.len(), index: *index });
                    }
                }
            }
            lent.push(Tensor { fqn: of_tensor.fqn, tensor, is_written: false });
        }
        let stream = |(reader, (items, targets)): (usize, (Vec<ItemRuns>, _))| {
            let place = |file, block| places.of(file, block).filter(|(rank, _)| *rank == reader);
            let place = |file, block| Some(place(file, block)?.1);
            (Stream::new(&division.shared[reader], items, place), targets)
        };
        let streams = takes.into_iter().enumerate().map(stream).collect();
        Self { asked, streams, tensors: lent }
    }

    /// The items asked of each rank.
    pub(super) fn asked(&self) -> &[Vec<&'e ReadItem>] {
        &self.asked
    }

    /// What a rank hands to this one.
    pub(super) fn stream(&self, reader: usize) -> &Stream {
        &self.streams[reader].0
    }

    /// The names of the tensors that were written to.
    pub(super) fn written(&self) -> impl Iterator<Item = &'e str> {
        self.tensors.iter().filter(|tensor| tensor.is_written).map(|tensor| tensor.fqn)
    }

    /// Takes the next `len` bytes of what a rank hands on: `copy` fills each piece in its place.
    ///
    /// # Errors
    /// `Tensor`.
    pub(super) fn go(
        &mut self,
        reader: usize,
        cursor: &mut Cursor,
        len: usize,
        copy: &mut dyn FnMut(ReadRun, &mut [u8]),
    ) -> Result<()> {
        let Self { streams, tensors, .. } = self;
        let (stream, targets) = &streams[reader];
        stream
            .go(cursor, len, |_, item, range| write(tensors, targets[item], &stream.items[item], range, copy))
    }

    /// Writes a range of the bytes of an item that a rank hands on.
    ///
    /// # Errors
    /// `Tensor`.
    pub(super) fn write(
        &mut self,
        reader: usize,
        item: usize,
        range: Range<usize>,
        copy: &mut dyn FnMut(ReadRun, &mut [u8]),
    ) -> Result<()> {
        let Self { streams, tensors, .. } = self;
        let (stream, targets) = &streams[reader];
        write(tensors, targets[item], &stream.items[item], range, copy)
    }
}

/// The ranks that read the blocks of an item, each once.
fn readers(runs: &ItemRuns, places: &Places) -> Vec<usize> {
    let held = runs.blocks().filter(|block| !runs.in_block(*block).is_empty());
    let mut readers: Vec<usize> = held.filter_map(|block| Some(places.of(runs.file(), block)?.0)).collect();
    readers.sort_unstable();
    readers.dedup();
    readers
}

/// Lends the part of a box that a range of an item's bytes fills, once for all its runs, to `copy`, run by run.
fn write(
    tensors: &mut [Tensor<'_, '_>],
    to: Target,
    runs: &ItemRuns,
    range: Range<usize>,
    copy: &mut dyn FnMut(ReadRun, &mut [u8]),
) -> Result<()> {
    let Tensor { fqn, tensor, is_written } = &mut tensors[to.tensor];
    let filled = runs.destination(range.clone());
    let (start, expected) = (filled.start, filled.len());
    let mut got = None;
    let lent = tensor.write_box_range(to.index, filled, &mut |bytes| {
        got = Some(bytes.len());
        if bytes.len() == expected {
            *is_written = true;
            for run in runs.pieces(range.clone()) {
                let at = run.dst_bytes - start;
                copy(run, &mut bytes[at..at + run.len_bytes]);
            }
        }
    });
    lent.map_err(|error| Error::tensor(fqn, &error))?;
    if got == Some(expected) {
        return Ok(());
    }
    let got = got.unwrap_or(0);
    let cause = format!("{expected} bytes of box {} are wanted, and it lends {got}", to.index);
    Err(Error::Tensor { fqn: (*fqn).to_owned(), cause })
}
