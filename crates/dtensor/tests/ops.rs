//! Every op on every pair of placements against the same op on whole tensors: values, and gradients of all operands.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::time::Duration;

use candle_core::{Tensor, Var};
use common::{mesh, numbers};
use sconce_dtensor::{DTensor, Placement, Result, local_map};
use sconce_mesh::{DeviceMesh, ReduceOp};
use sconce_testkit::run_ranks;

use Placement::{Partial, Replicate, Shard};

const DEADLINE: Duration = Duration::from_secs(60);
const SUM: Placement = Partial(ReduceOp::Sum);

type Sharded = fn(&[DTensor]) -> Result<DTensor>;
type Whole = fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// One op both ways, and the shapes of its operands.
struct Op {
    name: &'static str,
    shapes: &'static [&'static [usize]],
    sharded: Sharded,
    whole: Whole,
}

fn softmax(x: &Tensor, dim: usize) -> candle_core::Result<Tensor> {
    let exp = x.broadcast_sub(&x.detach().max_keepdim(dim)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(dim)?)
}

/// Sizes that do not divide by the ranks, so that shards are uneven and some empty.
const OPS: &[Op] = &[
    Op { name: "tanh", shapes: &[&[3, 5]], sharded: |x| x[0].tanh(), whole: |x| x[0].tanh() },
    Op { name: "relu", shapes: &[&[5]], sharded: |x| x[0].relu(), whole: |x| x[0].relu() },
    Op { name: "scale", shapes: &[&[3, 5]], sharded: |x| x[0].scale(3.0), whole: |x| x[0].affine(3.0, 0.0) },
    Op { name: "shift", shapes: &[&[3, 5]], sharded: |x| x[0].shift(3.0), whole: |x| x[0].affine(1.0, 3.0) },
    Op { name: "add", shapes: &[&[3, 5], &[3, 5]], sharded: |x| x[0].add(&x[1]), whole: |x| &x[0] + &x[1] },
    Op {
        name: "sub",
        shapes: &[&[3, 5], &[5]],
        sharded: |x| x[0].sub(&x[1]),
        whole: |x| x[0].broadcast_sub(&x[1]),
    },
    Op {
        name: "mul",
        shapes: &[&[3, 1], &[3, 5]],
        sharded: |x| x[0].mul(&x[1]),
        whole: |x| x[0].broadcast_mul(&x[1]),
    },
    Op { name: "div", shapes: &[&[3, 5], &[3, 5]], sharded: |x| x[0].div(&x[1]), whole: |x| &x[0] / &x[1] },
    Op {
        name: "maximum",
        shapes: &[&[3, 5], &[5]],
        sharded: |x| x[0].maximum(&x[1]),
        whole: |x| x[0].broadcast_maximum(&x[1]),
    },
    Op {
        name: "matmul",
        shapes: &[&[3, 5], &[5, 2]],
        sharded: |x| x[0].matmul(&x[1]),
        whole: |x| x[0].matmul(&x[1]),
    },
    Op {
        name: "matmul of a batch",
        shapes: &[&[3, 2, 5], &[3, 5, 4]],
        sharded: |x| x[0].matmul(&x[1]),
        whole: |x| x[0].matmul(&x[1]),
    },
    Op {
        name: "linear",
        shapes: &[&[2, 3, 5], &[5, 4]],
        sharded: |x| x[0].matmul(&x[1]),
        whole: |x| x[0].broadcast_matmul(&x[1]),
    },
    Op {
        name: "sum",
        shapes: &[&[3, 5]],
        sharded: |x| x[0].sum_keepdim(&[-1]),
        whole: |x| x[0].sum_keepdim(1),
    },
    Op { name: "mean of all", shapes: &[&[3, 5]], sharded: |x| x[0].mean_all(), whole: |x| x[0].mean_all() },
    Op { name: "sum of all", shapes: &[&[3, 5]], sharded: |x| x[0].sum_all(), whole: |x| x[0].sum_all() },
    Op { name: "max", shapes: &[&[3, 5]], sharded: |x| x[0].max_keepdim(1), whole: |x| x[0].max_keepdim(1) },
    Op { name: "min", shapes: &[&[3, 5]], sharded: |x| x[0].min_keepdim(0), whole: |x| x[0].min_keepdim(0) },
    Op { name: "softmax", shapes: &[&[3, 5]], sharded: |x| x[0].softmax(-1), whole: |x| softmax(&x[0], 1) },
    Op {
        name: "transpose",
        shapes: &[&[3, 2, 5]],
        sharded: |x| x[0].transpose(0, -1),
        whole: |x| x[0].transpose(0, 2),
    },
    Op {
        name: "local_map",
        shapes: &[&[3, 5], &[5]],
        sharded: |x| {
            let n = x[0].placements().len();
            let (rows, all) = (vec![Shard(0); n], vec![Replicate; n]);
            local_map(&[(&x[0], &rows), (&x[1], &all)], &[3, 5], &rows, |parts| {
                parts[0].broadcast_mul(&parts[1])?.sqr()
            })
        },
        whole: |x| x[0].broadcast_mul(&x[1])?.sqr(),
    },
];

