//! Carries out what a load planned: each byte run is read once and copied into its place, verified on the way.
//!
//! ```text
//! blocks that one rank wants      that rank: read 1 MiB, compare the checksum, copy the wanted runs out of it
//! blocks that several ranks want  one of them does that, and hands the others theirs (`exchange`)
//! ```
//!
//! Plans nothing: which boxes are read is the planner's business.

mod blocks;
#[cfg(feature = "cli")]
mod boxes;
mod copy;
mod division;
mod exchange;
mod request;
mod runs;
mod stream;
mod takers;
mod targets;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use sconce_dtensor::{Fqn, OrderedMap, StateDict};
use sconce_mesh::ProcessGroup;

use crate::coordinate::Ranks;
use crate::load::Verify;
use crate::metadata::Metadata;
use crate::plan::{LoadPlan, ReadItem};
use crate::storage::{DataFile, StorageReader};
use crate::{Error, Result};

pub(crate) use blocks::Verified;
#[cfg(feature = "mmap")]
pub(crate) use blocks::check_block;
use blocks::{Marks, Wants};
#[cfg(feature = "cli")]
pub(crate) use boxes::{BoxReader, OpenTensor};
use copy::{Own, open_file};
use division::Division;
use exchange::Exchange;
use runs::ItemRuns;
use takers::Takers;
use targets::{Copying, Job};

/// What one rank reads, and the files that it reads from.
pub(crate) struct Reads<'p> {
    metadata: &'p Metadata,
    /// The files that this rank reads, at their positions in the metadata.
    files: Vec<Option<Box<dyn DataFile>>>,
    /// In the order in which they lie in files, so that blocks that several of them share are read once.
    tensors: Vec<TensorReads<'p>>,
    /// What this rank wants of each block.
    wants: Wants,
}

/// What is read for one tensor, by the position of its boxes.
struct TensorReads<'p> {
    fqn: &'p str,
    boxes: BTreeMap<usize, Vec<&'p ReadItem>>,
}

impl<'p> Reads<'p> {
    /// Opens every file of which `plan` reads a part.
    ///
    /// # Errors
    /// Those of the storage; `Tensor` for a plan that is not one of `state` and `metadata`.
    pub(crate) fn open(
        reader: &dyn StorageReader,
        metadata: &'p Metadata,
        plan: &'p LoadPlan,
        state: &StateDict<'_>,
    ) -> Result<Self> {
        let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
        let mut by_tensor = OrderedMap::<&str, BTreeMap<usize, Vec<&ReadItem>>>::new();
        let mut wants = Wants::none(metadata);
        let mut is_read = vec![false; metadata.files.len()];
        for item in &plan.items {
            let wanted = tensors.get(&Fqn(item.fqn.clone())).and_then(|t| t.local_boxes().get(item.index));
            let wanted = wanted.filter(|wanted| is_possible(item, metadata, wanted));
            let wanted = wanted.ok_or_else(|| Error::Tensor {
                fqn: item.fqn.clone(),
                cause: format!("the plan reads {}, which is not in box {}", item.part, item.index),
            })?;
            let saved = &metadata.tensors[item.saved];
            is_read[saved.chunks[item.chunk].file] = true;
            wants.add(&ItemRuns::new(&item.part, item.chunk, saved, wanted));
            by_tensor.get_or_default(item.fqn.as_str()).entry(item.index).or_default().push(item);
        }
        let tensors = by_tensor.into_iter().map(|(fqn, boxes)| TensorReads { fqn, boxes });
        let mut tensors: Vec<TensorReads<'_>> = tensors.collect();
        let first =
            |reads: &TensorReads<'_>| reads.boxes.values().flatten().map(|i| place(i, metadata)).min();
        tensors.sort_by_key(first);
        let open = |(file, is_read)| if is_read { reader.open(file).map(Some) } else { Ok(None) };
        let files = metadata.files.iter().zip(is_read).map(open).collect::<Result<_>>()?;
        Ok(Self { metadata, files, tensors, wants })
    }

    /// Reads everything into `state`, in step with the other ranks.
    ///
    /// # Errors
    /// `Corrupt`, `Io`, `Tensor`, as `Ranks` if there are several; within `PartlyLoaded` if tensors were overwritten.
    pub(crate) fn run(&self, ranks: Ranks<'_>, state: &mut StateDict<'_>, verify: Verify) -> Result<()> {
        if verify == Verify::Off {
            let nobody = Division::nobody(self.metadata, ranks.size());
            return self.read(ranks, state, &nobody, &Marks::none(self.metadata));
        }
        let division = Division::of(ranks, self.metadata, &self.wants)?;
        if verify == Verify::BeforeRead {
            self.announce(&division, ranks.position());
            ranks.all_ok("verify", self.verify(&division, ranks.position()))?;
        }
        self.announce(&division, ranks.position());
        self.read(ranks, state, &division, &self.wants.marks())
    }

