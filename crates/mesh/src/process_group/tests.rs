//! How groups are made, shared and compared, on thread ranks.

use super::*;
use crate::ReduceOp;

#[track_caller]
fn run(world_size: usize, body: impl Fn(&ProcessGroup) + Sync) {
    let options = GroupOptions { timeout: Duration::from_secs(60) };
    let groups = ProcessGroup::threads(world_size, options).unwrap();
    std::thread::scope(|scope| {
        for group in groups {
            let body = &body;
            scope.spawn(move || body(&group));
        }
    });
}

fn ranks<const N: usize>(ranks: [usize; N]) -> Vec<Rank> {
    ranks.map(Rank).to_vec()
}

#[test]
fn a_group_knows_its_place() {
    run(3, |world| {
        assert_eq!((world.size(), world.world_size(), world.name()), (3, 3, "world"));
        assert_eq!(world.ranks(), ranks([0, 1, 2]));
        let group = world.subgroups(&[ranks([2, 0])]).unwrap();
        assert_eq!(group.is_none(), world.rank() == Rank(1));
        if let Some(group) = group {
            assert_eq!((group.name(), group.size(), group.world_size()), ("world[2, 0]", 2, 3));
            assert_eq!(group.rank(), world.rank());
            assert_eq!(group.group_rank(), GroupRank(usize::from(world.rank() == Rank(0))));
        }
    });
}

#[test]
fn equal_rank_lists_give_the_same_group_whoever_is_the_parent() {
    run(4, |world| {
        let rows = world.subgroups(&[ranks([0, 1]), ranks([2, 3])]).unwrap().unwrap();
        let again = world.subgroups(&[ranks([2, 3]), ranks([0, 1])]).unwrap().unwrap();
        assert!(rows.same_group(&again));
        let partition = if world.rank().0 < 2 { ranks([0, 1]) } else { ranks([2, 3]) };
        assert!(rows.subgroups(&[partition]).unwrap().unwrap().same_group(&rows));
        let reversed = world.subgroups(&[ranks([1, 0]), ranks([3, 2])]).unwrap().unwrap();
        assert!(!rows.same_group(&reversed));
        let all = world.subgroups(&[ranks([0, 1, 2, 3])]).unwrap().unwrap();
        assert!(all.same_group(world));
    });
}

#[test]
fn overlapping_groups_work_side_by_side() {
    run(4, |world| {
        let me = world.rank().0;
        let row = world.subgroups(&[ranks([0, 1]), ranks([2, 3])]).unwrap().unwrap();
        let column = world.subgroups(&[ranks([0, 2]), ranks([1, 3])]).unwrap().unwrap();
        let three = world.subgroups(&[ranks([0, 1, 3])]).unwrap();
        for _ in 0..100 {
            let mut sums = [1i32 << (8 * me); 2];
            row.all_reduce(&mut sums[..1], ReduceOp::Sum).unwrap();
            column.all_reduce(&mut sums[1..], ReduceOp::Sum).unwrap();
            assert_eq!(sums[0], if me < 2 { 0x0101 } else { 0x0101_0000 });
            assert_eq!(sums[1], 0x0001_0001 << (8 * (me % 2)));
            if let Some(three) = &three {
                let mut sum = [me];
                three.all_reduce(bytemuck::cast_slice_mut::<usize, i64>(&mut sum), ReduceOp::Sum).unwrap();
                assert_eq!(sum, [4]);
            }
        }
    });
}

#[test]
fn different_partitions_are_a_mismatch_on_every_rank() {
    run(3, |world| {
        let mine = if world.rank() == Rank(2) { ranks([0, 2]) } else { ranks([0, 1]) };
        let Error::Mismatch { expected, got, got_rank, .. } = world.subgroups(&[mine]).unwrap_err() else {
            panic!("no mismatch")
        };
        assert_eq!((&expected[..], &got[..]), ("subgroups([0, 1])", "subgroups([0, 2])"));
        assert_eq!(got_rank, Rank(2));
    });
}

#[test]
fn partitions_that_cannot_be_are_refused() {
    let single = ProcessGroup::single();
    for wrong in [vec![vec![]], vec![ranks([1])], vec![ranks([0]), ranks([0])], vec![ranks([0, 0])]] {
        let error = single.subgroups(&wrong).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{wrong:?}: {error}");
    }
    assert!(ProcessGroup::threads(0, GroupOptions::default()).is_err());
}

#[test]
fn a_world_of_one_is_its_own_only_group() {
    let single = ProcessGroup::single();
    assert!(single.subgroups(&[ranks([0])]).unwrap().unwrap().same_group(&single));
    assert!(single.subgroups(&[]).unwrap().is_none());
    let threads = ProcessGroup::threads(1, GroupOptions::default()).unwrap();
    assert_eq!((threads.len(), threads[0].world_size()), (1, 1));
}

#[test]
fn groups_of_one_rank_need_no_peer() {
    run(2, |world| {
        let own = world.subgroups(&[ranks([0]), ranks([1])]).unwrap().unwrap();
        assert_eq!((own.size(), own.rank()), (1, world.rank()));
        own.barrier().unwrap();
    });
}

#[test]
fn the_last_handle_frees_every_group_of_its_world() {
    let groups = ProcessGroup::threads(2, GroupOptions::default()).unwrap();
    std::thread::scope(|scope| {
        for world in groups {
            scope.spawn(move || {
                let pair = world.subgroups(&[ranks([1, 0])]).unwrap().unwrap();
                let weak = [Arc::downgrade(&world.group), Arc::downgrade(&pair.group)];
                drop(world);
                pair.barrier().unwrap();
                assert!(weak.iter().all(|group| group.strong_count() > 0), "a handle keeps the world");
                drop(pair);
                assert!(weak.iter().all(|group| group.strong_count() == 0), "no cycle");
            });
        }
    });
}

#[test]
fn a_duplicate_is_a_group_of_its_own_whose_order_of_calls_is_its_own() {
    run(3, |world| {
        let (beside, again) = (world.duplicate().unwrap(), world.duplicate().unwrap());
        assert_eq!(beside.ranks(), world.ranks());
        assert!(!beside.same_group(world) && !beside.same_group(&again));
        // Some ranks are first in the one group, some in the other: within one group that would be a mismatch.
        let sum = |group: &ProcessGroup, add: f32| {
            let mut value = [world.rank().0 as f32 + add];
            group.all_reduce(&mut value, ReduceOp::Sum).unwrap();
            value[0]
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| sum(&beside, 10.0));
            assert_eq!(sum(world, 0.0), 3.0);
            assert_eq!(other.join().unwrap(), 33.0);
        });
        assert_eq!(ProcessGroup::single().duplicate().unwrap().size(), 1);
    });
}
