//! Plans against the naive search over single-dim collectives: never more elements, whatever stays or becomes a term.
//!
//! `SCONCE_PLAN_CASES` sets the number of random cases.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use common::ours;
use proptest::prelude::*;
use sconce_dtensor::plan;
use sconce_testkit::oracle;
use sconce_testkit::strategies::{RedistributeCase, cases, redistribute_cases};

proptest! {
    #![proptest_config(ProptestConfig { cases: cases("SCONCE_PLAN_CASES", 1000), ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_collectives_moves_less_than_the_plan(case in redistribute_cases(8)) {
        let RedistributeCase { mesh, shape, from, to } = &case;
        let plan = plan(shape, mesh, &ours(from), &ours(to)).unwrap();
        prop_assert_eq!(plan.to(), ours(to));
        let cheapest = oracle::cheapest_sequence(shape, mesh, from, to);
        prop_assert!(plan.received_numel() <= cheapest, "the best sequence moves {}: {}", cheapest, plan);
    }
}
