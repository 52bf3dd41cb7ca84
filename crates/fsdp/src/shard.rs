//! Shard: this rank's flat f32 elements of a unit. Holds no layout and communicates nothing.
//!
//! Values are immutable while a snapshot holds them: whoever writes then writes beside them (copy on write).

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::iter::{IntoParallelIterator, ParallelIterator};

/// Elements that an update rewrites at a time: what it copies from held values is still in the first cache when it
/// computes with it, so that writing beside a snapshot is no pass over memory of its own.
const BLOCK: usize = 1024;

/// Elements that a thread updates in place at a time: more than handing them to it costs.
const PIECE: usize = 256 << 10;

/// Flat elements that state dicts and snapshots may share. A clone is the same shard.
#[derive(Debug, Clone)]
pub(crate) struct Shard(Arc<Mutex<Arc<Vec<f32>>>>);

impl Shard {
    pub(crate) fn zeros(numel: usize) -> Self {
        Self::from_vec(vec![0.0; numel])
    }

    pub(crate) fn from_vec(values: Vec<f32>) -> Self {
        Self(Arc::new(Mutex::new(Arc::new(values))))
    }

    /// What the shard holds now. While the caller keeps it, writers write beside it.
    pub(crate) fn values(&self) -> Arc<Vec<f32>> {
        self.lock().clone()
    }

    /// A shard of its own that keeps what this one holds now, without a copy.
    pub(crate) fn snapshot(&self) -> Self {
        Self(Arc::new(Mutex::new(self.values())))
    }

    /// Lends all elements for a change of some; values that a snapshot holds are copied first.
    pub(crate) fn write<R>(&self, f: impl FnOnce(&mut [f32]) -> R) -> R {
        f(exclusive(&mut self.lock()))
    }

