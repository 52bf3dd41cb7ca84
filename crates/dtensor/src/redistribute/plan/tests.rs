//! Plans as tables, and what must hold of every plan.

use sconce_mesh::ReduceOp;

use super::*;
use Placement::{Partial, Replicate, Shard};

const SUM: ReduceOp = ReduceOp::Sum;

#[track_caller]
fn check(mesh: &[usize], from: &[Placement], to: &[Placement], expected: &[Action]) {
    let plan = plan(&[6, 10], mesh, from, to).unwrap();
    let actions: Vec<Action> = plan.steps.iter().map(|step| step.action.clone()).collect();
    assert_eq!(actions, expected, "{plan}");
    assert_eq!(plan.to(), to);
}

fn gather(mesh_dims: &[usize]) -> Action {
    Action::AllGather { mesh_dims: mesh_dims.to_vec() }
}

fn all_reduce(mesh_dims: &[usize]) -> Action {
    Action::AllReduce { mesh_dims: mesh_dims.to_vec(), op: SUM }
}

fn reduce_scatter(mesh_dims: &[usize]) -> Action {
    Action::ReduceScatter { mesh_dims: mesh_dims.to_vec(), op: SUM }
}

#[test]
fn each_transition_takes_its_one_collective() {
    check(&[4], &[Shard(0)], &[Shard(0)], &[]);
    check(&[4], &[Shard(0)], &[Replicate], &[gather(&[0])]);
    check(&[4], &[Shard(0)], &[Shard(1)], &[Action::Exchange]);
    check(&[4], &[Replicate], &[Shard(1)], &[Action::Slice]);
    check(&[4], &[Partial(SUM)], &[Replicate], &[all_reduce(&[0])]);
    check(&[4], &[Partial(SUM)], &[Shard(0)], &[reduce_scatter(&[0])]);
    check(&[4], &[Replicate], &[Partial(SUM)], &[Action::MakePartial { mesh_dim: 0, op: SUM }]);
}

#[test]
fn hsdp_to_replicated_is_one_gather_in_the_shard_group() {
    check(&[2, 2], &[Replicate, Shard(0)], &[Replicate, Replicate], &[gather(&[1])]);
}

#[test]
fn steps_over_two_mesh_dims_are_one_collective() {
    check(&[2, 2], &[Shard(0), Shard(1)], &[Replicate, Replicate], &[gather(&[0, 1])]);
    check(&[2, 2], &[Shard(0), Shard(0)], &[Replicate, Replicate], &[gather(&[0, 1])]);
    check(&[2, 2], &[Partial(SUM), Partial(SUM)], &[Replicate, Replicate], &[all_reduce(&[0, 1])]);
    check(&[2, 2], &[Partial(SUM), Partial(SUM)], &[Shard(0), Shard(1)], &[reduce_scatter(&[0, 1])]);
    check(&[2, 2], &[Partial(SUM), Partial(SUM)], &[Shard(1), Shard(1)], &[reduce_scatter(&[0, 1])]);
}

#[test]
fn an_outer_chunk_of_a_nested_split_is_exchanged_not_gathered() {
    check(&[2, 2], &[Shard(0), Shard(0)], &[Replicate, Shard(0)], &[Action::Exchange]);
}

#[test]
fn replicas_of_a_term_are_sliced_before_it_is_reduced() {
    // Reducing all of it on both replicas moves 2 x 2 x 3 x 60 elements, halves of it 2 x 3 x 60, then gathered.
    let (from, to) = ([Partial(SUM), Replicate], [Replicate, Replicate]);
    let plan = plan(&[6, 10], &[4, 2], &from, &to).unwrap();
    assert_eq!(plan.steps[0].action, Action::Slice, "{plan}");
    assert_eq!(plan.received_numel(), 2 * 3 * 60 + 4 * 60, "{plan}");
    check(&[4, 2], &[Partial(SUM), Replicate], &[Replicate, Shard(0)], &[Action::Slice, all_reduce(&[0])]);
}

#[test]
fn terms_of_a_nested_split_are_made_after_a_gather() {
    // Along mesh dim 0 the chunks of [S(0), S(0)] are not what ranks want under [P, S(0)].
    let to = [Partial(SUM), Shard(0)];
    let plan = plan(&[2], &[2, 2], &[Shard(0), Shard(0)], &to).unwrap();
    assert_eq!((plan.to(), plan.received_numel()), (&to[..], 2), "{plan}");
}

#[test]
fn terms_that_stay_are_reduced_and_made_again_where_moving_each_costs_more() {
    let (from, to) = ([Partial(SUM), Shard(0)], [Partial(SUM), Replicate]);
    let plan = plan(&[8, 8], &[2, 4], &from, &to).unwrap();
    let made = Action::MakePartial { mesh_dim: 0, op: SUM };
    let actions: Vec<&Action> = plan.steps.iter().map(|step| &step.action).collect();
    assert_eq!(actions, [&reduce_scatter(&[0]), &gather(&[1]), &made], "{plan}");
    // Gathering both terms would move 2 x 3 x 64 elements.
    assert_eq!(plan.received_numel(), 64 + 3 * 64, "{plan}");
}

#[test]
fn one_pending_reduction_cannot_become_another() {
    let refused = plan(&[4], &[2], &[Partial(SUM)], &[Partial(ReduceOp::Max)]).unwrap_err();
    let expected = "placements [P(max)]: a pending sum cannot become a pending max (mesh dim 0)";
    assert_eq!(refused.to_string(), expected);
}

#[test]
fn a_pending_reduction_may_move_to_another_mesh_dim() {
    let to = [Replicate, Partial(ReduceOp::Max)];
    let moved = plan(&[6, 10], &[2, 2], &[Partial(SUM), Replicate], &to).unwrap();
    assert_eq!(moved.to(), to);
    assert_eq!(moved.steps.last().map(|step| step.received_numel), Some(0));
}

#[test]
fn a_thousand_ranks_are_planned_in_the_time_of_a_call() {
    let started = std::time::Instant::now();
    for (from, to) in
        [([Shard(0), Shard(1)], [Shard(1), Shard(0)]), ([Partial(SUM), Shard(0)], [Shard(1), Replicate])]
    {
        plan(&[8192, 8192], &[32, 32], &from, &to).unwrap();
    }
    let (from, to) = ([Partial(SUM), Shard(0), Shard(1)], [Partial(SUM), Replicate, Shard(0)]);
    plan(&[64, 64, 64, 64], &[8, 16, 8], &from, &to).unwrap();
    assert!(started.elapsed() < std::time::Duration::from_secs(2), "{:?}", started.elapsed());
}
