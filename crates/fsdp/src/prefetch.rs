//! Which units to gather ahead: from the order in which units ran. Pure.

/// The order of units in the forward before and in this one.
#[derive(Debug, Default)]
pub(crate) struct UnitOrder {
    last: Vec<usize>,
    now: Vec<usize>,
    /// How much of `now` backward has not reached yet.
    ahead: usize,
}

impl UnitOrder {
    pub(crate) fn forward_begins(&mut self) {
        self.last = std::mem::take(&mut self.now);
        self.ahead = 0;
    }

    /// Notes that `unit` runs; the next `depth` units if all goes as it did last time.
    pub(crate) fn forward_reached(&mut self, unit: usize, depth: usize) -> Vec<usize> {
        let at = self.now.len();
        self.now.push(unit);
        self.ahead = self.now.len();
        match self.last.get(at) {
            Some(expected) if *expected == unit => self.last[at + 1..].iter().take(depth).copied().collect(),
            _ => Vec::new(),
        }
    }

    /// The next `depth` units that backward will reach after `unit`.
    pub(crate) fn backward_reached(&mut self, unit: usize, depth: usize) -> Vec<usize> {
        let Some(at) = self.now[..self.ahead].iter().rposition(|ran| *ran == unit) else { return Vec::new() };
        self.ahead = at;
        self.now[..at].iter().rev().take(depth).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(order: &mut UnitOrder, units: &[usize]) -> Vec<Vec<usize>> {
        order.forward_begins();
        units.iter().map(|unit| order.forward_reached(*unit, 2)).collect()
    }

    #[test]
    fn the_first_forward_prefetches_nothing_and_the_second_follows_it() {
        let mut order = UnitOrder::default();
        assert_eq!(forward(&mut order, &[0, 1, 2]), [[]; 3] as [[usize; 0]; 3]);
        assert_eq!(forward(&mut order, &[0, 1, 2]), [vec![1, 2], vec![2], vec![]]);
    }

    #[test]
    fn another_order_than_last_time_prefetches_nothing_from_where_it_differs() {
        let mut order = UnitOrder::default();
        forward(&mut order, &[0, 1, 2]);
        assert_eq!(forward(&mut order, &[0, 2, 1]), [vec![1, 2], vec![], vec![]]);
    }

    #[test]
    fn backward_goes_through_the_forward_in_reverse_also_where_a_unit_ran_twice() {
        let mut order = UnitOrder::default();
        forward(&mut order, &[0, 1, 2, 1]);
        assert_eq!(order.backward_reached(1, 1), [2]);
        assert_eq!(order.backward_reached(2, 2), [1, 0]);
        assert_eq!(order.backward_reached(1, 1), [0]);
        assert!(order.backward_reached(7, 1).is_empty());
    }
}
