//! Which of the ranks that hold a box writes it.

use super::layout::{Held, Shared};
use crate::plan::{ChunkLayout, GlobalPlan, Layout, TensorLayout, WriteItem, WritePlan};

/// Every box written once, replicas spread so that ranks write about equally many bytes.
///
/// Boxes with one holder come first: they are the load that the others are balanced around. Those are placed from the
/// largest to the smallest, each on the holder with the fewest bytes so far: on ties the lowest rank, so that the plan
/// follows from the layout alone.
///
/// # Source
/// `torch/distributed/checkpoint/_dedup_save_plans.py`, which weighs a box by its whole tensor.
pub(super) fn assign_writers(held: Held, n_ranks: usize) -> GlobalPlan {
    let mut written = vec![0usize; n_ranks];
    let mut choices: Vec<(usize, usize, usize)> = Vec::new();
    for (at, tensor) in held.tensors.iter().enumerate() {
        for (nth, (part, holders)) in tensor.boxes.iter().enumerate() {
            let len_bytes = part.numel() * tensor.dtype.size_bytes();
            match holders.as_slice() {
                [only] => written[only.rank] += len_bytes,
                _ => choices.push((len_bytes, at, nth)),
            }
        }
    }
    choices.sort_by_key(|(len_bytes, ..)| std::cmp::Reverse(*len_bytes));
    let mut chosen: Vec<Vec<usize>> = held.tensors.iter().map(|t| vec![0; t.boxes.len()]).collect();
    for (len_bytes, at, nth) in choices {
        let holders = held.tensors[at].boxes[nth].1.iter().enumerate();
        let Some((which, holder)) = holders.min_by_key(|(_, h)| (written[h.rank], h.rank)) else { continue };
        written[holder.rank] += len_bytes;
        chosen[at][nth] = which;
    }
    let mut writes: Vec<WritePlan> =
        (0..n_ranks).map(|writer| WritePlan { writer, items: Vec::new() }).collect();
    let tensors = held.tensors.into_iter().zip(chosen);
    let tensors = tensors.map(|(tensor, chosen)| write_tensor(tensor, &chosen, &mut writes)).collect();
    GlobalPlan { layout: Layout { tree: held.tree, tensors }, writes }
}

/// Adds the boxes of a tensor to the plans of the chosen holders.
fn write_tensor(tensor: Shared, chosen: &[usize], writes: &mut [WritePlan]) -> TensorLayout {
    let Shared { fqn, dtype, shape, boxes } = tensor;
    let mut chunks = Vec::with_capacity(boxes.len());
    for ((bounds, holders), which) in boxes.into_iter().zip(chosen) {
        let holder = holders[*which];
        let items = &mut writes[holder.rank].items;
        chunks.push(ChunkLayout { bounds, writer: holder.rank, item: items.len() });
        items.push(WriteItem { fqn: fqn.clone(), index: holder.index });
    }
    TensorLayout { fqn, dtype, shape, chunks }
}
