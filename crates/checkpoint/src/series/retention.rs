//! Retention: which checkpoints of a series stay. Pure.

use std::cmp::Ordering;

/// Which checkpoints of a series stay when a later one is saved: those that any of the rules names, and always the
/// newest. Without any rule, all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Retention {
    /// The newest so many.
    pub last: Option<usize>,
    /// Those whose step is a multiple of this.
    pub every: Option<u64>,
    /// Those with the best values.
    pub best: Option<Best>,
}

/// The best checkpoints by a number that is part of the saved state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Best {
    /// How many stay.
    pub n: usize,
    /// The number's flattened name in the state, such as `eval.loss`. A checkpoint without it, or in which it is NaN, is
    /// not among the best.
    pub value: String,
    /// Which numbers are best.
    pub order: Order,
}

/// Which of two numbers is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The lower, as of losses.
    Lowest,
    /// The higher, as of accuracies.
    Highest,
}

impl Retention {
    /// The steps that no rule keeps, the oldest first. `steps` are in order, with their values for `best`.
    pub(super) fn dispensable(&self, steps: &[(u64, Option<f64>)]) -> Vec<u64> {
        let Retention { last, every, best } = self;
        if last.is_none() && every.is_none() && best.is_none() {
            return Vec::new();
        }
        let first_of_last = steps.len().saturating_sub(last.unwrap_or(1).max(1));
        let is_every = |step: u64| every.is_some_and(|every| step.is_multiple_of(every));
        let best = best.as_ref().map(|best| best.steps(steps)).unwrap_or_default();
        let old = steps[..first_of_last].iter().map(|(step, _)| *step);
        old.filter(|step| !is_every(*step) && !best.contains(step)).collect()
    }
}

impl Best {
    /// The best steps; of equal ones, the newer.
    fn steps(&self, steps: &[(u64, Option<f64>)]) -> Vec<u64> {
        let valued = steps.iter().filter_map(|(step, value)| Some((*step, (*value)?)));
        let mut valued: Vec<(u64, f64)> = valued.filter(|(_, value)| !value.is_nan()).collect();
        valued.sort_by(|(a_step, a), (b_step, b)| self.order.compare(*a, *b).then(b_step.cmp(a_step)));
        valued.into_iter().take(self.n).map(|(step, _)| step).collect()
    }
}

impl Order {
    /// `Less` if `a` is better.
    fn compare(self, a: f64, b: f64) -> Ordering {
        match self {
            Order::Lowest => a.total_cmp(&b),
            Order::Highest => b.total_cmp(&a),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOSSES: [(u64, Option<f64>); 7] = [
        (10, Some(0.5)),
        (20, Some(0.1)),
        (30, Some(f64::NAN)),
        (40, None),
        (50, Some(0.3)),
        (60, Some(0.1)),
        (70, Some(0.9)),
    ];

    #[track_caller]
    fn kept(keep: &Retention) -> Vec<u64> {
        let gone = keep.dispensable(&LOSSES);
        LOSSES.iter().map(|(step, _)| *step).filter(|step| !gone.contains(step)).collect()
    }

    fn best(n: usize, order: Order) -> Option<Best> {
        Some(Best { n, value: "loss".into(), order })
    }

    #[test]
    fn each_rule_keeps_what_it_names_and_the_newest_always_stays() {
        let none = Retention::default();
        assert_eq!(kept(&none), [10, 20, 30, 40, 50, 60, 70]);
        assert_eq!(kept(&Retention { last: Some(2), ..none.clone() }), [60, 70]);
        assert_eq!(kept(&Retention { last: Some(0), ..none.clone() }), [70]);
        assert_eq!(kept(&Retention { last: Some(99), ..none.clone() }), [10, 20, 30, 40, 50, 60, 70]);
        assert_eq!(kept(&Retention { every: Some(20), ..none.clone() }), [20, 40, 60, 70]);
        assert_eq!(kept(&Retention { every: Some(0), ..none.clone() }), [70]);
        assert_eq!(kept(&Retention { best: best(1, Order::Lowest), ..none.clone() }), [60, 70]);
        assert_eq!(kept(&Retention { best: best(2, Order::Lowest), ..none.clone() }), [20, 60, 70]);
        assert_eq!(kept(&Retention { best: best(2, Order::Highest), ..none.clone() }), [10, 70]);
        assert_eq!(kept(&Retention { best: best(9, Order::Lowest), ..none }), [10, 20, 50, 60, 70]);
    }

    #[test]
    fn rules_add_up() {
        let keep = Retention { last: Some(2), every: Some(30), best: best(1, Order::Highest) };
        assert_eq!(kept(&keep), [30, 60, 70]);
        assert!(keep.dispensable(&[]).is_empty());
    }
}
