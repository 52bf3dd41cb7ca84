//! Which units to gather ahead: from the order in which units ran. Pure.

/// The order of units in the forward before and in this one. Units that lie in others begin after them and end before.
#[derive(Debug, Default)]
pub(crate) struct UnitOrder {
    /// As they began last time.
    last: Vec<usize>,
    /// As they begin now.
    begun: Vec<usize>,
    /// As they ended now, without those that backward has reached.
    ended: Vec<usize>,
}

impl UnitOrder {
    pub(crate) fn forward_begins(&mut self) {
        self.last = std::mem::take(&mut self.begun);
        self.ended.clear();
    }

    /// Notes that `unit` begins; the next `depth` units if all goes as it did last time.
    pub(crate) fn forward_reached(&mut self, unit: usize, depth: usize) -> Vec<usize> {
        let at = self.begun.len();
        self.begun.push(unit);
        match self.last.get(at) {
            Some(expected) if *expected == unit => self.last[at + 1..].iter().take(depth).copied().collect(),
            _ => Vec::new(),
        }
    }

    /// Notes that `unit` ends.
    pub(crate) fn forward_left(&mut self, unit: usize) {
        self.ended.push(unit);
    }

    /// The next `depth` units that backward will reach after `unit`.
    pub(crate) fn backward_reached(&mut self, unit: usize, depth: usize) -> Vec<usize> {
        let Some(at) = self.ended.iter().rposition(|ran| *ran == unit) else { return Vec::new() };
        self.ended.truncate(at);
        self.ended.iter().rev().take(depth).copied().collect()
    }

    /// Units that backward has not reached.
    pub(crate) fn ahead(&self) -> &[usize] {
        &self.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(order: &mut UnitOrder, units: &[usize]) -> Vec<Vec<usize>> {
        order.forward_begins();
        let next = units.iter().map(|unit| order.forward_reached(*unit, 2)).collect();
        // The first holds the others.
        units[1..].iter().chain(&units[..1]).for_each(|unit| order.forward_left(*unit));
        next
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
        assert_eq!(order.backward_reached(0, 1), [1]);
        assert_eq!(order.backward_reached(1, 1), [2]);
        assert_eq!(order.backward_reached(2, 2), [1]);
        assert!(order.backward_reached(1, 1).is_empty());
        assert!(order.backward_reached(7, 1).is_empty());
    }
}
