//! Pass: what the units of one model share while it runs: the mode, the order of units, reductions under way, and the
//! first failure.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use candle_core::Device;
use sconce_mesh::Work;

use crate::buffers::Buffers;
use crate::cell::Failure;
use crate::config::{FsdpConfig, Overlap};
use crate::prefetch::UnitOrder;
use crate::unit::Unit;
use crate::{MixedPrecision, Result};

/// Reductions under way at a time. Each keeps a unit's whole gradients alive.
const REDUCTIONS: usize = 1;

/// The reduced gradient of a shard, on its way.
type Reducing = Work<Result<Vec<f32>>>;

/// Shared by all units of a model.
#[derive(Debug)]
pub(crate) struct Pass {
    pub(crate) failure: Failure,
    pub(crate) precision: MixedPrecision,
    pub(crate) overlap: Overlap,
    /// Where the model computes.
    pub(crate) device: Device,
    /// Memory of gathered parameters; host memory of gradients that a device reduced.
    pub(crate) buffers: Buffers,
    units: OnceLock<Vec<Weak<Unit>>>,
    eval: AtomicBool,
    no_sync: AtomicBool,
    rerun: AtomicBool,
    order: Mutex<UnitOrder>,
    /// By unit, in the order of issue.
    reductions: Mutex<VecDeque<(usize, Reducing)>>,
}

impl Pass {
    pub(crate) fn new(config: &FsdpConfig) -> Arc<Self> {
        Arc::new(Self {
            failure: Failure::default(),
            precision: config.mixed_precision,
            overlap: config.overlap,
            device: config.device.clone(),
            buffers: Buffers::default(),
            units: OnceLock::new(),
            eval: AtomicBool::new(false),
            no_sync: AtomicBool::new(false),
            rerun: AtomicBool::new(false),
            order: Mutex::default(),
            reductions: Mutex::default(),
        })
    }

    /// Makes the units known to each other, by index.
    pub(crate) fn set_units(&self, units: &[Arc<Unit>]) {
        // A builder builds once, so that the list is empty here.
        let _ = self.units.set(units.iter().map(Arc::downgrade).collect());
    }

    /// Whether forward runs without a graph.
    pub(crate) fn is_eval(&self) -> bool {
        self.eval.load(Ordering::Relaxed)
    }

    /// Whether backward keeps gradients on this rank, unreduced.
    pub(crate) fn is_no_sync(&self) -> bool {
        self.no_sync.load(Ordering::Relaxed)
    }

    /// Runs `f` in eval mode.
    pub(crate) fn during_eval<R>(&self, f: impl FnOnce() -> R) -> R {
        during(&self.eval, f)
    }

    /// Runs `f` without reductions.
    pub(crate) fn during_no_sync<R>(&self, f: impl FnOnce() -> R) -> R {
        during(&self.no_sync, f)
    }

    /// Runs `f` as a part of backward: units in it are not where the order of forward has them.
    pub(crate) fn during_rerun<R>(&self, f: impl FnOnce() -> R) -> R {
        during(&self.rerun, f)
    }

    /// A forward of the whole model begins.
    pub(crate) fn forward_begins(&self) {
        lock(&self.order).forward_begins();
    }

    /// Unit `index` begins its forward: gathers those that followed it last time.
    pub(crate) fn forward_reached(&self, index: usize) -> Result<()> {
        if self.rerun.load(Ordering::Relaxed) {
            return Ok(());
        }
        let next = lock(&self.order).forward_reached(index, self.overlap.forward_prefetch);
        self.prefetch(&next)
    }

    /// Unit `index` ends its forward.
    pub(crate) fn forward_left(&self, index: usize) {
        if !self.rerun.load(Ordering::Relaxed) {
            lock(&self.order).forward_left(index);
        }
    }

    /// Backward reaches the output of unit `index`: gathers those that ran before it.
    pub(crate) fn backward_reached(&self, index: usize) -> Result<()> {
        let next = lock(&self.order).backward_reached(index, self.overlap.backward_prefetch);
        self.prefetch(&next)
    }

    /// Whether a unit that backward has yet to reach is still to be gathered.
    pub(crate) fn is_gather_ahead(&self) -> bool {
        let is_freed = |index: &usize| self.unit(*index).is_some_and(|unit| unit.is_freed());
        lock(&self.order).ahead().iter().any(is_freed)
    }

    fn prefetch(&self, indices: &[usize]) -> Result<()> {
        indices.iter().filter_map(|index| self.unit(*index)).try_for_each(|unit| unit.prefetch())
    }

    /// Starts a reduction of unit `index`; waits first if too many are under way.
    pub(crate) fn reducing(&self, index: usize, start: impl FnOnce() -> Reducing) -> Result<()> {
        self.finish_reductions(REDUCTIONS - 1)?;
        lock(&self.reductions).push_back((index, start()));
        Ok(())
    }

    /// Waits until no reduction is under way: then every gradient is in its unit.
    pub(crate) fn finish_all_reductions(&self) -> Result<()> {
        self.finish_reductions(0)
    }

    fn finish_reductions(&self, left: usize) -> Result<()> {
        loop {
            let mut reductions = lock(&self.reductions);
            if reductions.len() <= left {
                return Ok(());
            }
            let Some((index, work)) = reductions.pop_front() else { return Ok(()) };
            drop(reductions);
            let reduced = work.wait()??;
            if let Some(unit) = self.unit(index) {
                unit.add_shard_gradient(reduced);
            }
        }
    }

    fn unit(&self, index: usize) -> Option<Arc<Unit>> {
        self.units.get()?.get(index)?.upgrade()
    }
}

/// Sets a flag while `f` runs, also when it panics.
fn during<R>(flag: &AtomicBool, f: impl FnOnce() -> R) -> R {
    struct Reset<'f>(&'f AtomicBool, bool);
    impl Drop for Reset<'_> {
        fn drop(&mut self) {
            self.0.store(self.1, Ordering::Relaxed);
        }
    }
    let _reset = Reset(flag, flag.swap(true, Ordering::Relaxed));
    f()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