fn lists(ndim: usize, mesh_ndim: usize) -> Vec<Vec<Placement>> {
    let choices: Vec<Placement> = (0..ndim).map(|dim| Shard(dim as isize)).chain([Replicate, SUM]).collect();
    (0..mesh_ndim).fold(vec![vec![]], |lists: Vec<Vec<Placement>>, _| {
        lists.iter().flat_map(|list| choices.iter().map(|c| [list.as_slice(), &[*c]].concat())).collect()
    })
}

/// Values from 1 to 2, in no order.
fn operand(shape: &[usize], nth: usize) -> Tensor {
    let numel = shape.iter().product::<usize>();
    let values = (0..numel).map(|i| 1.0 + ((i * 37 + nth * 11) % 53) as f32 / 53.0).collect();
    common::tensor(values, shape)
}

/// The whole variable under the placements: as a DTensor that is a function of it.
fn spread(whole: &Var, mesh: &DeviceMesh, placements: &[Placement]) -> DTensor {
    let all = vec![Replicate; mesh.ndim()];
    DTensor::from_local_with_shape(whole, mesh, &all, whole.dims()).unwrap().redistribute(placements).unwrap()
}

#[track_caller]
fn close(got: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    for (got, expected) in numbers(got).iter().zip(numbers(expected)) {
        assert!((got - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{what}: {got} for {expected}");
    }
}

fn check(op: &Op, mesh: &DeviceMesh, placements: &[&Vec<Placement>]) {
    let what = format!("{} of {placements:?}", op.name);
    let make = || -> Vec<Var> {
        op.shapes.iter().enumerate().map(|(nth, s)| Var::from_tensor(&operand(s, nth)).unwrap()).collect()
    };
    let (vars, plain) = (make(), make());
    let operands: Vec<DTensor> = vars.iter().zip(placements).map(|(var, p)| spread(var, mesh, p)).collect();
    let got =
        (op.sharded)(&operands).unwrap_or_else(|error| panic!("{what}: {error}")).full_tensor().unwrap();
    let tensors: Vec<Tensor> = plain.iter().map(|var| var.as_tensor().clone()).collect();
    let expected = (op.whole)(&tensors).unwrap();
    close(&got, &expected, &what);
    let weights = operand(expected.dims(), 7);
    let backward = |value: &Tensor| (value * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let (grads, plain_grads) = (backward(&got), backward(&expected));
    for ((nth, var), plain) in vars.iter().enumerate().zip(&plain) {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{what}: no gradient of operand {nth}"));
        close(grad, plain_grads.get(plain).unwrap(), &format!("gradient of operand {nth} of {what}"));
    }
}

fn check_all(mesh_shape: &[usize], nth_of: usize) {
    run_ranks(mesh_shape.iter().product(), DEADLINE, |world| {
        let mesh = mesh(&world, mesh_shape);
        for op in OPS {
            let each: Vec<_> = op.shapes.iter().map(|shape| lists(shape.len(), mesh_shape.len())).collect();
            let others = each.get(1).map_or(vec![None], |lists| lists.iter().map(Some).collect());
            let pairs = each[0].iter().flat_map(|first| others.iter().map(move |second| (first, *second)));
            for (first, second) in pairs.step_by(nth_of) {
                check(op, &mesh, &[Some(first), second].into_iter().flatten().collect::<Vec<_>>());
            }
        }
    });
}

#[test]
fn every_op_on_one_mesh_dim_equals_the_whole_one() {
    check_all(&[2], 1);
    check_all(&[4], 1);
}

#[test]
fn every_op_on_two_mesh_dims_equals_the_whole_one() {
    check_all(&[2, 2], 7);
}

#[test]
fn the_rules_of_matmul_move_nothing() {
    run_ranks(2, DEADLINE, |world| {
        let mesh = mesh(&world, &[2]);
        let at = |shape: &[usize], placement| {
            spread(&Var::from_tensor(&operand(shape, 0)).unwrap(), &mesh, &[placement])
        };
        for (lhs, rhs, output) in [
            (Shard(0), Replicate, Shard(0)),
            (Replicate, Shard(1), Shard(1)),
            (Shard(1), Shard(0), SUM),
            (SUM, Replicate, SUM),
            (Replicate, Replicate, Replicate),
        ] {
            let (a, b) = (at(&[4, 6], lhs), at(&[6, 2], rhs));
            let before = common::received_bytes(&mesh);
            assert_eq!(a.matmul(&b).unwrap().placements(), [output], "{lhs} {rhs}");
            assert_eq!(common::received_bytes(&mesh), before, "{lhs} {rhs}");
        }
        // The second operand is the smaller: it is gathered, not the first.
        let (a, b) = (at(&[64, 6], Shard(0)), at(&[6, 2], Shard(1)));
        assert_eq!(a.matmul(&b).unwrap().placements(), [Shard(0)]);
    });
}

#[test]
fn reshape_keeps_shards_or_says_what_to_do() {
    run_ranks(2, DEADLINE, |world| {
        let mesh = mesh(&world, &[2]);
        let at =
            |shape: &[usize], placement| DTensor::from_copy(&operand(shape, 0), &mesh, &[placement]).unwrap();
        for (from, placement, to, expected) in [
            (&[4, 6][..], Shard(0), &[24][..], Shard(0)),
            (&[24], Shard(0), &[4, 6], Shard(0)),
            (&[2, 4, 6], Shard(1), &[2, 4, 2, 3], Shard(1)),
            (&[2, 8], Shard(1), &[2, 4, 2], Shard(1)),
            (&[2, 8], Shard(1), &[1, 2, 8, 1], Shard(2)),
            (&[2, 8], Replicate, &[16], Replicate),
        ] {
            let reshaped = at(from, placement).reshape(to).unwrap();
            assert_eq!(reshaped.placements(), [expected], "{from:?} to {to:?}");
            let whole = operand(from, 0).reshape(to).unwrap();
            assert_eq!(numbers(&reshaped.full_tensor().unwrap()), numbers(&whole));
        }
        let refused = at(&[4, 6], Shard(1)).reshape(&[24]).unwrap_err().to_string();
        assert!(refused.contains("redistribute S(1) to Replicate"), "{refused}");
        // 3 rows are 2 and 1, 9 elements 5 and 4.
        assert!(at(&[3, 3], Shard(0)).reshape(&[9]).is_err());
    });
}

#[test]
fn operands_that_do_not_fit_are_refused_by_name() {
    run_ranks(2, DEADLINE, |world| {
        let (mesh, other) = (mesh(&world, &[2]), common::mesh(&world, &[2, 1]));
        let on = |mesh: &DeviceMesh, shape: &[usize]| {
            DTensor::from_copy(&operand(shape, 0), mesh, &vec![Replicate; mesh.ndim()]).unwrap()
        };
        let refused = on(&mesh, &[2, 3]).matmul(&on(&mesh, &[2, 3])).unwrap_err().to_string();
        assert_eq!(refused, "second operand of matmul: expected shape [2, 3], got [2, 3]");
        let refused = on(&mesh, &[2, 3]).add(&on(&mesh, &[4])).unwrap_err().to_string();
        assert_eq!(refused, "second operand of add, to broadcast: expected shape [2, 3], got [4]");
        let refused = on(&mesh, &[2]).add(&on(&other, &[2])).unwrap_err().to_string();
        assert!(refused.starts_with("operands of add on different meshes"), "{refused}");
        assert!(on(&mesh, &[2]).sum_keepdim(&[1]).is_err() && on(&mesh, &[2, 0]).max_keepdim(1).is_err());
    });
}
