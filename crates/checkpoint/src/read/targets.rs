//! The threads of one rank: large boxes are cut between them, small tensors dealt out.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use sconce_dtensor::{LocalTensor, box_len_bytes};

use super::copy::{Copier, Own};
use super::{Reads, TensorReads};
use crate::{Error, Result};

/// A tensor of the state and what is read into it.
pub(super) struct Job<'s, 'p, 't> {
    pub(super) reads: &'s TensorReads<'p>,
    pub(super) tensor: &'t mut dyn LocalTensor,
}

/// What all threads share.
pub(super) struct Copying<'s, 'p> {
    pub(super) reads: &'s Reads<'p>,
    pub(super) own: Own<'s>,
    /// Names of the tensors that were written to.
    pub(super) overwritten: &'s Mutex<BTreeSet<String>>,
}

/// A box is cut between threads if each gets this much: starting a thread costs as much as copying some 100 KiB.
const CUT_BYTES: usize = 4 << 20;

/// Copies into every tensor.
pub(super) fn run(shared: &Copying<'_, '_>, jobs: Vec<Job<'_, '_, '_>>, threads: usize) -> Result<()> {
    if threads == 1 {
        let mut copier = shared.copier();
        return jobs.into_iter().try_for_each(|job| shared.copy_tensor(job, &mut copier));
    }
    let is_large = |job: &Job<'_, '_, '_>| {
        let boxes = job.reads.boxes.keys();
        boxes.map(|index| box_len_bytes(job.tensor, *index)).max().unwrap_or(0) >= threads * CUT_BYTES
    };
    let (large, small): (Vec<_>, Vec<_>) = jobs.into_iter().partition(is_large);
    large.into_iter().try_for_each(|job| shared.copy_cut_tensor(job, threads))?;
    let queue = Mutex::new(small.into_iter());
    let work = || {
        let mut copier = shared.copier();
        loop {
            let job = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(job) = job else { return Ok(()) };
            shared.copy_tensor(job, &mut copier)?;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|_| Err(thread_died())))
    })
}

impl<'s> Copying<'s, '_> {
    fn copier(&self) -> Copier<'s> {
        Copier::new(self.reads.metadata, &self.reads.files, self.own)
    }

    fn copy_tensor(&self, job: Job<'_, '_, '_>, copier: &mut Copier<'_>) -> Result<()> {
        let Job { reads, tensor } = job;
        for (index, items) in &reads.boxes {
            let wanted = tensor.local_boxes()[*index].clone();
            if !copier.has_any(items, &wanted) {
                continue;
            }
            copier.has_written = false;
            let copied = lend(reads.fqn, tensor, *index, |bytes| copier.copy(items, &wanted, 0, bytes));
            self.note(reads.fqn, copier);
            copied?;
        }
        Ok(())
    }

    fn copy_cut_tensor(&self, job: Job<'_, '_, '_>, threads: usize) -> Result<()> {
        let Job { reads, tensor } = job;
        for (index, items) in &reads.boxes {
            let wanted = tensor.local_boxes()[*index].clone();
            if !self.copier().has_any(items, &wanted) {
                continue;
            }
            lend(reads.fqn, tensor, *index, |bytes| {
                let part = bytes.len().div_ceil(threads).next_multiple_of(crate::BLOCK_BYTES as usize);
                let copy = |(nth, bytes): (usize, &mut [u8])| -> Result<()> {
                    let mut copier = self.copier();
                    let copied = copier.copy(items, &wanted, nth * part, bytes);
                    self.note(reads.fqn, &copier);
                    copied
                };
                std::thread::scope(|scope| {
                    let parts = bytes.chunks_mut(part).enumerate();
                    let workers: Vec<_> = parts.map(|part| scope.spawn(move || copy(part))).collect();
                    let mut outcomes =
                        workers.into_iter().map(|w| w.join().unwrap_or_else(|_| Err(thread_died())));
                    outcomes.try_for_each(|outcome| outcome)
                })
            })?;
        }
        Ok(())
    }

    fn note(&self, fqn: &str, copier: &Copier<'_>) {
        if copier.has_written {
            self.overwritten.lock().unwrap_or_else(PoisonError::into_inner).insert(fqn.to_owned());
        }
    }
}

/// Lends the bytes of a box to `copy`.
fn lend(
    fqn: &str,
    tensor: &mut dyn LocalTensor,
    index: usize,
    mut copy: impl FnMut(&mut [u8]) -> Result<()>,
) -> Result<()> {
    let expected = box_len_bytes(tensor, index);
    let mut outcome = Ok(());
    let lent = tensor.write_box(index, &mut |bytes| {
        outcome = match bytes.len() == expected {
            true => copy(bytes),
            false => Err(Error::Tensor {
                fqn: fqn.to_owned(),
                cause: format!("box {index} lends {} bytes and has {expected}", bytes.len()),
            }),
        };
    });
    lent.map_err(|error| Error::tensor(fqn, &error))?;
    outcome
}

/// A thread that panicked: what it was to copy is not there.
pub(super) fn thread_died() -> Error {
    Error::Tensor { fqn: String::new(), cause: "a thread of the load panicked".to_owned() }
}
