//! The phase barrier and its words, generic over what a word is: in production an atomic of the segment, in the tests
//! loom's, so that the code which runs is the code whose interleavings are explored.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::futex;

/// A control word that ranks share.
pub(super) trait Word {
    fn load(&self, order: Ordering) -> u32;
    fn store(&self, value: u32, order: Ordering);
    fn fetch_add(&self, value: u32, order: Ordering) -> u32;
    /// Stores `new` if the word holds `current`; whether it did. Acquires and releases.
    fn replace(&self, current: u32, new: u32) -> bool;
    /// Wakes all who sleep on it.
    fn wake_all(&self);
}

impl Word for AtomicU32 {
    fn load(&self, order: Ordering) -> u32 {
        self.load(order)
    }
    fn store(&self, value: u32, order: Ordering) {
        self.store(value, order);
    }
    fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_add(value, order)
    }
    fn replace(&self, current: u32, new: u32) -> bool {
        self.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
    fn wake_all(&self) {
        // It fails only for a bad address or flag; sleepers look again by themselves in any case.
        let _woken = futex::wake(self, futex::Flags::empty(), i32::MAX as u32);
    }
}

/// The words of the barrier as one rank needs them.
pub(super) struct Barrier<'a, W> {
    pub(super) ranks: u32,
    /// How many ranks have arrived at the next phase.
    pub(super) arrivals: &'a W,
    /// The last phase that all ranks reached.
    pub(super) phase: &'a W,
    /// The phase that this rank arrived at last.
    pub(super) arrived: &'a W,
}

impl<W: Word> Barrier<'_, W> {
    /// Counts this rank in; the last one resets the counter, opens the phase and wakes the others.
    ///
    /// The phase is `target` − 1 until all have arrived and cannot pass `target` before this rank arrives again,
    /// so equality is enough and the numbers may wrap.
    pub(super) fn arrive(&self, target: u32) {
        self.arrived.store(target, Ordering::Release);
        if self.arrivals.fetch_add(1, Ordering::AcqRel) + 1 == self.ranks {
            self.arrivals.store(0, Ordering::Relaxed);
            self.phase.store(target, Ordering::Release);
            self.phase.wake_all();
        }
    }

    /// Whether all ranks have arrived at `target`.
    ///
    /// Acquire pairs with the release in `arrive` by the last rank, which acquired all others' arrivals.
    pub(super) fn is_open(&self, target: u32) -> bool {
        self.phase.load(Ordering::Acquire) == target
    }
}

#[cfg(test)]
pub(super) mod tests;
