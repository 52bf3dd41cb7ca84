//! Values and gradients against one process that computes with all ranks' tensors itself.

use std::time::Duration;

use candle_core::{Device, Var};

use super::*;
use crate::GroupOptions;

const WORLDS: [usize; 4] = [1, 2, 3, 4];
const COLS: usize = 5;

#[track_caller]
fn run<R: Send>(n: usize, body: impl Fn(&ProcessGroup) -> R + Sync) -> Vec<R> {
    let options = GroupOptions { timeout: Duration::from_secs(60) };
    let groups = ProcessGroup::threads(n, options).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = groups.iter().map(|group| scope.spawn(|| body(group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// `[2 n, COLS]`, different on each rank.
fn input(rank: usize, n: usize) -> Tensor {
    let values = (0..2 * n * COLS).map(|i| ((i * 13 + rank * 7) % 11) as f32 - 5.0);
    Tensor::from_iter(values, &Device::Cpu).unwrap().reshape((2 * n, COLS)).unwrap()
}

/// Weights of a rank's loss, so that every element's gradient differs.
fn weights(rank: usize, shape: &Shape) -> Tensor {
    let values = (0..shape.elem_count()).map(|i| (i % 7) as f32 + rank as f32 * 0.5);
    Tensor::from_iter(values, &Device::Cpu).unwrap().reshape(shape).unwrap()
}

fn function(kind: Kind, tensor: &Tensor, group: &ProcessGroup) -> Tensor {
    match kind {
        Kind::AllReduce(op) => all_reduce(tensor, op, group).unwrap(),
        Kind::AllGather => all_gather(tensor, group).unwrap(),
        Kind::ReduceScatter(op) => reduce_scatter(tensor, op, group).unwrap(),
        Kind::AllToAll => all_to_all(tensor, group).unwrap(),
        Kind::Broadcast(root) => broadcast(tensor, root, group).unwrap(),
    }
}

/// What rank `me` gets, from all ranks' tensors, in candle's own operations.
fn naive(kind: Kind, all: &[Tensor], me: usize) -> Tensor {
    let n = all.len();
    let sum = || all.iter().skip(1).fold(all[0].clone(), |sum, next| (sum + next).unwrap());
    let reduced = |op| if op == ReduceOp::Avg { (sum() / n as f64).unwrap() } else { sum() };
    match kind {
        Kind::AllReduce(op) => reduced(op),
        Kind::AllGather => Tensor::cat(all, 0).unwrap(),
        Kind::ReduceScatter(op) => reduced(op).narrow(0, 2 * me, 2).unwrap(),
        Kind::AllToAll => {
            let parts: Vec<_> = all.iter().map(|tensor| tensor.narrow(0, 2 * me, 2).unwrap()).collect();
            Tensor::cat(&parts, 0).unwrap()
        }
        Kind::Broadcast(root) => all[root.0].clone(),
    }
}

fn close(a: &Tensor, b: &Tensor) -> bool {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    a.shape() == b.shape() && difference.to_scalar::<f32>().unwrap() < 1e-5
}

#[track_caller]
fn check(kind: Kind) {
    for n in WORLDS {
        // One process: every rank's result and loss from variables that it holds all.
        let vars: Vec<Var> = (0..n).map(|rank| Var::from_tensor(&input(rank, n)).unwrap()).collect();
        let all: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let results: Vec<Tensor> = (0..n).map(|me| naive(kind, &all, me)).collect();
        let loss =
            |me: usize, result: &Tensor| (result * weights(me, result.shape())).unwrap().sum_all().unwrap();
        let losses: Vec<Tensor> = results.iter().enumerate().map(|(me, result)| loss(me, result)).collect();
        let whole = Tensor::stack(&losses, 0).unwrap().sum_all().unwrap();
        let expected = whole.backward().unwrap();

        let got = run(n, |group| {
            let var = Var::from_tensor(&input(group.rank().0, n)).unwrap();
            let result = function(kind, var.as_tensor(), group);
            let gradients = loss(group.rank().0, &result).backward().unwrap();
            (result, gradients.get(&var).unwrap().clone())
        });
        for (me, (result, gradient)) in got.into_iter().enumerate() {
            assert!(close(&result, &results[me]), "{kind:?} of {n}: values of rank {me}");
            let expected = expected.get(&vars[me]).cloned().unwrap_or(all[me].zeros_like().unwrap());
            assert!(
                close(&gradient, &expected),
                "{kind:?} of {n}: gradient of rank {me}: {gradient} {expected}"
            );
        }
    }
}

#[test]
fn values_and_gradients_are_those_of_one_process() {
    for op in [ReduceOp::Sum, ReduceOp::Avg] {
        check(Kind::AllReduce(op));
        check(Kind::ReduceScatter(op));
    }
    check(Kind::AllGather);
    check(Kind::AllToAll);
    check(Kind::Broadcast(GroupRank(0)));
}

#[test]
fn strided_and_offset_tensors_and_scalars_count_as_their_values() {
    run(2, |group| {
        let me = group.rank().0 as f32;
        let whole = Tensor::new(&[[me, 1.0, 2.0], [3.0, 4.0, 5.0]], &Device::Cpu).unwrap();
        let strided = whole.t().unwrap().narrow(0, 1, 2).unwrap();
        let gathered = all_gather(&strided, group).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(gathered, [[1.0, 4.0], [2.0, 5.0], [1.0, 4.0], [2.0, 5.0]]);
        let scalar = Tensor::new(me, &Device::Cpu).unwrap();
        assert_eq!(all_gather(&scalar, group).unwrap().to_vec1::<f32>().unwrap(), [0.0, 1.0]);
        let half = scalar.to_dtype(candle_core::DType::BF16).unwrap();
        let sum = all_reduce(&half, ReduceOp::Sum, group).unwrap();
        assert_eq!(sum.to_dtype(candle_core::DType::F32).unwrap().to_scalar::<f32>().unwrap(), 1.0);
    });
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_sent() {
    run(3, |group| {
        let four = Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu).unwrap();
        let text = reduce_scatter(&four, ReduceOp::Sum, group).unwrap_err().to_string();
        assert!(text.contains("expected a first dim that 3 ranks divide, got [4]"), "{text}");
        assert!(all_to_all(&four, group).is_err() && broadcast(&four, GroupRank(3), group).is_err());
        let var = Var::from_tensor(&four).unwrap();
        let max = all_reduce(&var, ReduceOp::Max, group).unwrap().sum_all().unwrap();
        assert!(max.backward().is_err());
        assert_eq!(group.failure(), None);
    });
}
