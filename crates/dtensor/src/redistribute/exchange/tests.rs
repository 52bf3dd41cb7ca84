//! Plans of small layouts, and what must hold of any.

use super::*;
use crate::run_boxes;

fn plans(held: &[Vec<TensorBox>], wanted: &[Vec<TensorBox>]) -> Vec<ExchangePlan> {
    (0..held.len()).map(|me| ExchangePlan::new(me, held, wanted, &|_, _| true).unwrap()).collect()
}

fn received(held: &[Vec<TensorBox>], wanted: &[Vec<TensorBox>]) -> usize {
    plans(held, wanted).iter().map(ExchangePlan::received_numel).sum()
}

#[test]
fn a_rank_that_holds_what_it_wants_receives_nothing() {
    let whole = vec![vec![TensorBox::whole(&[4])]; 3];
    let plan = &plans(&whole, &whole)[1];
    assert_eq!((plan.received_numel(), plan.send.len(), plan.own.len()), (0, 0, 1));
}

#[test]
fn flat_runs_to_rows_receive_exactly_what_is_lacking() {
    // 3 ranks hold 10 elements of a [5, 2] tensor as runs 0..4, 4..8, 8..10 and want rows 0..2, 2..4, 4..5.
    let wanted: Vec<_> = [(0, 4), (4, 4), (8, 2)].map(|(s, n)| run_boxes(&[5, 2], s, n)).to_vec();
    let shifted: Vec<_> = [(0, 3), (3, 5), (8, 2)].map(|(s, n)| run_boxes(&[5, 2], s, n)).to_vec();
    assert_eq!((received(&wanted, &wanted), received(&shifted, &wanted)), (0, 1));
}

#[test]
fn an_element_that_nobody_holds_is_named() {
    let held = vec![vec![TensorBox { offsets: vec![0], sizes: vec![3] }]];
    let refused = ExchangePlan::new(0, &held, &[vec![TensorBox::whole(&[4])]], &|_, _| true).unwrap_err();
    let expected = "exchange to group rank 0: no rank holds box [3]+[1] of shape [4]";
    assert_eq!(refused.to_string(), expected);
}

#[test]
fn replicas_share_the_sending() {
    // Ranks 0 to 3 hold everything, 4 to 7 want everything: each is served by another.
    let (whole, none) = (vec![TensorBox::whole(&[4])], vec![]);
    let held = [vec![whole.clone(); 4], vec![none.clone(); 4]].concat();
    let wanted = [vec![none; 4], vec![whole; 4]].concat();
    let sent: Vec<usize> = plans(&held, &wanted).iter().map(|plan| plan.send.len()).collect();
    assert_eq!(sent.iter().sum::<usize>(), 4);
}

#[test]
fn what_one_sends_the_other_takes_in_the_same_order() {
    // Overlapping boxes on many ranks: rows against columns against runs, with replicas.
    let rows: Vec<_> =
        (0..4).map(|r| run_boxes(&[7, 5], (r / 2) * 18, if r < 2 { 18 } else { 17 })).collect();
    let columns: Vec<_> =
        (0..4).map(|r| vec![TensorBox { offsets: vec![0, r], sizes: vec![7, 2] }]).collect();
    for (held, wanted) in [(&rows, &columns), (&columns, &rows)] {
        let plans = plans(held, wanted);
        for (from, to) in (0..4).flat_map(|from| (0..4).map(move |to| (from, to))).filter(|(a, b)| a != b) {
            let sent =
                plans[from].send.iter().filter(|t| t.peer == to).map(|t| (t.src_box, t.dst_box, &t.piece));
            let taken =
                plans[to].recv.iter().filter(|t| t.peer == from).map(|t| (t.src_box, t.dst_box, &t.piece));
            assert_eq!(sent.collect::<Vec<_>>(), taken.collect::<Vec<_>>(), "{from} to {to}");
        }
    }
}

#[test]
fn a_thousand_ranks_are_planned_without_looking_at_all_pairs() {
    let chunk = |dim: usize| -> Vec<Vec<TensorBox>> {
        let part = |r: usize| {
            let (mut offsets, mut sizes) = (vec![0; 2], vec![1024; 2]);
            (offsets[dim], sizes[dim]) = (r, 1);
            vec![TensorBox { offsets, sizes }]
        };
        (0..1024).map(part).collect()
    };
    let started = std::time::Instant::now();
    let plan = ExchangePlan::new(17, &chunk(0), &chunk(1), &|_, _| true).unwrap();
    assert_eq!((plan.received_numel(), plan.send.len()), (1023, 1023));
    assert!(started.elapsed() < std::time::Duration::from_secs(5), "{:?}", started.elapsed());
}
