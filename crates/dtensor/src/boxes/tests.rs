//! Boxes against plain enumeration of elements.

use super::*;
use proptest::prelude::*;

/// Row-major element numbers of a box, one by one.
fn elements(shape: &[usize], part: &TensorBox) -> Vec<usize> {
    let mut out = vec![];
    for n in 0..shape.iter().product::<usize>() {
        let (mut left, mut inside) = (n, true);
        for dim in (0..shape.len()).rev() {
            let index = left % shape[dim];
            left /= shape[dim];
            inside &= (part.offsets[dim]..part.offsets[dim] + part.sizes[dim]).contains(&index);
        }
        if inside {
            out.push(n);
        }
    }
    out
}

fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1usize..5, 0..4)
}

fn box_in(shape: Vec<usize>) -> impl Strategy<Value = TensorBox> {
    let dims = shape.into_iter().map(|n| (0..=n).prop_flat_map(move |o| (Just(o), 0..=n - o)));
    dims.collect::<Vec<_>>().prop_map(|dims| {
        let (offsets, sizes) = dims.into_iter().unzip();
        TensorBox { offsets, sizes }
    })
}

fn shape_and_boxes() -> impl Strategy<Value = (Vec<usize>, TensorBox, TensorBox)> {
    shapes().prop_flat_map(|shape| (Just(shape.clone()), box_in(shape.clone()), box_in(shape)))
}

proptest! {
    #[test]
    fn run_boxes_hold_exactly_the_run_in_order(shape in shapes(), a in 0usize..70, b in 0usize..70) {
        let numel = shape.iter().product::<usize>();
        let (start, end) = (a.min(b).min(numel), a.max(b).min(numel));
        let boxes = run_boxes(&shape, start, end - start);
        let got: Vec<usize> = boxes.iter().flat_map(|b| elements(&shape, b)).collect();
        prop_assert_eq!(got, (start..end).collect::<Vec<_>>());
        prop_assert!(boxes.len() <= (2 * shape.len()).saturating_sub(1).max(1));
        prop_assert!(boxes.iter().all(|b| b.fits(&shape)));
    }

    #[test]
    fn intersect_and_subtract_split_the_elements((shape, a, b) in shape_and_boxes()) {
        let (in_a, in_b) = (elements(&shape, &a), elements(&shape, &b));
        let both: Vec<usize> = in_a.iter().copied().filter(|e| in_b.contains(e)).collect();
        let got = a.intersect(&b).map_or(vec![], |c| elements(&shape, &c));
        prop_assert_eq!(&got, &both);
        let mut rest: Vec<usize> = a.subtract(&b).iter().flat_map(|c| elements(&shape, c)).collect();
        rest.sort_unstable();
        prop_assert_eq!(rest, in_a.iter().copied().filter(|e| !both.contains(e)).collect::<Vec<_>>());
        prop_assert_eq!(a.contains(&b), in_b.iter().all(|e| in_a.contains(e)));
    }

    #[test]
    fn copy_runs_move_each_element_of_the_overlap_once((shape, src, dst) in shape_and_boxes()) {
        let Some(overlap) = src.intersect(&dst) else { return Ok(()) };
        let (in_src, in_dst) = (elements(&shape, &src), elements(&shape, &dst));
        let mut moved = vec![];
        for run in copy_runs(&overlap, &src, &dst) {
            for i in 0..run.len {
                prop_assert_eq!(in_src[run.src + i], in_dst[run.dst + i]);
                moved.push(in_src[run.src + i]);
            }
        }
        prop_assert_eq!(moved, elements(&shape, &overlap));
    }
}

#[test]
fn equal_boxes_are_one_run() {
    let part = TensorBox { offsets: vec![1, 2, 0], sizes: vec![2, 3, 4] };
    let runs: Vec<_> = copy_runs(&part, &part, &part).collect();
    assert_eq!(runs, [CopyRun { src: 0, dst: 0, len: 24 }]);
}

#[test]
fn a_zero_dimensional_tensor_is_one_element() {
    let whole = TensorBox::whole(&[]);
    assert_eq!(run_boxes(&[], 0, 1), std::slice::from_ref(&whole));
    assert_eq!(copy_runs(&whole, &whole, &whole).collect::<Vec<_>>(), [CopyRun { src: 0, dst: 0, len: 1 }]);
}

#[test]
fn uncovered_names_what_is_left() {
    let half = TensorBox { offsets: vec![0, 0], sizes: vec![2, 6] };
    let left = uncovered(&TensorBox::whole(&[4, 6]), &[half]);
    assert_eq!(left, [TensorBox { offsets: vec![2, 0], sizes: vec![2, 6] }]);
}

#[test]
fn a_box_whose_end_overflows_does_not_fit() {
    let huge = TensorBox { offsets: vec![usize::MAX], sizes: vec![2] };
    assert!(!huge.fits(&[usize::MAX]));
}
