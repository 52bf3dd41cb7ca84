//! Buffers: memory of parameters that units hand on to each other instead of giving it back to the allocator; of a model on a
//! device, the host memory of its reduced gradients, from one step to the next.
//!
//! A unit's parameters come and go several times a step. Memory fresh from the system costs a page fault for every 4 KiB
//! and is zeroed before it is overwritten: as long as the copy that fills it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType};

use crate::mixed_precision::Float;

/// Shorter buffers are the allocator's own business.
const SHORTEST_BYTES: usize = 64 << 10;

/// Buffers of a model that no unit holds.
///
/// What is lent and what lies here together never exceed the most that was ever lent at once, so that keeping buffers
/// does not raise the peak of memory.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    idle: HashMap<(DType, usize), Vec<CpuStorage>>,
    idle_bytes: usize,
    lent_bytes: usize,
    most_lent_bytes: usize,
}

impl Buffers {
    /// A buffer of `numel` elements with whatever it held last.
    pub(crate) fn take<T: Float>(&self, numel: usize) -> Vec<T> {
        let bytes = numel * size_of::<T>();
        if bytes < SHORTEST_BYTES {
            return vec![T::default(); numel];
        }
        let mut state = self.lock();
        state.lent_bytes += bytes;
        state.most_lent_bytes = state.most_lent_bytes.max(state.lent_bytes);
        if let Some(idle) = state.pop((T::storage(Vec::new()).dtype(), numel), bytes)
            && let Some(values) = T::into_values(idle)
        {
            return values;
        }
        state.shrink();
        drop(state);
        vec![T::default(); numel]
    }

    /// Gives back what was taken here.
    pub(crate) fn give<T: Float>(&self, values: Vec<T>) {
        let bytes = values.len() * size_of::<T>();
        if bytes < SHORTEST_BYTES {
            return;
        }
        let (numel, storage) = (values.len(), T::storage(values));
        let mut state = self.lock();
        state.lent_bytes = state.lent_bytes.saturating_sub(bytes);
        state.idle_bytes += bytes;
        state.idle.entry((storage.dtype(), numel)).or_default().push(storage);
        state.shrink();
    }

    /// Frees all that lies here.
    pub(crate) fn free_idle(&self) {
        let mut state = self.lock();
        (state.idle, state.idle_bytes) = (HashMap::new(), 0);
    }

    /// Frees all that lies here, and forgets how much was lent: for when more was lent than usual.
    pub(crate) fn forget(&self) {
        self.free_idle();
        let mut state = self.lock();
        state.most_lent_bytes = state.lent_bytes;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn pop(&mut self, key: (DType, usize), bytes: usize) -> Option<CpuStorage> {
        let storage = self.idle.get_mut(&key)?.pop()?;
        self.idle_bytes -= bytes;
        Some(storage)
    }

    /// Frees idle buffers until the promise holds.
    fn shrink(&mut self) {
        while self.lent_bytes + self.idle_bytes > self.most_lent_bytes {
            let Some(key) = self.idle.iter().find(|(_, idle)| !idle.is_empty()).map(|(key, _)| *key) else {
                return;
            };
            drop(self.pop(key, key.0.size_in_bytes() * key.1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: usize = SHORTEST_BYTES;

    fn idle_bytes(buffers: &Buffers) -> usize {
        buffers.lock().idle_bytes
    }

    #[test]
    fn a_buffer_that_was_given_back_is_lent_again() {
        let buffers = Buffers::default();
        let first = buffers.take::<f32>(LONG);
        let place = first.as_ptr();
        buffers.give(first);
        let second = buffers.take::<f32>(LONG);
        assert_eq!(second.as_ptr(), place);
        assert_eq!(idle_bytes(&buffers), 0);
    }

    #[test]
    fn idle_and_lent_buffers_never_exceed_the_most_that_was_lent() {
        let buffers = Buffers::default();
        // Units of different lengths, two at a time, as a forward with prefetch has them.
        let lengths = [3, 5, 2, 9, 9, 4, 9, 1].map(|n| n * LONG);
        let mut ahead = buffers.take::<f32>(lengths[0]);
        let mut most = 4 * lengths[0];
        for pair in lengths.windows(2) {
            let next = buffers.take::<f32>(pair[1]);
            most = most.max(4 * (pair[0] + pair[1]));
            assert!(idle_bytes(&buffers) + 4 * (pair[0] + pair[1]) <= most, "{pair:?}");
            buffers.give(std::mem::replace(&mut ahead, next));
            assert!(idle_bytes(&buffers) + 4 * pair[1] <= most, "{pair:?}");
        }
    }

    #[test]
    fn dtypes_and_short_buffers_do_not_mix() {
        let buffers = Buffers::default();
        buffers.give(buffers.take::<f32>(LONG));
        assert_eq!(buffers.take::<half::bf16>(LONG), vec![half::bf16::ZERO; LONG]);
        buffers.give(buffers.take::<f32>(10));
        assert_eq!(buffers.take::<f32>(10), [0.0; 10]);
        buffers.forget();
        assert_eq!(idle_bytes(&buffers), 0);
    }
}