    /// Tells the files which of their blocks this rank reads.
    fn announce(&self, division: &Division, me: usize) {
        let mut mine = division.alone.clone();
        division.shared[me].iter().for_each(|(file, block)| mine.insert(*file, *block));
        for (nth, file) in self.files.iter().enumerate() {
            let Some(file) = file else { continue };
            file.will_read(mine.ranges_of(nth, self.metadata.files[nth].len_bytes));
        }
    }

    /// Compares the checksums of the blocks that this rank reads.
    fn verify(&self, division: &Division, me: usize) -> Result<()> {
        let mut verified = Verified::default();
        let mut blocks = division.alone.iter().chain(division.shared[me].iter().copied());
        blocks.try_for_each(|(file, block)| {
            let data = open_file(&self.files, file);
            let outcome = verified.block(file, block, &self.metadata.files[file], data).map(drop);
            outcome.map_err(|error| error.naming_tensors(self.metadata))
        })
    }

    /// Copies everything on every rank; of the `checked` blocks those that the division says, verified.
    fn read(
        &self,
        ranks: Ranks<'_>,
        state: &mut StateDict<'_>,
        division: &Division,
        checked: &Marks,
    ) -> Result<()> {
        let mut overwritten = BTreeSet::new();
        let own = Own { alone: &division.alone, checked };
        let outcome = self.read_own(ranks, state, own, &mut overwritten);
        let outcome = match ranks.others().filter(|_| division.is_shared()) {
            None => outcome,
            Some(group) => self.read_shared((group, ranks), state, division, &mut overwritten, outcome),
        };
        match ranks.all_ok("read", outcome) {
            Ok(()) => Ok(()),
            Err(cause @ Error::Mesh(_)) => Err(cause),
            Err(cause) => {
                let all = ranks.gather_all("report", Ok(overwritten))?;
                let names: BTreeSet<String> = all.into_iter().flatten().collect();
                let overwritten: Vec<String> = names.into_iter().collect();
                let nothing = overwritten.is_empty();
                Err(if nothing { cause } else { Error::PartlyLoaded { overwritten, cause: Box::new(cause) } })
            }
        }
    }

    /// What this rank reads by itself.
    fn read_own(
        &self,
        ranks: Ranks<'_>,
        state: &mut StateDict<'_>,
        own: Own<'_>,
        overwritten: &mut BTreeSet<String>,
    ) -> Result<()> {
        let mut tensors = state.flat_tensors_mut().map_err(|error| Error::tensor("", &error))?;
        let job = |reads| Some(Job { reads, tensor: tensors.remove(&Fqn(reads.fqn.to_owned()))? });
        let jobs = self.tensors.iter().filter_map(job).collect();
        let written = Mutex::new(std::mem::take(overwritten));
        let outcome =
            targets::run(&Copying { reads: self, own, overwritten: &written }, jobs, ranks.threads());
        *overwritten = written.into_inner().unwrap_or_else(PoisonError::into_inner);
        outcome.map_err(|error| error.naming_tensors(self.metadata))
    }

    /// What ranks read for each other.
    fn read_shared(
        &self,
        (group, ranks): (&ProcessGroup, Ranks<'_>),
        state: &mut StateDict<'_>,
        division: &Division,
        overwritten: &mut BTreeSet<String>,
        outcome: Result<()>,
    ) -> Result<()> {
        let tensors = state.flat_tensors_mut().map_err(|error| Error::tensor("", &error))?;
        let mut takers = Takers::new(self, division, tensors);
        let exchange = Exchange::prepare(self, (group, ranks), division, &takers)?;
        let outcome = exchange.run(&mut takers, outcome);
        overwritten.extend(takers.written().map(str::to_owned));
        outcome.map_err(|error| error.naming_tensors(self.metadata))
    }
}

/// Whether an item can be read at all: planners are the caller's, and are not believed.
fn is_possible(item: &ReadItem, metadata: &Metadata, wanted: &sconce_dtensor::TensorBox) -> bool {
    let chunk = metadata.tensors.get(item.saved).and_then(|saved| saved.chunks.get(item.chunk));
    chunk.is_some_and(|chunk| chunk.bounds.contains(&item.part) && wanted.contains(&item.part))
}

/// Where an item begins.
fn place(item: &ReadItem, metadata: &Metadata) -> (usize, u64) {
    let chunk = &metadata.tensors[item.saved].chunks[item.chunk];
    (chunk.file, chunk.offset_bytes)
}
