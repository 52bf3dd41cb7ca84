//! Meshes on thread ranks: groups, sub-meshes, equality and the picture.

use super::*;
use crate::{GroupOptions, ReduceOp};

const HSDP: [&str; 2] = ["replicate", "shard"];

#[track_caller]
fn run(world_size: usize, body: impl Fn(&ProcessGroup) + Sync) {
    let groups = ProcessGroup::threads(world_size, GroupOptions::default()).unwrap();
    std::thread::scope(|scope| {
        for group in groups {
            let body = &body;
            scope.spawn(move || body(&group));
        }
    });
}

fn mesh(world: &ProcessGroup, shape: &[usize], names: &[&str]) -> DeviceMesh {
    DeviceMesh::new(world, DeviceType::Cpu, shape, names).unwrap()
}

fn ranks<const N: usize>(ranks: [usize; N]) -> [Rank; N] {
    ranks.map(Rank)
}

#[test]
fn a_2x2_mesh_has_rows_columns_and_the_world() {
    run(4, |world| {
        let mesh = mesh(world, &[2, 2], &HSDP);
        let me = world.rank().0;
        assert_eq!(mesh.coordinate(), Some(&[me / 2, me % 2][..]));
        assert_eq!(mesh.group(0).unwrap().ranks(), ranks([me % 2, me % 2 + 2]));
        assert_eq!(mesh.group_by_name("shard").unwrap().ranks(), ranks([me / 2 * 2, me / 2 * 2 + 1]));
        assert!(mesh.mesh_group().same_group(world));
        let mut sum = [me as f32];
        mesh.group(1).unwrap().all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        mesh.group(0).unwrap().all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [6.0]);
    });
}

#[test]
fn equal_meshes_share_their_groups() {
    run(4, |world| {
        let first = mesh(world, &[2, 2], &HSDP);
        let second = mesh(world, &[2, 2], &HSDP);
        assert_eq!(first, second);
        assert_eq!(first, first.clone());
        assert!((0..2).all(|dim| first.group(dim).unwrap().same_group(second.group(dim).unwrap())));
        assert_ne!(first, mesh(world, &[4, 1], &HSDP));
        assert_ne!(first, mesh(world, &[2, 2], &[]));
        assert_ne!(first, DeviceMesh::new(world, DeviceType::Cuda, &[2, 2], &HSDP).unwrap());
    });
}

#[test]
fn a_submesh_keeps_the_requested_order_and_holds_the_caller() {
    run(8, |world| {
        let mesh = mesh(world, &[2, 2, 2], &["pp", "dp", "tp"]);
        let me = world.rank().0;
        let tp_dp = mesh.submesh(&["tp", "dp"]).unwrap();
        assert_eq!((tp_dp.shape(), tp_dp.dim_names()), (&[2, 2][..], &["tp".to_string(), "dp".into()][..]));
        let base = me / 4 * 4;
        assert_eq!(tp_dp.ranks(), ranks([base, base + 2, base + 1, base + 3]));
        assert_eq!(tp_dp.coordinate(), Some(&[me % 2, me / 2 % 2][..]));
        assert!(tp_dp.group(0).unwrap().same_group(mesh.group_by_name("tp").unwrap()));
        assert_eq!(tp_dp.mesh_group().ranks(), tp_dp.ranks());

        let dp = mesh.submesh(&["dp"]).unwrap();
        assert!(dp.mesh_group().same_group(mesh.group(1).unwrap()));
        assert_eq!(mesh.submesh(&["pp", "dp", "tp"]).unwrap(), mesh);
        assert_eq!(mesh.coordinate_of(Rank(6)), Some(vec![1, 1, 0]));
        assert_eq!(mesh.coordinate_of(Rank(8)), None);
    });
}

