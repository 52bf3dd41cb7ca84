//! How DTensors are made, compared, shown and saved, and what is refused.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::time::Duration;

use candle_core::{DType as CandleDType, Device, Tensor, Var};
use common::{mesh, numbers, tensor};
use sconce_dtensor::Placement::{self, Partial, Replicate, Shard};
use sconce_dtensor::{DTensor, DType, LocalTensor, Result, TensorBox, TensorBuf};
use sconce_mesh::{ProcessGroup, ReduceOp};
use sconce_testkit::run_ranks;

const DEADLINE: Duration = Duration::from_secs(30);
const SUM: Placement = Partial(ReduceOp::Sum);

fn alone() -> sconce_mesh::DeviceMesh {
    mesh(&ProcessGroup::single(), &[1])
}

fn counted(shape: &[usize]) -> Tensor {
    tensor((0..shape.iter().product::<usize>()).map(|i| i as f32).collect(), shape)
}

#[test]
fn random_values_do_not_depend_on_the_layout() {
    let single = alone();
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let make = |mesh: &sconce_mesh::DeviceMesh, placements: &[Placement]| {
            let uniform = DTensor::rand(-1.0..3.0, 5, &[7, 3, 5], dtype, mesh, placements).unwrap();
            (uniform, DTensor::randn((1.0, 2.0), 5, &[7, 3, 5], dtype, mesh, placements).unwrap())
        };
        let bits = |t: &DTensor| {
            let whole = t.full_tensor().unwrap().to_dtype(CandleDType::F64).unwrap();
            whole.flatten_all().unwrap().to_vec1::<f64>().unwrap()
        };
        let (uniform, normal) = make(&single, &[Replicate]);
        let expected = (bits(&uniform), bits(&normal));
        run_ranks(6, DEADLINE, |world| {
            for (shape, placements) in [
                (vec![6], vec![Shard(0)]),
                (vec![2, 3], vec![Shard(1), Shard(-1)]),
                (vec![3, 2], vec![Shard(0); 2]),
            ] {
                let (uniform, normal) = make(&mesh(&world, &shape), &placements);
                assert_eq!((bits(&uniform), bits(&normal)), expected, "{dtype} {placements:?}");
            }
        });
    }
}

#[test]
fn random_values_are_spread_as_they_should_be() {
    let values = |t: DTensor| numbers(t.to_local());
    let shape = [100, 100];
    let uniform = values(DTensor::rand(-1.0..3.0, 1, &shape, DType::F32, &alone(), &[Replicate]).unwrap());
    assert!(uniform.iter().all(|v| (-1.0..3.0).contains(v)));
    let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len() as f32;
    assert!((mean(&uniform) - 1.0).abs() < 0.05, "{}", mean(&uniform));
    let normal = values(DTensor::randn((1.0, 2.0), 1, &shape, DType::F32, &alone(), &[Replicate]).unwrap());
    let squares: Vec<f32> = normal.iter().map(|v| (v - 1.0).powi(2)).collect();
    assert!((mean(&normal) - 1.0).abs() < 0.08 && (mean(&squares) - 4.0).abs() < 0.25);
    let other = values(DTensor::randn((1.0, 2.0), 2, &shape, DType::F32, &alone(), &[Replicate]).unwrap());
    assert!(other.iter().zip(&normal).filter(|(a, b)| a == b).count() < 10);
    assert!(DTensor::rand(0.0..1.0, 1, &[2], DType::I64, &alone(), &[Replicate]).is_err());
}

#[test]
fn factories_fill_every_rank() {
    run_ranks(3, DEADLINE, |world| {
        let mesh = mesh(&world, &[3]);
        let all = |t: DTensor| numbers(&t.full_tensor().unwrap());
        assert_eq!(all(DTensor::zeros(&[4], DType::F32, &mesh, &[Shard(0)]).unwrap()), [0.0; 4]);
        assert_eq!(all(DTensor::ones(&[4], DType::F32, &mesh, &[Shard(-1)]).unwrap()), [1.0; 4]);
        let full = DTensor::full(2.5, &[4], DType::F64, &mesh, &[Shard(0)]).unwrap();
        assert_eq!(all(full.to_dtype(DType::F32).unwrap()), [2.5; 4]);
        assert!(DTensor::zeros(&[4], DType::F32, &mesh, &[SUM]).is_err());
    });
}

#[test]
fn distribute_takes_the_first_ranks_values() {
    run_ranks(3, DEADLINE, |world| {
        let mesh = mesh(&world, &[3]);
        let mine = (counted(&[4, 5]) * (1.0 + world.rank().0 as f64)).unwrap();
        let dtensor = DTensor::distribute(&mine, &mesh, &[Shard(1)]).unwrap();
        assert_eq!(numbers(&dtensor.full_tensor().unwrap()), numbers(&counted(&[4, 5])));
    });
}

