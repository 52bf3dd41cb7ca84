//! Redistribute against the obvious answer: the whole tensor, sliced.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use sconce_dtensor::{DTensor, Placement, TensorBox, local_box};
use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup, ReduceOp};
use sconce_testkit::run_ranks;

#[derive(Debug, Clone)]
struct Case {
    mesh: Vec<usize>,
    shape: Vec<usize>,
    from: Vec<Placement>,
    to: Vec<Placement>,
}

fn placements(ndim: usize, mesh_ndim: usize) -> impl Strategy<Value = Vec<Placement>> {
    let dims: Vec<Placement> = (0..ndim).map(Placement::Shard).collect();
    let any = prop_oneof![
        2 => Just(Placement::Replicate),
        1 => Just(Placement::Partial(ReduceOp::Sum)),
        4 => prop::sample::select(if dims.is_empty() { vec![Placement::Replicate] } else { dims }),
    ];
    prop::collection::vec(any, mesh_ndim)
}

fn cases() -> impl Strategy<Value = Case> {
    let meshes = prop::sample::select(vec![
        vec![1],
        vec![2],
        vec![3],
        vec![4],
        vec![2, 2],
        vec![1, 3],
        vec![3, 2],
        vec![2, 2, 2],
    ]);
    (meshes, prop::collection::vec(0usize..9, 0..4)).prop_flat_map(|(mesh, shape)| {
        let (ndim, mesh_ndim) = (shape.len(), mesh.len());
        (Just(mesh), Just(shape), placements(ndim, mesh_ndim), placements(ndim, mesh_ndim))
            .prop_map(|(mesh, shape, from, to)| Case { mesh, shape, from, to })
    })
}

/// Multiples of 24, so that a tensor split into equal terms over 2, 3, 4, 6 or 8 ranks adds up exactly.
fn whole(shape: &[usize]) -> Tensor {
    let numel = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..numel).map(|i| (24 * i + 48) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn part(tensor: &Tensor, held: &TensorBox) -> Tensor {
    if held.is_empty() {
        return Tensor::zeros(held.sizes.as_slice(), DType::F32, &Device::Cpu).unwrap();
    }
    let dims = held.offsets.iter().zip(&held.sizes).enumerate();
    dims.fold(tensor.clone(), |t, (dim, (start, len))| t.narrow(dim, *start, *len).unwrap())
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// What the rank at `at` holds: its box, and of a pending sum everything on coordinate 0, nothing elsewhere.
fn source(case: &Case, at: &[usize]) -> Tensor {
    let held = part(&whole(&case.shape), &local_box(&case.shape, &case.mesh, at, &case.from));
    let empty_term = case.from.iter().zip(at).any(|(p, at)| matches!(p, Placement::Partial(_)) && *at > 0);
    if empty_term { held.zeros_like().unwrap() } else { held }
}

fn check(case: &Case) {
    run_ranks(case.mesh.iter().product(), Duration::from_secs(30), |world: ProcessGroup| {
        let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &case.mesh, &[]).unwrap();
        let at = mesh.coordinate().unwrap().to_vec();
        let local = source(case, &at);
        let dtensor = DTensor::from_local(&local, &mesh, &case.from).unwrap();
        assert_eq!(dtensor.shape(), case.shape);
        let moved = dtensor.redistribute(&case.to).unwrap();
        assert_eq!(moved.placements(), case.to);
        let held = local_box(&case.shape, &case.mesh, &at, &case.to);
        assert_eq!(moved.to_local().dims(), held.sizes);
        if !case.to.iter().any(|p| matches!(p, Placement::Partial(_))) {
            assert_eq!(
                values(moved.to_local()),
                values(&part(&whole(&case.shape), &held)),
                "{case:?} at {at:?}"
            );
        }
        // Terms of pending sums, whatever they are, add up to the tensor.
        assert_eq!(values(&moved.full_tensor().unwrap()), values(&whole(&case.shape)), "{case:?} at {at:?}");
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_placements_become_any_others(case in cases()) {
        check(&case);
    }

    #[test]
    fn another_mesh_of_the_same_ranks_receives_the_same_tensor(
        shape in prop::collection::vec(0usize..9, 1..4),
        from in placements(1, 2),
        to in placements(1, 1),
    ) {
        let shard = |p: &[Placement]| p.iter().map(|p| match p {
            Placement::Partial(_) => Placement::Replicate,
            other => *other,
        }).collect::<Vec<_>>();
        let (from, to) = (shard(&from), shard(&to));
        run_ranks(6, Duration::from_secs(30), |world| {
            let mesh_2d = DeviceMesh::new(&world, DeviceType::Cpu, &[2, 3], &[]).unwrap();
            let mesh_1d = DeviceMesh::new(&world, DeviceType::Cpu, &[6], &[]).unwrap();
            let dtensor = DTensor::from_copy(&whole(&shape), &mesh_2d, &from).unwrap();
            let moved = dtensor.redistribute_to(&mesh_1d, &to).unwrap();
            let held = local_box(&shape, &[6], mesh_1d.coordinate().unwrap(), &to);
            assert_eq!(values(moved.to_local()), values(&part(&whole(&shape), &held)));
        });
    }
}

#[test]
fn distribute_takes_the_first_ranks_values() {
    run_ranks(3, Duration::from_secs(30), |world| {
        let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &[3], &[]).unwrap();
        let mine = (whole(&[4, 5]) * (1.0 + world.rank().0 as f64)).unwrap();
        let dtensor = DTensor::distribute(&mine, &mesh, &[Placement::Shard(1)]).unwrap();
        assert_eq!(values(&dtensor.full_tensor().unwrap()), values(&whole(&[4, 5])));
    });
}

#[test]
fn a_local_part_that_does_not_fit_is_named_by_rank_everywhere() {
    let errors = run_ranks(3, Duration::from_secs(30), |world| {
        let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &[3], &[]).unwrap();
        // 2 + 1 + 2 rows are 5, which torch.chunk splits 2, 2, 1.
        let rows = [2, 1, 2][world.rank().0];
        let local = Tensor::zeros((rows, 2), DType::F32, &Device::Cpu).unwrap();
        DTensor::from_local(&local, &mesh, &[Placement::Shard(0)]).unwrap_err().to_string()
    });
    assert_eq!(errors, ["local tensor of rank 1: expected shape [2, 2], got [1, 2]"; 3]);
}
