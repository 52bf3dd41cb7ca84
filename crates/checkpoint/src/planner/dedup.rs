//! Which of the ranks that hold a box writes it.

use super::layout::{GlobalLayout, Holder};
use crate::plan::{WriteItem, WritePlan};

/// One plan a rank: every box written once, replicas spread so that ranks write about equally many bytes.
///
/// Boxes are placed from the largest to the smallest, each on the holder with the fewest bytes so far: on ties the
/// lowest rank, so that the plan follows from the layout alone.
///
/// # Source
/// `torch/distributed/checkpoint/_dedup_save_plans.py`, which weighs a box by its whole tensor.
pub(crate) fn assign_writers(layout: &GlobalLayout, n_ranks: usize) -> Vec<WritePlan> {
    let mut boxes: Vec<(usize, &str, &[Holder])> = Vec::new();
    for (fqn, tensor) in &layout.tensors {
        let size = tensor.dtype.size_bytes();
        boxes.extend(tensor.boxes.iter().map(|(part, holders)| (part.numel() * size, &**fqn, &**holders)));
    }
    // Boxes without a choice come first: they are the load that the others are balanced around.
    boxes.sort_by_key(|(len_bytes, _, holders)| (holders.len() > 1, std::cmp::Reverse(*len_bytes)));
    let mut written = vec![0usize; n_ranks];
    let mut plans: Vec<WritePlan> =
        (0..n_ranks).map(|writer| WritePlan { writer, items: Vec::new() }).collect();
    for (len_bytes, fqn, holders) in boxes {
        let Some(writer) = holders.iter().min_by_key(|holder| (written[holder.rank], holder.rank)) else {
            continue;
        };
        written[writer.rank] += len_bytes;
        plans[writer.rank].items.push(WriteItem { fqn: fqn.to_owned(), index: writer.index });
    }
    plans
}

#[cfg(test)]
mod tests {
    use super::super::global_layout;
    use super::*;
    use crate::plan::LocalPlan;
    use sconce_dtensor::{DType, StateDict, TensorBuf};

    /// Every rank holds `sizes`, whole tensors of bytes.
    fn replicated(sizes: &[usize], n_ranks: usize) -> Vec<WritePlan> {
        let plan = || {
            let mut state = StateDict::new();
            for (nth, size) in sizes.iter().enumerate() {
                state.insert_tensor(
                    format!("t{nth}"),
                    TensorBuf::new(DType::U8, &[*size], vec![0; *size]).unwrap(),
                );
            }
            LocalPlan::of(&state).unwrap()
        };
        assign_writers(&global_layout((0..n_ranks).map(|_| plan()).collect()).unwrap(), n_ranks)
    }

    #[test]
    fn replicas_are_written_once_and_spread_by_bytes() {
        let plans = replicated(&[10, 6, 5, 4, 3, 2], 2);
        let names: Vec<Vec<&str>> =
            plans.iter().map(|plan| plan.items.iter().map(|item| item.fqn.as_str()).collect()).collect();
        assert_eq!(names, [vec!["t0", "t3", "t5"], vec!["t1", "t2", "t4"]]);
    }

    #[test]
    fn ranks_beyond_the_tensors_write_nothing() {
        assert!(replicated(&[8], 3)[1..].iter().all(|plan| plan.items.is_empty()));
    }
}