/// What every rank answers when each does its own thing.
fn answers(act: impl Fn(usize, &sconce_mesh::DeviceMesh) -> Result<DTensor> + Sync) -> Vec<String> {
    run_ranks(3, DEADLINE, |world| act(world.rank().0, &mesh(&world, &[3])).unwrap_err().to_string())
}

#[test]
fn a_mistake_of_one_rank_is_named_on_all() {
    // 2 + 1 + 2 rows are 5, which torch.chunk splits 2, 2, 1.
    let rows = [2, 1, 2];
    let uneven = answers(|rank, mesh| DTensor::from_local(&counted(&[rows[rank], 2]), mesh, &[Shard(0)]));
    assert_eq!(uneven, ["local tensor of rank 1: expected shape [2, 2], got [1, 2]"; 3]);
    let ndim = answers(|rank, mesh| {
        let shape = if rank == 2 { vec![2] } else { vec![2, 2] };
        DTensor::from_local(&counted(&shape), mesh, &[Shard(0)])
    });
    assert_eq!(ndim, ["local tensor of rank 2: expected shape [2, 2], got [2]"; 3]);
    let dtypes = answers(|rank, mesh| {
        let dtype = if rank == 1 { CandleDType::F64 } else { CandleDType::F32 };
        DTensor::from_local(&counted(&[2]).to_dtype(dtype).unwrap(), mesh, &[Shard(0)])
    });
    assert_eq!(dtypes, ["dtype of the local tensor: expected f32 on rank 1, got f64"; 3]);
    let placements = answers(|rank, mesh| {
        let placement = if rank == 2 { Replicate } else { Shard(0) };
        DTensor::from_local(&counted(&[2]), mesh, &[placement])
    });
    assert_eq!(placements, ["placements of from_local: expected [S(0)] on rank 2, got [R]"; 3]);
    let shapes = answers(|rank, mesh| DTensor::distribute(&counted(&[2 + rank / 2]), mesh, &[Shard(0)]));
    let expected =
        "tensor and placements to distribute: expected f32[2] as [S(0)] on rank 2, got f32[3] as [S(0)]";
    assert_eq!(shapes, [expected; 3]);
}

#[test]
fn placements_that_do_not_fit_are_refused_everywhere() {
    let refused = |placements: &[Placement]| {
        let texts = answers(|_, mesh| DTensor::from_local(&counted(&[2, 2]), mesh, placements));
        assert_eq!(texts[0], texts[2]);
        texts[0].clone()
    };
    assert_eq!(refused(&[Shard(2)]), "placements [S(2)]: S(2) of a tensor with 2 dims");
    let two = refused(&[Shard(0), Replicate]);
    assert_eq!(two, "placements [S(0), R]: expected 1 placements, one a mesh dim, got 2");
    let texts =
        answers(|_, mesh| DTensor::from_copy(&counted(&[2]), mesh, &[Replicate])?.redistribute(&[Shard(-2)]));
    assert_eq!(texts, ["placements [S(-2)]: S(-2) of a tensor with 1 dims"; 3]);
}

#[test]
fn pending_terms_are_neither_saved_nor_loaded() {
    let mut pending = DTensor::from_local_with_shape(&counted(&[2]), &alone(), &[SUM], &[2]).unwrap();
    let expected = "placements [P(sum)]: pending terms can be neither saved nor loaded: redistribute first";
    assert_eq!(pending.read_box(0, &mut |_| ()).unwrap_err().to_string(), expected);
    assert_eq!(pending.write_box(0, &mut |_| ()).unwrap_err().to_string(), expected);
}

#[test]
fn equality_looks_through_layouts() {
    run_ranks(4, DEADLINE, |world| {
        let (line, square) = (mesh(&world, &[4]), mesh(&world, &[2, 2]));
        let whole = counted(&[5, 3]);
        let rows = DTensor::from_copy(&whole, &line, &[Shard(0)]).unwrap();
        let blocks = DTensor::from_copy(&whole, &square, &[Shard(1), Shard(0)]).unwrap();
        let terms = rows.redistribute(&[SUM]).unwrap();
        assert!(rows.equal(&blocks).unwrap() && blocks.equal(&terms).unwrap() && terms.equal(&rows).unwrap());
        // One element of one rank's.
        let other = (&whole
            + Tensor::eye(5, CandleDType::F32, &Device::Cpu).unwrap().narrow(1, 2, 3).unwrap() * 1e-6)
            .unwrap();
        let other = DTensor::from_copy(&other, &square, &[Shard(0), Replicate]).unwrap();
        assert!(!rows.equal(&other).unwrap());
        assert!(rows.allclose(&other, 0.0, 1e-5).unwrap() && !rows.allclose(&other, 0.0, 1e-9).unwrap());
        assert!(!rows.equal(&DTensor::from_copy(&counted(&[3, 5]), &line, &[Replicate]).unwrap()).unwrap());
        let copy = rows.copy().unwrap();
        assert!(copy.equal(&rows).unwrap());
    });
}