    /// Rewrites the first `numel` elements of a shard and all of the moments beside it, which are as many.
    ///
    /// `f` is lent ranges, by several threads at a time, and changes them in place. Where a snapshot holds the values, it
    /// changes a fresh buffer that takes their place, in one pass of this thread.
    pub(crate) fn update<const N: usize>(
        &self,
        numel: usize,
        moments: &[Shard; N],
        f: impl Fn(Range<usize>, &mut [f32], [&mut [f32]; N]) + Sync,
    ) {
        let mut held = self.lock();
        let mut held_moments = moments.each_ref().map(Shard::lock);
        let mut target = Target::of(&mut held);
        let mut targets = held_moments.each_mut().map(|held| Target::of(held));
        if let Some(values) = target.in_place()
            && targets.iter_mut().all(|target| target.in_place().is_some())
        {
            let moments = targets.each_mut().map(|target| target.in_place().unwrap_or_default());
            return in_pieces(&mut values[..numel], moments, &f);
        }
        for start in (0..numel).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(numel);
            let blocks = targets.each_mut().map(|target| target.block(&range));
            f(range.clone(), target.block(&range), blocks);
        }
        target.finish();
        targets.into_iter().for_each(Target::finish);
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Vec<f32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls `f` for all of `values` and of `moments`, which are as many.
fn in_pieces<const N: usize>(
    values: &mut [f32],
    moments: [&mut [f32]; N],
    f: &(impl Fn(Range<usize>, &mut [f32], [&mut [f32]; N]) + Sync),
) {
    let mut moments = moments.map(|moment| moment.chunks_mut(PIECE));
    let pieces = values.chunks_mut(PIECE).enumerate().map(|(nth, values)| {
        let start = nth * PIECE;
        let moments = moments.each_mut().map(|pieces| pieces.next().unwrap_or_default());
        (start..start + values.len(), values, moments)
    });
    let pieces: Vec<_> = pieces.collect();
    if pieces.len() < 2 || rayon::current_num_threads() < 2 {
        pieces.into_iter().for_each(|(range, values, moments)| f(range, values, moments));
    } else {
        pieces.into_par_iter().for_each(|(range, values, moments)| f(range, values, moments));
    }
}

/// Where an update writes.
enum Target<'a> {
    InPlace(&'a mut [f32]),
    Beside { held: &'a mut Arc<Vec<f32>>, new: Vec<f32> },
}

impl<'a> Target<'a> {
    fn of(held: &'a mut Arc<Vec<f32>>) -> Self {
        if Arc::get_mut(held).is_some() {
            // No one else holds it, so that this does not copy.
            return Self::InPlace(exclusive(held));
        }
        let new = Vec::with_capacity(held.len());
        Self::Beside { held, new }
    }

    fn in_place(&mut self) -> Option<&mut [f32]> {
        match self {
            Self::InPlace(values) => Some(values),
            Self::Beside { .. } => None,
        }
    }

    /// The next block, with the old values.
    fn block(&mut self, range: &Range<usize>) -> &mut [f32] {
        match self {
            Self::InPlace(values) => &mut values[range.clone()],
            Self::Beside { held, new } => {
                new.extend_from_slice(&held[range.clone()]);
                &mut new[range.clone()]
            }
        }
    }

    fn finish(self) {
        if let Self::Beside { held, mut new } = self {
            new.extend_from_slice(&held[new.len()..]);
            *held = Arc::new(new);
        }
    }
}

/// The values to change in place, copied if someone else holds them.
fn exclusive(held: &mut Arc<Vec<f32>>) -> &mut Vec<f32> {
    Arc::make_mut(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMEL: usize = 2 * BLOCK + 7;

    fn add_gradient(shard: &Shard, moments: &[Shard; 1]) {
        let gradient: Vec<f32> = (0..NUMEL).map(|i| i as f32).collect();
        shard.update(NUMEL, moments, |range, values, [moment]| {
            for ((value, moment), g) in values.iter_mut().zip(moment).zip(&gradient[range]) {
                *moment += g;
                *value += *moment;
            }
        });
    }

    #[test]
    fn an_update_beside_a_snapshot_equals_one_in_place_and_leaves_the_snapshot() {
        let (shard, moment) = (Shard::from_vec(vec![1.0; NUMEL]), [Shard::zeros(NUMEL)]);
        let (plain, plain_moment) = (Shard::from_vec(vec![1.0; NUMEL]), [Shard::zeros(NUMEL)]);
        let (kept, kept_moment) = (shard.snapshot(), moment[0].snapshot());
        for _ in 0..2 {
            add_gradient(&shard, &moment);
            add_gradient(&plain, &plain_moment);
            assert_eq!(shard.values(), plain.values());
            assert_eq!(moment[0].values(), plain_moment[0].values());
        }
        assert_eq!(*kept.values(), vec![1.0; NUMEL]);
        assert_eq!(*kept_moment.values(), vec![0.0; NUMEL]);
    }

    #[test]
    fn pieces_of_several_threads_are_all_elements_once() {
        let numel = 3 * PIECE + 5;
        let (shard, moments) = (Shard::zeros(numel + 3), [Shard::zeros(numel), Shard::zeros(numel)]);
        for step in 1..=2 {
            shard.update(numel, &moments, |range, values, [first, second]| {
                let state = first.iter_mut().zip(second);
                for ((index, value), (first, second)) in range.zip(values).zip(state) {
                    *first += 1.0;
                    *second += index as f32;
                    *value += *first + *second;
                }
            });
            assert!(moments[0].values().iter().all(|v| *v == step as f32));
            let expected = |(index, v): (usize, &f32)| *v == index as f32 * step as f32;
            assert!(moments[1].values().iter().enumerate().all(expected));
        }
        let values = shard.values();
        assert!(values[..numel].iter().enumerate().all(|(index, v)| *v == 3.0 * (index as f32 + 1.0)));
        assert_eq!(values[numel..], [0.0; 3]);
    }

    #[test]
    fn values_move_only_while_they_are_held() {
        let (shard, moment) = (Shard::zeros(NUMEL), [Shard::zeros(NUMEL)]);
        let place = |shard: &Shard| shard.values().as_ptr();
        let before = (place(&shard), place(&moment[0]));
        add_gradient(&shard, &moment);
        assert_eq!((place(&shard), place(&moment[0])), before, "in place");
        let kept = shard.snapshot();
        assert_eq!(place(&kept), before.0, "a snapshot copies nothing");
        add_gradient(&shard, &moment);
        assert!(
            place(&shard) != before.0 && place(&moment[0]) == before.1,
            "beside what is held, and only that"
        );
        let moved = place(&shard);
        add_gradient(&shard, &moment);
        assert_eq!(place(&shard), moved, "in place again, though the snapshot lives");
    }
}
