//! What torch answered: local shapes and offsets, values and gradients of redistribute. The files say how they were made.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::time::Duration;

use candle_core::Var;
use common::{mesh, numbers, tensor};
use sconce_dtensor::{DTensor, Placement, local_box};
use sconce_mesh::ReduceOp;
use sconce_testkit::oracle::coordinates;
use sconce_testkit::{fixture, run_ranks};
use serde_json::Value;

fn cases(name: &str) -> Vec<Value> {
    let path = fixture(name).join("expected.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn sizes(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|n| n.as_f64().unwrap() as f32).collect()
}

fn placements(value: &Value) -> Vec<Placement> {
    let one = |name: &str| match name {
        "R" => Placement::Replicate,
        "P(sum)" => Placement::Partial(ReduceOp::Sum),
        "P(avg)" => Placement::Partial(ReduceOp::Avg),
        shard => Placement::Shard(shard.trim_matches(['S', '(', ')']).parse().unwrap()),
    };
    value.as_array().unwrap().iter().map(|name| one(name.as_str().unwrap())).collect()
}

#[test]
fn every_rank_holds_what_it_holds_in_torch() {
    let cases = cases("local_shapes");
    assert!(cases.len() > 1000);
    for case in cases {
        let (shape, mesh) = (sizes(&case["shape"]), sizes(&case["mesh"]));
        let placements = placements(&case["placements"]);
        for (at, expected) in coordinates(&mesh).iter().zip(case["ranks"].as_array().unwrap()) {
            let held = local_box(&shape, &mesh, at, &placements);
            assert_eq!(
                (held.sizes, held.offsets),
                (sizes(&expected[0]), sizes(&expected[1])),
                "{case} at {at:?}"
            );
        }
    }
}

#[test]
fn values_and_gradients_of_redistribute_are_those_of_torch() {
    const SHAPE: [usize; 2] = [5, 6];
    let cases = cases("redistribute_grads");
    assert!(cases.len() > 200);
    for mesh_shape in [vec![4], vec![2, 2]] {
        run_ranks(4, Duration::from_secs(60), |world| {
            let mesh = mesh(&world, &mesh_shape);
            let at = mesh.coordinate().unwrap();
            for case in cases.iter().filter(|case| sizes(&case["mesh"]) == mesh_shape) {
                let (from, to) = (placements(&case["from"]), placements(&case["to"]));
                let whole = tensor((0..30).map(|i| 48.0 * i as f32).collect(), &SHAPE);
                let part = |p: &[Placement], whole: &candle_core::Tensor| {
                    let all = p
                        .iter()
                        .map(|p| if matches!(p, Placement::Partial(_)) { Placement::Replicate } else { *p });
                    DTensor::from_copy(whole, &mesh, &all.collect::<Vec<_>>()).unwrap().to_local().clone()
                };
                let pending = from.iter().zip(at).filter(|(p, _)| matches!(p, Placement::Partial(_)));
                let extra = pending.map(|(_, at)| 48.0 * *at as f64).sum::<f64>();
                let local = Var::from_tensor(&(part(&from, &whole) + extra).unwrap()).unwrap();
                let dtensor = DTensor::from_local_with_shape(&local, &mesh, &from, &SHAPE).unwrap();
                let moved = dtensor.redistribute(&to).unwrap();
                let weights = part(&to, &(whole / 48.0).unwrap().affine(1.0, 1.0).unwrap());
                let loss = (moved.to_local() * weights).unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();
                let expected = &case["ranks"][world.rank().0];
                if mesh_shape.len() == 1 || !to.iter().any(|p| matches!(p, Placement::Partial(_))) {
                    let what = format!("value of {from:?} -> {to:?} at {at:?}");
                    assert_eq!(numbers(moved.to_local()), floats(&expected[0]), "{what}");
                } else {
                    // On two mesh dims other orders of steps make other terms, of the same sum.
                    let sum = |tensor: &DTensor| numbers(&tensor.full_tensor().unwrap());
                    assert_eq!(sum(&moved), sum(&dtensor), "sum of {from:?} -> {to:?} at {at:?}");
                }
                let got = grads.get(&local).map(numbers).unwrap_or_default();
                assert_eq!(got, floats(&expected[1]), "gradient of {from:?} -> {to:?} at {at:?}");
            }
        });
    }
}
