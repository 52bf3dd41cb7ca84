//! Redistribute against the naive oracle: the values that every rank must hold, and the bytes that may move.
//!
//! `SCONCE_REDISTRIBUTE_CASES` sets the number of random cases.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::time::Duration;

use common::{mesh, numbers, ours, received_bytes, source, tensor, value};
use proptest::prelude::*;
use sconce_dtensor::{DTensor, redistribute_between};
use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup, Rank};
use sconce_testkit::oracle::{self, Place};
use sconce_testkit::run_ranks;
use sconce_testkit::strategies::{self, RedistributeCase, cases, redistribute_cases};

const DEADLINE: Duration = Duration::from_secs(60);
const F32: usize = 4;

fn lens(held: &oracle::Held) -> Vec<usize> {
    held.iter().map(Vec::len).collect()
}

fn is_partial(places: &[Place]) -> bool {
    places.iter().any(|place| matches!(place, Place::Partial(_)))
}

/// Checks the values on every rank, and returns the bytes that all together received.
fn redistribute(case: &RedistributeCase) -> usize {
    let RedistributeCase { mesh: mesh_shape, shape, from, to } = case;
    let received = run_ranks(mesh_shape.iter().product(), DEADLINE, |world| {
        let mesh = mesh(&world, mesh_shape);
        let at = mesh.coordinate().unwrap().to_vec();
        let local =
            tensor(source(shape, mesh_shape, &at, from), &lens(&oracle::held(shape, mesh_shape, &at, from)));
        let dtensor = DTensor::from_local(&local, &mesh, &ours(from)).unwrap();
        assert_eq!(dtensor.shape(), shape);
        let before = received_bytes(&mesh);
        let moved = dtensor.redistribute(&ours(to)).unwrap();
        let received = received_bytes(&mesh) - before;
        assert_eq!(moved.placements(), ours(to));
        let held = oracle::held(shape, mesh_shape, &at, to);
        assert_eq!(moved.to_local().dims(), lens(&held));
        if !is_partial(to) {
            assert_eq!(numbers(moved.to_local()), oracle::values(shape, &held, value), "at {at:?}");
        }
        // Terms of pending reductions, whatever they are, reduce to the tensor.
        let whole = moved.full_tensor().unwrap();
        assert_eq!(numbers(&whole), (0..shape.iter().product()).map(value).collect::<Vec<_>>(), "at {at:?}");
        received
    });
    received.iter().sum()
}

fn check_bytes(case: &RedistributeCase, received: usize) {
    let RedistributeCase { mesh, shape, from, to } = case;
    let plan = sconce_dtensor::plan(shape, mesh, &ours(from), &ours(to)).unwrap();
    assert_eq!(received, plan.received_numel() * F32, "the plan says what it moves: {plan}");
    let cheapest = oracle::cheapest_sequence(shape, mesh, from, to) * F32;
    assert!(received <= cheapest, "{received} bytes, the best sequence moves {cheapest}: {plan}");
    if !is_partial(from) && !is_partial(to) {
        assert_eq!(received, oracle::lacking(shape, mesh, from, to) * F32, "the lower bound: {plan}");
    }
}

/// A tensor on some ranks of a world, to others.
#[derive(Debug, Clone)]
struct Between {
    /// Of each side: mesh, ranks in mesh order, placements.
    sides: [(Vec<usize>, Vec<usize>, Vec<Place>); 2],
    shape: Vec<usize>,
}

fn betweens() -> impl Strategy<Value = Between> {
    (strategies::shapes(), strategies::reduce_ops()).prop_flat_map(|(shape, op)| {
        let ndim = shape.len();
        let side = move || {
            let ranks = Just((0..8usize).collect::<Vec<_>>()).prop_shuffle();
            (strategies::mesh_shapes(8), ranks).prop_flat_map(move |(mesh, mut ranks)| {
                ranks.truncate(mesh.iter().product());
                let places = strategies::placements(ndim, mesh.len(), Some(op));
                (Just(mesh), Just(ranks), places)
            })
        };
        (side(), side(), Just(shape)).prop_map(|(a, b, shape)| Between { sides: [a, b], shape })
    })
}

fn sub_mesh(world: &ProcessGroup, ranks: &[usize], shape: &[usize]) -> Option<DeviceMesh> {
    let ranks: Vec<Rank> = ranks.iter().map(|rank| Rank(*rank)).collect();
    let group = world.subgroups(&[ranks]).unwrap();
    group.map(|group| mesh(&group, shape))
}

