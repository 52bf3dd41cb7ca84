//! Carries out what a load planned: each byte run is read once and copied into its place, verified on the way.
//!
//! ```text
//! blocks that one rank needs      that rank: read 1 MiB, compare the checksum, copy the wanted runs out of it
//! blocks that several ranks need  one of them does that; when all have, the others copy their exact runs unverified
//! ```
//!
//! Plans nothing: which boxes are read is the planner's business.

mod blocks;
mod copy;
mod share;
mod targets;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use indexmap::IndexMap;
use sconce_dtensor::{Fqn, LocalTensor, StateDict};

use crate::coordinate::Ranks;
use crate::load::Verify;
use crate::metadata::Metadata;
use crate::plan::{LoadPlan, ReadItem};
use crate::storage::{DataFile, StorageReader};
use crate::{Error, Result};

use blocks::Marks;
pub(crate) use blocks::Verified;
use copy::{Copier, runs_of};
use targets::{Copying, Job};

/// What one rank reads, and the files that it reads from.
pub(crate) struct Reads<'p> {
    metadata: &'p Metadata,
    /// The files that this rank reads, at their positions in the metadata.
    files: Vec<Option<Box<dyn DataFile>>>,
    /// In the order in which they lie in files, so that blocks that several of them share are read once.
    tensors: Vec<TensorReads<'p>>,
    /// Blocks that this rank touches.
    touched: Marks,
}

/// What is read for one tensor, by the position of its boxes.
struct TensorReads<'p> {
    fqn: &'p str,
    boxes: BTreeMap<usize, Vec<&'p ReadItem>>,
}

/// Which of its pieces a rank copies in a pass over its targets.
#[derive(Clone, Copy)]
enum Pass<'m> {
    /// Those in marked blocks, verified.
    Marked(&'m Marks),
    /// The others, as they are.
    Unmarked(&'m Marks),
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
        let mut by_tensor = IndexMap::<&str, BTreeMap<usize, Vec<&ReadItem>>>::new();
        let mut touched = Marks::none(metadata);
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
            runs_of(item, saved, wanted).for_each(|run| touched.mark(&run));
            by_tensor.entry(&item.fqn).or_default().entry(item.index).or_default().push(item);
        }
        let tensors = by_tensor.into_iter().map(|(fqn, boxes)| TensorReads { fqn, boxes });
        let mut tensors: Vec<TensorReads<'_>> = tensors.collect();
        let first =
            |reads: &TensorReads<'_>| reads.boxes.values().flatten().map(|i| place(i, metadata)).min();
        tensors.sort_by_key(first);
        let open = |(file, is_read)| if is_read { reader.open(file).map(Some) } else { Ok(None) };
        let files = metadata.files.iter().zip(is_read).map(open).collect::<Result<_>>()?;
        Ok(Self { metadata, files, tensors, touched })
    }

    /// Reads everything into `state`, in step with the other ranks.
    ///
    /// # Errors
    /// `Corrupt`, `Io`, `Tensor`, as `Ranks` if there are several; within `PartlyLoaded` if tensors were overwritten.
    pub(crate) fn run(&self, ranks: Ranks<'_>, state: &mut StateDict<'_>, verify: Verify) -> Result<()> {
        let nothing = Marks::none(self.metadata);
        if verify == Verify::Off {
            return self.pass(ranks, "read", state, Pass::Unmarked(&nothing), BTreeSet::new()).map(drop);
        }
        let mine = share::divide(ranks, &self.touched)?;
        if verify == Verify::BeforeRead {
            ranks.all_ok("verify", self.verify(&mine))?;
            return self.pass(ranks, "read", state, Pass::Unmarked(&nothing), BTreeSet::new()).map(drop);
        }
        let overwritten = self.pass(ranks, "verify", state, Pass::Marked(&mine), BTreeSet::new())?;
        self.pass(ranks, "read", state, Pass::Unmarked(&mine), overwritten).map(drop)
    }

    /// Compares the checksums of the marked blocks.
    fn verify(&self, marks: &Marks) -> Result<()> {
        let mut copier = Copier::new(self.metadata, &self.files, Pass::Marked(marks));
        marks.iter().try_for_each(|(file, block)| copier.verify(file, block))
    }

    /// Copies the pieces of a pass on every rank. The names of what was overwritten in this and earlier passes.
    fn pass(
        &self,
        ranks: Ranks<'_>,
        step: &str,
        state: &mut StateDict<'_>,
        pass: Pass<'_>,
        earlier: BTreeSet<String>,
    ) -> Result<BTreeSet<String>> {
        let overwritten = Mutex::new(earlier);
        let tensors = state.flat_tensors_mut().map_err(|error| Error::tensor("", &error))?;
        let outcome = self.copy(ranks, tensors, pass, &overwritten);
        let overwritten = overwritten.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        match ranks.all_ok(step, outcome) {
            Ok(()) => Ok(overwritten),
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

    fn copy<'s>(
        &'s self,
        ranks: Ranks<'_>,
        mut tensors: IndexMap<Fqn, &mut (dyn LocalTensor + '_)>,
        pass: Pass<'_>,
        overwritten: &Mutex<BTreeSet<String>>,
    ) -> Result<()> {
        let job = |reads: &'s TensorReads<'p>| {
            let tensor = tensors.swap_remove(&Fqn(reads.fqn.to_owned()))?;
            Some(Job { reads, tensor })
        };
        let jobs = self.tensors.iter().filter_map(job).collect();
        targets::run(&Copying { reads: self, pass, overwritten }, jobs, ranks.threads())
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
