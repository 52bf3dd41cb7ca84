//! Series: the checkpoints of one training run in one directory, from resuming to removing the old ones.
//!
//! ```text
//! runs/a/
//!   step-000100/  step-000200/     checkpoints, named by step
//!   step-000300.tmp/               being written, by whoever has its lock
//!   step-000050.old-0/             removed as soon as its readers are done
//! ```

mod name;
mod preemption;
mod retention;

use std::fs;
use std::path::{Path, PathBuf};

use sconce_dtensor::StateDict;
use sconce_mesh::ProcessGroup;
use serde::{Deserialize, Serialize};

pub use preemption::Preemption;
pub use retention::{Best, Order, Retention};

use crate::coordinate::Ranks;
use crate::format::MANIFEST_NAME;
use crate::storage::remove::{self, Removal};
use crate::{
    Error, LoadOptions, Result, SaveOptions, SaveReport, load_with, read_metadata, save_with, verify,
};

/// The checkpoints of one training run, in one directory.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::AtomicBool;
///
/// use sconce_checkpoint::{Preemption, Retention, Series, SeriesOptions};
/// use sconce_dtensor::{DType, StateDict, TensorBuf};
///
/// # let dir = tempfile::tempdir()?;
/// # let runs = dir.path().join("runs");
/// # let mut state = StateDict::new();
/// # state.insert_tensor("w", TensorBuf::new(DType::F32, &[2], vec![0; 8])?);
/// # let train = |_: &mut StateDict<'_>| ();
/// # let preemption = Preemption::from_flag(Arc::new(AtomicBool::new(false)));
/// let keep = Retention { last: Some(2), every: Some(50), ..Default::default() };
/// let series = Series::open(&runs, SeriesOptions { keep, ..Default::default() })?;
/// let first = series.resume(&mut state)?.map_or(0, |resumed| resumed.step + 1);
/// for step in first..=100 {
///     train(&mut state);
///     let stop = preemption.is_agreed(None)?;
///     if stop || step % 10 == 0 {
///         series.save(step, &state)?;
///     }
///     if stop {
///         break;
///     }
/// }
/// assert_eq!(series.steps()?, [0, 50, 90, 100]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Source
/// Orbax's `CheckpointManager`, whose preemption and retention it follows.
#[derive(Clone)]
pub struct Series<'g> {
    dir: PathBuf,
    options: SeriesOptions<'g>,
}

/// How a series is kept.
#[derive(Clone)]
pub struct SeriesOptions<'g> {
    /// The ranks that train together; `None` for one process by itself.
    pub group: Option<&'g ProcessGroup>,
    /// Which checkpoints stay when a later one is saved.
    pub keep: Retention,
    /// As [`SaveOptions::sync`].
    pub sync: bool,
    /// Whether files of the checkpoint before that would be written again as they are, are linked instead, as
    /// [`FileSystemWriter::since`](crate::FileSystemWriter::since) says: for models of which a part is frozen.
    pub link_unchanged: bool,
}

/// Where training goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "training goes on after its step"]
pub struct Resumed {
    /// The step of the checkpoint that was loaded.
    pub step: u64,
    /// Where it is.
    pub path: PathBuf,
    /// Later checkpoints that are damaged, the newest first.
    pub skipped: Vec<Skipped>,
}

/// A checkpoint that was passed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its step.
    pub step: u64,
    /// What is wrong with it.
    pub error: Error,
}

/// What saving one checkpoint of a series did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeriesReport {
    /// The save itself.
    pub saved: SaveReport,
    /// Steps whose checkpoints were removed.
    pub removed: Vec<u64>,
    /// Steps whose checkpoints are to go, but somebody reads them, or put files of another kind there: the next save tries
    /// again.
    pub in_use: Vec<u64>,
}

impl Default for SeriesOptions<'_> {
    fn default() -> Self {
        Self { group: None, keep: Retention::default(), sync: true, link_unchanged: false }
    }
}

impl<'g> Series<'g> {
    /// Opens the series in `dir`, which is made if there is none, and removes what dead writers left in it.
    ///
    /// Ranks: collective over `options.group`; all ranks see the same file system.
    ///
    /// # Errors
    /// `Io`.
    pub fn open(dir: impl Into<PathBuf>, options: SeriesOptions<'g>) -> Result<Self> {
        let series = Self { dir: dir.into(), options };
        series.on_coordinator("open the series", || {
            fs::create_dir_all(&series.dir).map_err(|e| Error::io("create directory", &series.dir, &e))?;
            series.remove_stale()
        })?;
        Ok(series)
    }

    /// The directory of the series.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the checkpoint of `step` is, if there is one.
    pub fn path_of(&self, step: u64) -> PathBuf {
        self.dir.join(name::of_step(step))
    }

