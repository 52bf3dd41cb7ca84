//! Who writes what, and what is refused.

use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf};

use super::layout::first_overlap;
use super::*;
use crate::plan::SavePlan;

/// Every rank holds `sizes`, whole tensors of bytes.
fn replicated(sizes: &[usize], n_ranks: usize) -> GlobalPlan {
    let plan = || {
        let mut state = StateDict::new();
        for (nth, size) in sizes.iter().enumerate() {
            let tensor = TensorBuf::new(DType::U8, &[*size], vec![0; *size]).unwrap();
            state.insert_tensor(format!("t{nth}"), tensor);
        }
        SavePlan::of(&state).unwrap()
    };
    DefaultSavePlanner.global_plan((0..n_ranks).map(|_| plan()).collect()).unwrap()
}

#[test]
fn replicas_are_written_once_and_spread_by_bytes() {
    let plan = replicated(&[10, 6, 5, 4, 3, 2], 2);
    let names = |write: &WritePlan| write.items.iter().map(|item| item.fqn.clone()).collect::<Vec<_>>();
    assert_eq!(plan.writes.iter().map(names).collect::<Vec<_>>(), [["t0", "t3", "t5"], ["t1", "t2", "t4"]]);
}

#[test]
fn ranks_beyond_the_tensors_write_nothing() {
    assert!(replicated(&[8], 3).writes[1..].iter().all(|plan| plan.items.is_empty()));
}

#[test]
fn a_layout_points_at_the_items_of_its_writers() {
    let plan = replicated(&[3, 3, 3, 3, 3], 3);
    assert_eq!(plan.layout.tensors.len(), 5);
    for tensor in &plan.layout.tensors {
        for chunk in &tensor.chunks {
            assert_eq!(plan.writes[chunk.writer].items[chunk.item].fqn, tensor.fqn);
        }
    }
}

#[test]
fn an_overlap_is_found_along_whichever_dim_it_is() {
    let part =
        |offsets: [usize; 2], sizes: [usize; 2]| TensorBox { offsets: offsets.into(), sizes: sizes.into() };
    let columns: Vec<TensorBox> = (0..50).map(|nth| part([0, 2 * nth], [7, 2])).collect();
    let refs: Vec<&TensorBox> = columns.iter().collect();
    assert_eq!(first_overlap(&refs), None);
    let wide = part([6, 41], [1, 3]);
    let with: Vec<&TensorBox> = refs.iter().copied().chain([&wide]).collect();
    assert_eq!(first_overlap(&with), Some((&columns[20], &wide)));
    let scalar = TensorBox::whole(&[]);
    assert!(first_overlap(&[&scalar, &scalar]).is_some());
    assert_eq!(first_overlap(&[&scalar]), None);
}
