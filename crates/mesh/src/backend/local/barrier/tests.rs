//! The interleavings of small worlds up to a bound of preemptions, by loom: no rank reads a half that another writes, and all get through.

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU32 as LoomU32;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use super::*;

impl Word for LoomU32 {
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
    fn wake_all(&self) {}
}

/// A word that orders nothing: what the barrier would be without its orderings.
#[derive(Default)]
struct Unordered(LoomU32);

impl Word for Unordered {
    fn load(&self, _: Ordering) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
    fn store(&self, value: u32, _: Ordering) {
        self.0.store(value, Ordering::Relaxed);
    }
    fn fetch_add(&self, value: u32, _: Ordering) -> u32 {
        self.0.fetch_add(value, Ordering::Relaxed)
    }
    fn replace(&self, current: u32, new: u32) -> bool {
        self.0.compare_exchange(current, new, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
    fn wake_all(&self) {}
}

/// A word on which ranks sleep for good: as the kernel does, it compares and falls asleep at once, so that a wake that got
/// lost would leave a rank asleep, which loom reports.
#[derive(Default)]
struct Futex {
    value: LoomU32,
    lock: Mutex<()>,
    woken: Condvar,
}

impl Word for Futex {
    fn load(&self, order: Ordering) -> u32 {
        self.value.load(order)
    }
    fn store(&self, value: u32, order: Ordering) {
        self.value.store(value, order);
    }
    fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.value.fetch_add(value, order)
    }
    fn replace(&self, current: u32, new: u32) -> bool {
        self.value.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
    fn wake_all(&self) {
        let _held = self.lock.lock().unwrap();
        self.woken.notify_all();
    }
}

/// How a rank waits for the phase.
trait Wait {
    fn wait(&self, current: u32);
}

impl Wait for LoomU32 {
    fn wait(&self, _: u32) {
        thread::yield_now();
    }
}

impl Wait for Unordered {
    fn wait(&self, _: u32) {
        thread::yield_now();
    }
}

impl Wait for Futex {
    fn wait(&self, current: u32) {
        let held = self.lock.lock().unwrap();
        if self.value.load(Ordering::Relaxed) == current {
            drop(self.woken.wait(held).unwrap());
        }
    }
}

/// A segment: control words, and for each rank halves that loom watches for accesses at the same time.
struct Segment<W> {
    arrivals: W,
    phase: W,
    arrived: Vec<W>,
    halves: Vec<Vec<UnsafeCell<u32>>>,
}

impl<W: Word + Wait + Default> Segment<W> {
    fn new(ranks: usize, n_halves: usize) -> Self {
        let half = |_| UnsafeCell::new(0);
        Segment {
            arrivals: W::default(),
            phase: W::default(),
            arrived: (0..ranks).map(|_| W::default()).collect(),
            halves: (0..ranks).map(|_| (0..n_halves).map(half).collect()).collect(),
        }
    }

    /// What `Stage` does: fill the own half, cross, read everyone's.
    fn run_rank(&self, me: usize, phases: u32) {
        let (arrivals, phase, arrived) = (&self.arrivals, &self.phase, &self.arrived[me]);
        let barrier = Barrier { ranks: self.arrived.len() as u32, arrivals, phase, arrived };
        for target in 1..=phases {
            let half = |rank: usize| &self.halves[rank][target as usize % self.halves[rank].len()];
            half(me).with_mut(|_filled| ());
            barrier.arrive(target);
            while !barrier.is_open(target) {
                phase.wait(target - 1);
            }
            (0..self.arrived.len()).for_each(|rank| half(rank).with(|_read| ()));
        }
    }
}

fn explore<W: Word + Wait + Default + Send + Sync + 'static>(
    ranks: usize,
    phases: u32,
    n_halves: usize,
    bound: usize,
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(bound);
    model.check(move || {
        let segment = Arc::new(Segment::<W>::new(ranks, n_halves));
        let others: Vec<_> = (1..ranks)
            .map(|me| {
                let segment = Arc::clone(&segment);
                thread::spawn(move || segment.run_rank(me, phases))
            })
            .collect();
        segment.run_rank(0, phases);
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}

#[test]
fn two_ranks_never_touch_a_half_at_the_same_time() {
    explore::<LoomU32>(2, 4, 2, 4);
}

#[test]
fn three_ranks_never_touch_a_half_at_the_same_time() {
    explore::<Futex>(3, 2, 2, 2);
}

#[test]
fn no_wake_is_lost() {
    explore::<Futex>(2, 3, 2, 4);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn one_half_a_rank_would_not_be_enough() {
    explore::<LoomU32>(2, 2, 1, 3);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_its_orderings_the_barrier_would_not_hold() {
    explore::<Unordered>(2, 2, 2, 3);
}
