//! Views of mapped tensors: the saved bytes where they lie, verified once, whatever layout saved them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{part, ranks, whole};
use sconce_checkpoint::{
    Error, MappedCheckpoint, Retention, SaveOptions, Series, SeriesOptions, load_new, save, save_with,
};
use sconce_dtensor::{DType, LocalTensor, StateDict, TensorBox, TensorBuf, Value, run_boxes};

const SHAPE: [usize; 2] = [1031, 517];

/// What nobody changes while it is mapped.
fn open(path: &Path) -> Result<MappedCheckpoint, Error> {
    // SAFETY: the tests change files before they open a checkpoint, never after.
    unsafe { MappedCheckpoint::open(path) }
}

/// A checkpoint of `n` ranks with rows of a matrix, a bias, an empty tensor, and values.
fn saved(dir: &Path, n: usize) -> PathBuf {
    let path = dir.join("c");
    ranks(n, |group| {
        let (rank, numel) = (group.rank().0, SHAPE[0] * SHAPE[1]);
        let mine = run_boxes(&SHAPE, rank * numel / n, (rank + 1) * numel / n - rank * numel / n);
        let mut inner = StateDict::new();
        inner.insert_tensor("w", part(&SHAPE, &mine, true));
        inner.insert_tensor("empty", TensorBuf::new(DType::F64, &[0, 3], vec![]).unwrap());
        let mut state = StateDict::new();
        state.insert("model", inner);
        state.insert("list", vec![Value::Int(1), Value::Str("a".to_owned())]);
        state.insert_tensor("bias", TensorBuf::new(DType::U8, &[3], vec![7, 8, 9]).unwrap());
        let options = SaveOptions { group: Some(&group), ..SaveOptions::default() };
        save_with(&path, &state, options).unwrap();
    });
    path
}

#[test]
fn a_tensor_is_lent_where_it_lies_and_aligned() {
    let dir = tempfile::tempdir().unwrap();
    let mapped = open(&saved(dir.path(), 1)).unwrap();
    let w = mapped.tensor("model.w").unwrap();
    let bytes = w.bytes().unwrap();
    assert_eq!(bytemuck::try_cast_slice::<u8, i32>(bytes).unwrap(), whole(&SHAPE));
    // The same memory each time: nothing was copied.
    assert_eq!(mapped.tensor("model.w").unwrap().bytes().unwrap().as_ptr(), bytes.as_ptr());
    assert_eq!(mapped.tensor("bias").unwrap().bytes().unwrap(), [7, 8, 9]);
    let empty = mapped.tensor("model.empty").unwrap();
    assert_eq!((empty.global_shape(), empty.bytes().unwrap()), (&[0, 3][..], &[][..]));
    let unknown = mapped.tensor("w").unwrap_err();
    assert!(matches!(&unknown, Error::KeyMismatch { missing, .. } if missing == &["w"]), "{unknown}");
}

#[test]
fn a_tensor_of_several_ranks_is_lent_in_the_pieces_that_they_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 3);
    let mapped = open(&path).unwrap();
    let w = mapped.tensor("model.w").unwrap();
    assert_eq!(w.bytes(), None);
    let (mut numel, pieces) = (0, w.pieces().collect::<Vec<_>>());
    assert!(pieces.len() >= 3);
    for (bounds, bytes) in pieces {
        assert_eq!(part(&SHAPE, std::slice::from_ref(bounds), true).bytes(), bytes);
        bytemuck::try_cast_slice::<u8, i32>(bytes).unwrap();
        numel += bounds.numel();
    }
    assert_eq!(numel, SHAPE[0] * SHAPE[1]);

    // The whole state is one like any other: it is saved again, in another layout of files.
    let state = mapped.state().unwrap();
    let again = dir.path().join("again");
    save(&again, &state).unwrap();
    drop(state);
    let (once, twice) = (load_new(&path).unwrap(), load_new(&again).unwrap());
    assert_eq!(format!("{once:?}"), format!("{twice:?}"));
    let Some(Value::Map(model)) = twice.get("model") else { panic!("{twice:?}") };
    assert!(model.tensor::<TensorBuf>("w").unwrap() == &part(&SHAPE, &[TensorBox::whole(&SHAPE)], true));
}

