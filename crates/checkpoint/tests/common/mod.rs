//! What the tests of this crate share: ranks as threads, tensors cut into boxes.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, copy_runs};
use sconce_mesh::{GroupOptions, ProcessGroup};

/// Runs `body` on `n` ranks of this process and returns what each returned.
pub(crate) fn ranks<R: Send>(n: usize, body: impl Fn(ProcessGroup) -> R + Sync) -> Vec<R> {
    let groups = ProcessGroup::threads(n, GroupOptions::default()).unwrap();
    let body = &body;
    std::thread::scope(|scope| {
        let ranks: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || body(group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The element numbers of a tensor of i32, whole.
pub(crate) fn whole(shape: &[usize]) -> Vec<i32> {
    (0..shape.iter().product::<usize>() as i32).map(|i| i + 1).collect()
}

/// Boxes of [`whole`], or zeros in their place.
pub(crate) fn part(shape: &[usize], boxes: &[TensorBox], filled: bool) -> TensorBuf {
    let (all, outer) = (whole(shape), TensorBox::whole(shape));
    let mut bytes = Vec::new();
    for held in boxes {
        let mut values = vec![0i32; held.numel()];
        if filled && !held.is_empty() {
            for run in copy_runs(held, &outer, held) {
                values[run.dst..run.dst + run.len].copy_from_slice(&all[run.src..run.src + run.len]);
            }
        }
        values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
    }
    TensorBuf::from_boxes(DType::I32, shape, boxes.to_vec(), bytes).unwrap()
}

/// `{"t": boxes}`.
pub(crate) fn state(shape: &[usize], boxes: &[TensorBox], filled: bool) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.insert_tensor("t", part(shape, boxes, filled));
    state
}