    /// The steps of the checkpoints that were committed, the oldest first.
    ///
    /// # Errors
    /// `Io`.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps = self.candidates()?;
        steps.retain(|step| self.path_of(*step).join(MANIFEST_NAME).is_file());
        Ok(steps)
    }

    /// The step of the newest checkpoint that was committed. Its bytes are not read.
    ///
    /// # Errors
    /// `Io`.
    pub fn latest(&self) -> Result<Option<u64>> {
        Ok(self.steps()?.pop())
    }

    /// The newest checkpoint whose every byte is what was saved, and the later ones that are not.
    ///
    /// It reads whole checkpoints. To go on with training, [`Series::resume`] needs no such pass: it verifies what it
    /// loads.
    ///
    /// # Errors
    /// `NoValidCheckpoint` if there are some and all are damaged; `Version`, `Io`.
    pub fn latest_valid(&self) -> Result<Option<Resumed>> {
        self.newest_that(&self.candidates()?, |path| {
            let damage = verify(path)?.damage.into_iter().next();
            damage.map_or(Ok(()), Err)
        })
    }

    /// Loads the newest checkpoint that is whole into `state`, in place; `None`, with the state as it was, if the series
    /// has none yet.
    ///
    /// Damaged checkpoints are passed over and named in the result. A checkpoint of another model is no damage, but an
    /// error: training does not begin anew unasked.
    ///
    /// Ranks: collective over the group; every rank loads the same checkpoint.
    ///
    /// # Errors
    /// `NoValidCheckpoint` if there are some and all are damaged; those of [`load_with`] that are no damage.
    pub fn resume(&self, state: &mut StateDict<'_>) -> Result<Option<Resumed>> {
        let candidates = self.on_coordinator("list the series", || self.candidates())?;
        let options = LoadOptions { group: self.options.group, ..LoadOptions::default() };
        self.newest_that(&candidates, |path| load_with(path, state, options).map(drop))
    }

    /// Saves the checkpoint of `step`, then removes those that [`SeriesOptions::keep`] does not keep.
    ///
    /// A checkpoint of the same step, such as a damaged one that resuming passed over, is replaced. One that is being
    /// read is not removed.
    ///
    /// Ranks: collective over the group.
    ///
    /// # Errors
    /// Those of [`save_with`]; with the step `prune` in [`Error::Ranks`], or as `Io` of one process, those of removing:
    /// the new checkpoint is committed then.
    pub fn save(&self, step: u64, state: &StateDict<'_>) -> Result<SeriesReport> {
        let SeriesOptions { group, sync, link_unchanged, .. } = self.options;
        let before = if link_unchanged { self.newest_but(step)? } else { None };
        let options = SaveOptions { group, overwrite: true, sync, since: before.as_deref() };
        let saved = save_with(self.path_of(step), state, options)?;
        let (removed, in_use) = self.on_coordinator("prune", || self.prune())?;
        Ok(SeriesReport { saved, removed, in_use })
    }

    /// Where the newest checkpoint of another step is, the same on every rank.
    fn newest_but(&self, step: u64) -> Result<Option<PathBuf>> {
        let steps = self.on_coordinator("list the series", || self.steps())?;
        Ok(steps.into_iter().rfind(|other| *other != step).map(|other| self.path_of(other)))
    }

    fn prune(&self) -> Result<(Vec<u64>, Vec<u64>)> {
        let steps = self.steps()?;
        let metrics = match &self.options.keep.best {
            None => steps.iter().map(|step| (*step, None)).collect::<Vec<_>>(),
            Some(best) => {
                let metric = |step: &u64| Ok((*step, self.metric(*step, &best.value)?));
                steps.iter().map(metric).collect::<Result<_>>()?
            }
        };
        let (mut removed, mut in_use) = (Vec::new(), Vec::new());
        for step in self.options.keep.dispensable(&metrics) {
            match remove::remove(&self.path_of(step))? {
                Removal::Gone => removed.push(step),
                Removal::Read | Removal::Written | Removal::Foreign => in_use.push(step),
            }
        }
        Ok((removed, in_use))
    }

    /// The number that the checkpoint of `step` holds under `fqn`; a damaged one holds none.
    fn metric(&self, step: u64, fqn: &str) -> Result<Option<f64>> {
        match read_metadata(self.path_of(step)) {
            Ok(metadata) => Ok(metadata.tree.number(fqn)),
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Steps of all directories that are named as checkpoints, the oldest first.
    fn candidates(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> = self.names()?.iter().filter_map(|name| name::to_step(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    fn names(&self) -> Result<Vec<String>> {
        let list = |e: std::io::Error| Error::io("list", &self.dir, &e);
        let entries = fs::read_dir(&self.dir).map_err(list)?;
        let names = entries.map(|entry| Ok(entry.map_err(list)?.file_name().into_string().ok()));
        Ok(names.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// Removes directories that a dead process was writing or removing. One with foreign files in it stays.
    fn remove_stale(&self) -> Result<()> {
        for stale in self.names()?.iter().filter(|name| name::is_temporary(name)) {
            remove::remove(&self.dir.join(stale))?;
        }
        Ok(())
    }

    /// The newest of `steps` that `accept` takes, if its errors are damage.
    fn newest_that(
        &self,
        steps: &[u64],
        mut accept: impl FnMut(&Path) -> Result<()>,
    ) -> Result<Option<Resumed>> {
        let mut skipped = Vec::new();
        for step in steps.iter().rev() {
            let path = self.path_of(*step);
            match accept(&path) {
                Ok(()) => return Ok(Some(Resumed { step: *step, path, skipped })),
                Err(error) if error.is_damage() => skipped.push(Skipped { step: *step, error }),
                Err(error) => return Err(error),
            }
        }
        if skipped.is_empty() {
            return Ok(None);
        }
        Err(Error::NoValidCheckpoint { path: self.dir.clone(), skipped })
    }

    /// Does something on one rank, and returns the same on all.
    fn on_coordinator<T: Serialize + for<'de> Deserialize<'de> + Clone>(
        &self,
        step: &str,
        act: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let ranks = Ranks(self.options.group);
        ranks.reduce_scatter(step, Ok(()), |_: Vec<()>| Ok(vec![act()?; ranks.size()]))
    }
}