#[test]
fn a_dtype_changes_with_its_gradients() {
    let x = Var::from_tensor(&counted(&[3])).unwrap();
    let tensor = DTensor::from_local_with_shape(&x, &alone(), &[SUM], &[3]).unwrap();
    let wide = tensor.to_dtype(DType::F64).unwrap();
    assert_eq!((wide.placements(), wide.spec().dtype), (&[SUM][..], DType::F64));
    // Terms are not rounded one by one.
    assert_eq!(tensor.to_dtype(DType::BF16).unwrap().placements(), [Replicate]);
    let grads = wide.to_local().sum_all().unwrap().backward().unwrap();
    assert_eq!(numbers(grads.get(&x).unwrap()), [1.0; 3]);
}

#[test]
fn a_gradient_that_ranks_hold_in_terms_is_summed() {
    let grads = run_ranks(2, DEADLINE, |world| {
        let mesh = mesh(&world, &[2]);
        let x = Var::from_tensor(&counted(&[3])).unwrap();
        let whole = DTensor::from_local_with_shape(&x, &mesh, &[Replicate], &[3]).unwrap();
        // Each rank computes something else with the same values.
        let local = whole.to_local_with_grad(&[SUM]).unwrap();
        let grads = (local * (1.0 + world.rank().0 as f64)).unwrap().sum_all().unwrap().backward().unwrap();
        numbers(grads.get(&x).unwrap())
    });
    assert_eq!(grads, [[3.0; 3]; 2]);
}

#[test]
fn the_picture_shows_who_holds_what() {
    let pictures = run_ranks(8, DEADLINE, |world| {
        let mesh = mesh(&world, &[2, 2, 2]);
        let show = |shape: &[usize], placements: &[Placement]| {
            DTensor::zeros(shape, DType::F32, &mesh, placements).unwrap().to_string()
        };
        [
            show(&[6, 5], &[Replicate, Shard(0), Shard(1)]),
            show(&[6, 5], &[Replicate, Shard(0), Replicate]),
            show(&[6], &[Replicate; 3]),
            show(&[2, 2, 2], &[Shard(0), Shard(1), Shard(2)]),
        ]
    });
    let expected = "\
f32[6, 5] as [R, S(0), S(1)] on mesh [2, 2, 2]
      0..3  3..5
0..3   0 4   1 5
3..6   2 6   3 7";
    assert_eq!(pictures[5][0], expected);
    let expected = "\
f32[6, 5] as [R, S(0), R] on mesh [2, 2, 2]
   0..3  0 1 4 5
   3..6  2 3 6 7";
    assert_eq!(pictures[0][1], expected);
    assert_eq!(pictures[0][2], "f32[6] as [R, R, R] on mesh [2, 2, 2]\nall of it on ranks 0 1 2 3 4 5 6 7");
    assert!(pictures[0][3].ends_with("\nrank 7: [1, 1, 1]+[1, 1, 1]"), "{}", pictures[0][3]);
}

/// What a load into new memory gives becomes a candle tensor if it is whole.
#[test]
fn a_whole_buffer_becomes_a_tensor_and_a_part_does_not() {
    let bytes: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let whole = TensorBuf::new(DType::F32, &[2, 3], bytes.clone()).unwrap();
    let tensor = Tensor::try_from(&whole).unwrap();
    assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
    let rows = TensorBox { offsets: vec![2, 0], sizes: vec![2, 3] };
    let part = TensorBuf::from_boxes(DType::F32, &[4, 3], vec![rows], bytes).unwrap();
    let error = Tensor::try_from(&part).unwrap_err();
    assert!(matches!(error, sconce_dtensor::Error::ShapeMismatch { .. }), "{error}");
}

/// Fewer bytes than were asked for would be a checkpoint that lacks some.
#[test]
fn a_range_that_leaves_a_box_is_refused_and_nothing_is_lent() {
    let mut buffer = TensorBuf::new(DType::U8, &[4], vec![1, 2, 3, 4]).unwrap();
    let flat = sconce_dtensor::FlatTensor::whole(&counted(&[1])).unwrap();
    let mut lent = Vec::new();
    buffer.read_box_range(0, 1..3, &mut |bytes| lent.extend_from_slice(bytes)).unwrap();
    assert_eq!(lent, [2, 3]);
    for range in [3..5, 5..6, 4..9] {
        let unlent = |_: &[u8]| panic!("lent");
        for tensor in [&buffer as &dyn LocalTensor, &flat] {
            let error = tensor.read_box_range(0, range.clone(), &mut { unlent }).unwrap_err();
            assert_eq!(error.to_string(), format!("bytes {range:?} of a box: it has 4"));
        }
        let written = buffer.write_box_range(0, range.clone(), &mut |_| panic!("lent"));
        assert!(matches!(written, Err(sconce_dtensor::Error::Unreadable { .. })), "{written:?}");
    }
}
