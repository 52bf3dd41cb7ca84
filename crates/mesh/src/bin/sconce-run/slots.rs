//! Slots: places for ranks on this node. A lost rank's place rests for a while, and is used again after it. Pure.

use std::time::{Duration, Instant};

/// How many ranks there can be, now and later.
#[derive(Debug)]
pub(crate) struct Slots {
    least: usize,
    most: usize,
    cooldown: Duration,
    /// When each resting slot is back.
    back: Vec<Instant>,
}

impl Slots {
    pub(crate) fn new(least: usize, most: usize, cooldown: Duration) -> Self {
        Slots { least, most, cooldown, back: Vec::new() }
    }

    /// The fewest with which a world may start.
    pub(crate) fn least(&self) -> usize {
        self.least
    }

    /// Takes slots away for a while.
    pub(crate) fn lose(&mut self, n: usize, now: Instant) {
        self.back.retain(|back| *back > now);
        self.back.extend(std::iter::repeat_n(now + self.cooldown, n));
    }

    /// Slots that can be used.
    pub(crate) fn free(&self, now: Instant) -> usize {
        self.most - self.resting(now).count().min(self.most)
    }

    /// When the next one is back, if one rests.
    pub(crate) fn next(&self, now: Instant) -> Option<Instant> {
        self.resting(now).min()
    }

    fn resting(&self, now: Instant) -> impl Iterator<Item = Instant> {
        self.back.iter().copied().filter(move |back| *back > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_slot_is_back_after_its_rest() {
        let (start, rest) = (Instant::now(), Duration::from_secs(10));
        let mut slots = Slots::new(2, 4, rest);
        assert_eq!((slots.free(start), slots.next(start)), (4, None));
        slots.lose(1, start);
        let later = start + rest / 2;
        slots.lose(2, later);
        assert_eq!((slots.free(later), slots.next(later)), (1, Some(start + rest)));
        assert_eq!((slots.free(start + rest), slots.next(start + rest)), (2, Some(later + rest)));
        assert_eq!((slots.free(later + rest), slots.next(later + rest)), (4, None));
    }

    #[test]
    fn without_a_rest_nothing_is_ever_lost() {
        let (now, mut slots) = (Instant::now(), Slots::new(3, 3, Duration::ZERO));
        (0..5).for_each(|_| slots.lose(1, now));
        assert_eq!((slots.free(now), slots.next(now)), (3, None));
    }

    #[test]
    fn more_losses_than_slots_leave_none() {
        let (now, mut slots) = (Instant::now(), Slots::new(1, 2, Duration::from_secs(1)));
        slots.lose(5, now);
        assert_eq!(slots.free(now), 0);
    }
}