#[test]
fn a_damaged_block_is_named_and_tensors_in_others_are_lent() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 1);
    let mapped = open(&path).unwrap();
    let file = path.join(&mapped.metadata().files[0].name);
    let chunk = &mapped.metadata().tensor("model.w").unwrap().chunks[0];
    let end = chunk.offset_bytes + 4 * chunk.bounds.numel() as u64;
    let bias = mapped.metadata().tensor("bias").unwrap().chunks[0].offset_bytes;
    drop(mapped);
    assert_ne!(1 << 20, bias >> 20 << 20, "they are in different blocks");
    assert!(end > (1 << 20) + 9);
    let handle = OpenOptions::new().read(true).write(true).open(&file).unwrap();
    let mut byte = [0];
    handle.read_exact_at(&mut byte, (1 << 20) + 9).unwrap();
    handle.write_all_at(&[!byte[0]], (1 << 20) + 9).unwrap();
    let mapped = open(&path).unwrap();
    for _ in 0..2 {
        let error = mapped.tensor("model.w").unwrap_err();
        let Error::Corrupt { path, what, offset_bytes, fqns, .. } = &error else { panic!("{error}") };
        assert_eq!((path, what.as_str(), *offset_bytes), (&file, "block 1", 1 << 20));
        assert!(fqns.iter().any(|fqn| fqn == "model.w"), "{fqns:?}");
    }
    assert!(mapped.state().is_err());
    assert_eq!(mapped.tensor("bias").unwrap().bytes().unwrap(), [7, 8, 9]);
    drop(mapped);

    handle.set_len(end - 1).unwrap();
    let error = open(&path).unwrap().tensor("bias").unwrap_err();
    assert!(matches!(&error, Error::Length { path, .. } if *path == file), "{error}");
    fs::remove_file(&file).unwrap();
    let error = open(&path).unwrap().tensor("bias").unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == file), "{error}");
}

#[test]
fn a_mapped_tensor_is_read_only_and_its_copy_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mapped = open(&saved(dir.path(), 2)).unwrap();
    let mut bias = mapped.tensor("bias").unwrap();
    assert!(bias.write_box(0, &mut |_| ()).is_err());
    let mut copy = bias.deep_copy().unwrap();
    copy.write_box(0, &mut |bytes| bytes.fill(1)).unwrap();
    assert_eq!(bias.bytes().unwrap(), [7, 8, 9]);
}

#[test]
fn a_mapped_checkpoint_is_not_removed_under_its_readers() {
    let dir = tempfile::tempdir().unwrap();
    let keep = Retention { last: Some(1), ..Retention::default() };
    let series = Series::open(dir.path(), SeriesOptions { keep, ..SeriesOptions::default() }).unwrap();
    let mut state = StateDict::new();
    state.insert_tensor("w", TensorBuf::new(DType::U8, &[4], vec![1, 2, 3, 4]).unwrap());
    series.save(1, &state).unwrap();
    let mapped = open(&series.path_of(1)).unwrap();
    assert_eq!(series.save(2, &state).unwrap().in_use, [1]);
    assert_eq!(mapped.tensor("w").unwrap().bytes().unwrap(), [1, 2, 3, 4]);
    drop(mapped);
    assert_eq!(series.save(3, &state).unwrap().removed, [1, 2]);
}

/// candle's tensors own their memory: one copy, straight from the map.
#[test]
fn a_candle_tensor_is_made_of_a_view_by_one_copy() {
    use candle_core::{DType as CandleDType, Device, Tensor};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let bytes: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let mut state = StateDict::new();
    state.insert_tensor("w", TensorBuf::new(DType::F32, &[2, 3], bytes).unwrap());
    save(&path, &state).unwrap();
    let mapped = open(&path).unwrap();
    let w = mapped.tensor("w").unwrap();
    let tensor =
        Tensor::from_raw_buffer(w.bytes().unwrap(), CandleDType::F32, w.global_shape(), &Device::Cpu)
            .unwrap();
    assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
}