fn check_between(case: &Between) {
    let [(mesh_a, ranks_a, from), (mesh_b, ranks_b, to)] = &case.sides;
    let shape = &case.shape;
    let received = run_ranks(8, DEADLINE, |world| {
        let source_mesh = sub_mesh(&world, ranks_a, mesh_a);
        let target_mesh = sub_mesh(&world, ranks_b, mesh_b);
        let dtensor = source_mesh.map(|mesh| {
            let at = mesh.coordinate().unwrap();
            let held = oracle::held(shape, mesh_a, at, from);
            let local = tensor(source(shape, mesh_a, at, from), &lens(&held));
            DTensor::from_local_with_shape(&local, &mesh, &ours(from), shape).unwrap()
        });
        let placements = ours(to);
        let target = target_mesh.as_ref().map(|mesh| (mesh, placements.as_slice()));
        let moved = redistribute_between(&world, dtensor.as_ref(), target).unwrap();
        assert_eq!(moved.is_some(), target_mesh.is_some());
        if let (Some(moved), Some(mesh)) = (moved, target_mesh) {
            let held = oracle::held(shape, mesh_b, mesh.coordinate().unwrap(), to);
            assert_eq!(moved.to_local().dims(), lens(&held));
            if !is_partial(to) {
                assert_eq!(numbers(moved.to_local()), oracle::values(shape, &held, value));
            }
            let whole = moved.full_tensor().unwrap();
            assert_eq!(numbers(&whole), (0..shape.iter().product()).map(value).collect::<Vec<_>>());
        }
        let exchanges = world.flight_record().collectives.into_iter();
        let exchanges = exchanges.filter(|c| c.call.starts_with("all_to_all_uneven("));
        exchanges.map(|c| c.received_bytes).sum::<usize>()
    });
    if !is_partial(from) && !is_partial(to) {
        // Each rank of the target lacks what it does not hold as one of the source.
        let position = |ranks: &[usize], rank: &usize| ranks.iter().position(|other| other == rank);
        let lacking = ranks_b.iter().enumerate().map(|(nth, rank)| {
            let wanted = oracle::held(shape, mesh_b, &oracle::coordinates(mesh_b)[nth], to);
            let has = position(ranks_a, rank)
                .map(|nth| oracle::held(shape, mesh_a, &oracle::coordinates(mesh_a)[nth], from));
            let common = |has: &oracle::Held| -> usize {
                has.iter().zip(&wanted).map(|(a, b)| a.iter().filter(|i| b.contains(i)).count()).product()
            };
            oracle::numel(&wanted) - has.as_ref().map_or(0, common)
        });
        assert_eq!(received.iter().sum::<usize>(), lacking.sum::<usize>() * F32);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases("SCONCE_REDISTRIBUTE_CASES", 250), ..ProptestConfig::default() })]

    #[test]
    fn any_placements_become_any_others_at_the_fewest_bytes(case in redistribute_cases(8)) {
        let received = redistribute(&case);
        check_bytes(&case, received);
    }

    #[test]
    fn any_mesh_receives_the_tensor_of_any_other(case in betweens()) {
        check_between(&case);
    }
}

#[test]
fn shards_on_two_mesh_dims_move_no_more_than_what_ranks_lack() {
    use Place::{Replicate, Shard};
    let shards = [Shard(0), Shard(1), Replicate];
    let lists: Vec<Vec<Place>> = shards.iter().flat_map(|a| shards.iter().map(|b| vec![*a, *b])).collect();
    for (from, to) in lists.iter().flat_map(|from| lists.iter().map(move |to| (from, to))) {
        let case =
            RedistributeCase { mesh: vec![2, 2], shape: vec![10, 7], from: from.clone(), to: to.clone() };
        let received = redistribute(&case);
        check_bytes(&case, received);
    }
}

#[test]
fn the_same_ranks_as_another_mesh_need_no_more_than_one_call() {
    run_ranks(6, DEADLINE, |world| {
        let (two, one) = (mesh(&world, &[2, 3]), mesh(&world, &[6]));
        let at = two.coordinate().unwrap();
        let from = [Place::Replicate, Place::Shard(0)];
        let held = oracle::held(&[7, 4], &[2, 3], at, &from);
        let local = tensor(source(&[7, 4], &[2, 3], at, &from), &lens(&held));
        let moved = DTensor::from_local(&local, &two, &ours(&from)).unwrap();
        let moved = moved.redistribute_to(&one, &ours(&[Place::Shard(1)])).unwrap();
        let held = oracle::held(&[7, 4], &[6], one.coordinate().unwrap(), &[Place::Shard(1)]);
        assert_eq!(numbers(moved.to_local()), oracle::values(&[7, 4], &held, value));
    });
}

#[test]
fn a_mesh_without_names_or_ranks_in_common_is_refused_alike_everywhere() {
    let texts = run_ranks(3, DEADLINE, |world| {
        let pair = sub_mesh(&world, &[0, 1], &[2]);
        let third = sub_mesh(&world, &[2], &[1]);
        let dtensor = pair.map(|mesh| {
            let whole = tensor(vec![1.0; 4], &[4]);
            DTensor::from_copy(&whole, &mesh, &ours(&[Place::Shard(0)])).unwrap()
        });
        // Rank 1 forgets its part.
        let given = dtensor.as_ref().filter(|_| world.rank() == Rank(0));
        let placements = ours(&[Place::Replicate]);
        let target = third.as_ref().map(|mesh| (mesh, placements.as_slice()));
        redistribute_between(&world, given, target).unwrap_err().to_string()
    });
    let expected = "source of a redistribute between meshes, as rank 0 passed it: \
                    expected f32[4] as [S(0)] on mesh [2] of ranks [0, 1] on rank 1, got none";
    assert_eq!(texts, [expected; 3]);

    // The group through which they move lacks rank 2 of the target.
    let texts = run_ranks(3, DEADLINE, |world| {
        let all = mesh(&world, &[3]);
        let pair = world.subgroups(&[vec![Rank(0), Rank(1)], vec![Rank(2)]]).unwrap().unwrap();
        let own = mesh(&pair, &[pair.size()]);
        let dtensor =
            DTensor::from_copy(&tensor(vec![1.0; 4], &[4]), &own, &ours(&[Place::Shard(0)])).unwrap();
        let refused = redistribute_between(&pair, Some(&dtensor), Some((&all, &ours(&[Place::Replicate]))));
        refused.unwrap_err().to_string()
    });
    assert_eq!(texts[0], texts[1]);
    assert!(
        texts[0].starts_with("target mesh, group and world of a redistribute between meshes"),
        "{}",
        texts[0]
    );

    let alone = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &[]).unwrap();
    let other = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &["x"]).unwrap();
    let whole = DTensor::from_copy(&tensor(vec![1.0], &[1]), &alone, &ours(&[Place::Replicate])).unwrap();
    let refused = whole.redistribute_to(&other, &ours(&[Place::Replicate])).unwrap_err().to_string();
    assert!(refused.contains("of one world"), "{refused}");
}