#[test]
fn shapes_and_names_that_do_not_fit_are_refused() {
    let single = ProcessGroup::single();
    let refused: [(&[usize], &[&str]); 6] = [
        (&[2], &[]),
        (&[0], &[]),
        (&[usize::MAX, 2], &[]),
        (&[1, 1], &["a"]),
        (&[1, 1], &["a", "a"]),
        (&[1], &["a", "b"]),
    ];
    for (shape, names) in refused {
        let result = DeviceMesh::new(&single, DeviceType::Cpu, shape, names);
        assert!(matches!(result, Err(Error::InvalidArgument { .. })), "{shape:?} {names:?}");
    }
    let text = DeviceMesh::new(&single, DeviceType::Cpu, &[2, 3], &[]).unwrap_err().to_string();
    assert_eq!(text, "device mesh: shape: expected 1 ranks in all, got 2 x 3 = 6");
    let mesh = mesh(&single, &[1, 1], &["a", "b"]);
    assert!(mesh.group(2).is_err() && mesh.group_by_name("c").is_err());
    assert!(mesh.submesh(&[]).is_err() && mesh.submesh(&["a", "a"]).is_err());
}

#[test]
fn the_picture_says_who_is_where() {
    run(6, |world| {
        let text = mesh(world, &[2, 3], &HSDP).to_string();
        assert_eq!(text, "DeviceMesh(cpu, replicate=2, shard=3)\n  replicate=0: 0 1 2\n  replicate=1: 3 4 5");
        assert_eq!(mesh(world, &[6], &[]).to_string(), "DeviceMesh(cpu, dim0=6)\n  0 1 2 3 4 5");
    });
    assert_eq!(mesh(&ProcessGroup::single(), &[], &[]).to_string(), "DeviceMesh(cpu)\n  0");
}

#[test]
fn flattened_dims_are_one_dim_of_the_same_ranks() {
    run(8, |world| {
        let mesh = mesh(world, &[2, 2, 2], &["pp", "dp", "tp"]);
        let flat = mesh.submesh(&["dp", "tp"]).unwrap().flatten("dp_tp");
        let first = world.rank().0 / 4 * 4;
        assert_eq!(flat.shape(), [4]);
        assert_eq!(flat.dim_names(), ["dp_tp"]);
        assert_eq!(flat.ranks(), [0, 1, 2, 3].map(|at| Rank(first + at)));
        assert_eq!(flat.coordinate(), Some(&[world.rank().0 % 4][..]));
        let mut sum = [1u32];
        flat.group_by_name("dp_tp").unwrap().all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [4]);
    });
}

#[test]
fn a_mesh_of_existing_groups_equals_the_one_that_made_them() {
    run(6, |world| {
        let made = mesh(world, &[2, 3], &HSDP);
        let groups = [made.group(0).unwrap().clone(), made.group(1).unwrap().clone()];
        let again = DeviceMesh::from_groups(world, DeviceType::Cpu, &groups, &HSDP).unwrap();
        assert_eq!(again, made);
        assert!(again.group(1).unwrap().same_group(&groups[1]));

        let [columns, rows] = groups;
        let refused =
            DeviceMesh::from_groups(world, DeviceType::Cpu, std::slice::from_ref(&rows), &[]).unwrap_err();
        assert_eq!(refused.to_string(), "device mesh: groups: expected 6 ranks in all, got 3 = 3");
        let refused = DeviceMesh::from_groups(world, DeviceType::Cpu, &[rows, columns], &[]).unwrap_err();
        let text = refused.to_string();
        assert!(text.starts_with("device mesh: group of dim 0: expected ranks ["), "{text}");
    });
}

#[test]
fn a_joint_group_holds_the_ranks_along_several_dims() {
    run(8, |world| {
        let mesh = mesh(world, &[2, 2, 2], &["pp", "dp", "tp"]);
        let joint = mesh.joint_group(&[0, 2]).unwrap();
        let column = world.rank().0 / 2 % 2 * 2;
        assert_eq!(joint.ranks(), [0, 1, 4, 5].map(|rank| Rank(rank + column)));
        assert!(mesh.joint_group(&[0, 2]).unwrap().same_group(&joint));
        assert!(mesh.joint_group(&[1]).unwrap().same_group(mesh.group(1).unwrap()));
        assert!(mesh.joint_group(&[0, 1, 2]).unwrap().same_group(mesh.mesh_group()));
        assert!(mesh.joint_group(&[2, 0]).is_err() && mesh.joint_group(&[1, 3]).is_err());
    });
}
