//! Saver: one checkpoint after another of one run, in the background while training goes on.

use std::path::PathBuf;
use std::thread::JoinHandle;

use sconce_dtensor::StateDict;
use sconce_mesh::ProcessGroup;

use crate::coordinate::Ranks;
use crate::planner::DefaultSavePlanner;
use crate::save::{SaveReport, run};
use crate::save_cache::SaveCache;
use crate::staging::Stage;
use crate::storage::{FileSystemWriter, StorageWriter};
use crate::{Error, Result};

/// Saves in the background, one save at a time.
///
/// [`Saver::save`] returns when the state is staged: nothing is copied of tensors whose snapshots are free (flat shards
/// and optimizer state of fsdp), everything else into buffers that later saves use again. The rest runs on a thread of
/// its own and on a process group of its own, so that its collectives and those of training do not wait for each other.
/// From the second save of one layout on, ranks send each other only what changed.
///
/// Memory: one copy of the tensors that are copied; of the others, what training rewrites while a save runs, at most one
/// copy.
///
/// # Source
/// `torch.distributed.checkpoint.async_save`, which copies everything.
pub struct Saver {
    group: Option<ProcessGroup>,
    stage: Stage,
    /// `None` while a save has it.
    cache: Option<SaveCache>,
    pending: Option<Pending>,
}

struct Pending {
    path: PathBuf,
    thread: JoinHandle<(Result<SaveReport>, SaveCache)>,
}

impl Saver {
    /// A saver for the ranks of `group`, or for one process alone.
    ///
    /// Ranks: collective over `group`.
    ///
    /// # Errors
    /// `Mesh`.
    pub fn new(group: Option<&ProcessGroup>) -> Result<Self> {
        let group = group.map(ProcessGroup::duplicate).transpose()?;
        Ok(Self { group, stage: Stage::default(), cache: Some(SaveCache::default()), pending: None })
    }

    /// Begins to save `state` at `path` and returns once it may change again.
    ///
    /// Waits for the save before, if that still runs.
    ///
    /// ```
    /// use sconce_checkpoint::{Saver, load_new};
    /// use sconce_dtensor::{DType, StateDict, TensorBuf, TensorView};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("step-1");
    /// let mut weights = vec![1u8; 4];
    /// let mut saver = Saver::new(None)?;
    /// let state = StateDict::from_iter([("step", 1i64)]);
    /// saver.save(&path, &state, false)?;
    /// // Training goes on here, on the same weights.
    /// let report = saver.wait()?;
    /// assert!(report.is_some());
    /// assert_eq!(load_new(&path)?.get("step").and_then(|step| step.as_int()), Some(1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Ranks: every rank of the group, in the same order of saves; it does not communicate before the background does.
    ///
    /// # Errors
    /// The error of the save before, if that failed: this one is then not begun, and may be tried again. A state that
    /// cannot be staged on some rank is an error of the save on every rank, which the next call returns.
    pub fn save(&mut self, path: impl Into<PathBuf>, state: &StateDict<'_>, overwrite: bool) -> Result<()> {
        let path = path.into();
        let writer = FileSystemWriter::new(&path, overwrite, true);
        self.save_to(Box::new(writer), path, state)
    }

    /// As [`Saver::save`], through a storage of the caller's choice; `path` names it in messages.
    ///
    /// # Errors
    /// As [`Saver::save`].
    pub fn save_to(
        &mut self,
        mut writer: Box<dyn StorageWriter>,
        path: impl Into<PathBuf>,
        state: &StateDict<'_>,
    ) -> Result<()> {
        self.wait()?;
        let ranks = Ranks(self.group.as_ref());
        // A rank that cannot stage tells the others in the background, where they would wait for it.
        let staged = self.stage.stage(state, ranks.threads());
        let group = self.group.clone();
        let mut cache = self.cache.take().unwrap_or_default();
        let save = move || {
            let staged = staged.as_ref().map_err(Clone::clone);
            let outcome = run(writer.as_mut(), &mut DefaultSavePlanner, staged, group.as_ref(), &mut cache);
            (outcome, cache)
        };
        let path = path.into();
        let thread = std::thread::Builder::new().name("sconce-save".to_owned()).spawn(save);
        let thread = thread.map_err(|e| Error::io("start a thread to save", &path, &e))?;
        self.pending = Some(Pending { path, thread });
        Ok(())
    }

    /// Waits for the save that runs, if one does, and returns what it wrote; `None` if there is none.
    ///
    /// # Errors
    /// The save's error, once: as of [`save_with`](crate::save_with).
    pub fn wait(&mut self) -> Result<Option<SaveReport>> {
        let Some(Pending { path, thread }) = self.pending.take() else { return Ok(None) };
        let Ok((outcome, cache)) = thread.join() else {
            let cause = std::io::Error::other("its thread panicked");
            return Err(Error::io("save in the background", &path, &cause));
        };
        self.cache = Some(cache);
        outcome.map(Some)
    }

    /// Whether a save runs now.
    pub fn is_saving(&self) -> bool {
        self.pending.as_ref().is_some_and(|pending| !pending.thread.is_finished())
    }
}

impl Drop for Saver {
    /// Waits for the save that runs. Whoever wants to know its error calls [`Saver::wait`] before.
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take() {
            let _ = pending.thread.join();
        }
    }
}
