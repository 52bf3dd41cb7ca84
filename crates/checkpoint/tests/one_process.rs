//! One process without any group: round trips, damage, and saves that fail.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::collections::HashMap;
use std::path::Path;

use sconce_checkpoint::{
    BLOCK_BYTES, Error, LoadOptions, MANIFEST_NAME, SaveOptions, Verify, load, load_new, load_with,
    read_metadata, save, save_with,
};
use sconce_dtensor::{DType, LocalTensor, StateDict, TensorBox, TensorBuf, Value};

fn buf(dtype: DType, shape: &[usize], seed: u8) -> TensorBuf {
    let len = shape.iter().product::<usize>() * dtype.size_bytes();
    TensorBuf::new(dtype, shape, (0..len).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect()).unwrap()
}

/// Tensors of every dtype, empty and 0-d ones, nesting, and every plain value.
fn rich_state(seed: u8) -> StateDict<'static> {
    let mut model = StateDict::new();
    for dtype in DType::ALL {
        model.insert_tensor(format!("layer.{dtype}"), buf(dtype, &[3, 5], seed));
    }
    model.insert_tensor("leer ∅", buf(DType::F32, &[0, 4], seed));
    model.insert_tensor("scalar", buf(DType::F64, &[], seed));
    let mut state = StateDict::new();
    state.insert("model", model);
    state.insert("step", i64::MIN + i64::from(seed));
    state.insert("nan", f64::from_bits(0x7ff8_0000_0000_0100 + u64::from(seed)));
    state.insert(
        "list",
        vec![Value::Bool(true), Value::None, Value::Tensor(Box::new(buf(DType::U8, &[2], seed)))],
    );
    state.insert("text", "schöne Größe");
    state.insert("bytes", vec![0u8, 255, seed]);
    state
}

/// All values of a state as text and bytes.
fn contents(state: &StateDict<'_>) -> (String, HashMap<String, Vec<u8>>) {
    let mut tensors = HashMap::new();
    for (fqn, tensor) in state.flat_tensors().unwrap() {
        let mut all = vec![];
        for index in 0..tensor.local_boxes().len() {
            tensor.read_box(index, &mut |bytes| all.extend_from_slice(bytes)).unwrap();
        }
        tensors.insert(fqn.0, all);
    }
    let bits = state.get("nan").and_then(Value::as_float).map(f64::to_bits);
    (format!("{state:?} {bits:?}"), tensors)
}

#[test]
fn every_kind_of_value_comes_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("not/yet/there");
    save(&path, &rich_state(1)).unwrap();
    let mut loaded = rich_state(2);
    load(&path, &mut loaded).unwrap();
    assert_eq!(contents(&loaded), contents(&rich_state(1)));
    assert_eq!(contents(&load_new(&path).unwrap()), contents(&rich_state(1)));
}

#[cfg(feature = "mmap")]
#[test]
fn mapped_reads_load_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    save(&path, &rich_state(1)).unwrap();
    let mut loaded = rich_state(2);
    // SAFETY: nothing else writes to this test's own directory.
    let access = unsafe { sconce_checkpoint::Access::mapped() };
    load_with(&path, &mut loaded, LoadOptions { access, ..LoadOptions::default() }).unwrap();
    assert_eq!(contents(&loaded), contents(&rich_state(1)));
}

#[test]
fn data_files_are_safetensors_with_torchs_metadata_on_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    save(&path, &rich_state(1)).unwrap();
    let file = path.join("shard-00001-model-00001-of-00001.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor("model.layer.f32").unwrap();
    assert_eq!((view.shape(), view.dtype()), (&[3, 5][..], safetensors::Dtype::F32));
    assert_eq!(view.data(), buf(DType::F32, &[3, 5], 1).bytes());
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((header + 8) % 4096, 0);
    let info = metadata.metadata().as_ref().unwrap();
    assert_eq!((info["format"].as_str(), info["DCP_VERSION"].as_str()), ("pt", "1.0"));
    let info: serde_json::Value = serde_json::from_str(&info["DCP_SHARDING_INFO"]).unwrap();
    assert_eq!(info["model.layer.f32"]["saved_offsets"], serde_json::json!([0, 0]));
    for name in tensors.names() {
        let view = tensors.tensor(name).unwrap();
        let size = view.dtype().bitsize() / 8;
        assert_eq!(view.data().as_ptr() as usize % size, bytes.as_ptr() as usize % size, "{name} is aligned");
    }
}

#[test]
fn an_existing_checkpoint_is_refused_or_exchanged_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    save(&path, &rich_state(1)).unwrap();
    let refused = save(&path, &rich_state(2)).unwrap_err();
    assert!(matches!(refused, Error::AlreadyExists { is_checkpoint: true, .. }), "{refused}");
    assert_eq!(contents(&load_new(&path).unwrap()), contents(&rich_state(1)));
    save_with(&path, &rich_state(2), SaveOptions { overwrite: true, ..SaveOptions::default() }).unwrap();
    assert_eq!(contents(&load_new(&path).unwrap()), contents(&rich_state(2)));
    assert_eq!(names(dir.path()), ["c"]);
}

#[test]
fn an_empty_directory_is_taken_and_another_one_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (empty, other) = (dir.path().join("empty"), dir.path().join("other"));
    std::fs::create_dir(&empty).unwrap();
    save(&empty, &rich_state(1)).unwrap();
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.tex"), "years of work").unwrap();
    let options = SaveOptions { overwrite: true, ..SaveOptions::default() };
    let refused = save_with(&other, &rich_state(1), options).unwrap_err();
    assert!(matches!(refused, Error::AlreadyExists { is_checkpoint: false, .. }), "{refused}");
    assert!(other.join("thesis.tex").exists());
}

/// A tensor whose device fails.
struct Broken;

impl LocalTensor for Broken {
    fn dtype(&self) -> DType {
        DType::U8
    }
    fn global_shape(&self) -> &[usize] {
        &[4]
    }
    fn local_boxes(&self) -> &[TensorBox] {
        static WHOLE: std::sync::OnceLock<Vec<TensorBox>> = std::sync::OnceLock::new();
        WHOLE.get_or_init(|| vec![TensorBox::whole(&[4])])
    }
    fn read_box(&self, _: usize, _: &mut dyn FnMut(&[u8])) -> sconce_dtensor::Result<()> {
        Err(sconce_dtensor::Error::ReadOnly { what: "a broken device".to_owned() })
    }
    fn write_box(&mut self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        self.read_box(0, &mut |_| ())
    }
    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        Ok(Box::new(Broken))
    }
}

#[test]
fn a_save_that_fails_midway_leaves_the_old_checkpoint_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    save(&path, &rich_state(1)).unwrap();
    let mut broken = rich_state(2);
    broken.insert_tensor("broken", Broken);
    let options = SaveOptions { overwrite: true, ..SaveOptions::default() };
    let error = save_with(&path, &broken, options).unwrap_err();
    assert!(matches!(&error, Error::Tensor { fqn, .. } if fqn == "broken"), "{error}");
    assert_eq!(contents(&load_new(&path).unwrap()), contents(&rich_state(1)));
    assert_eq!(names(dir.path()), ["c"]);
}

fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// Loads into a state that must stay as it is, and returns the error.
#[track_caller]
fn refused(path: &Path) -> Error {
    let mut state = rich_state(2);
    let error = load(path, &mut state).unwrap_err();
    assert_eq!(contents(&state), contents(&rich_state(2)), "{error}");
    error
}

#[test]
fn what_is_no_checkpoint_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    assert_eq!(refused(&path), Error::Missing { path: path.clone() });
    std::fs::create_dir(&path).unwrap();
    assert!(matches!(refused(&path), Error::NotACheckpoint { .. }));
    std::fs::write(path.join(MANIFEST_NAME), "not one").unwrap();
    assert!(matches!(refused(&path), Error::Corrupt { .. }));
    std::fs::write(path.join(MANIFEST_NAME), [7; 100]).unwrap();
    assert!(matches!(refused(&path), Error::NotACheckpoint { .. }));
    assert!(matches!(refused(&path.join(MANIFEST_NAME)), Error::NotACheckpoint { .. }));
}

#[test]
fn a_data_file_that_is_short_long_or_gone_is_named_with_both_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    save(&path, &rich_state(1)).unwrap();
    let file = path.join(&read_metadata(&path).unwrap().files[0].name);
    let bytes = std::fs::read(&file).unwrap();
    for changed in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat()] {
        std::fs::write(&file, changed).unwrap();
        let expected =
            Error::Length { path: file.clone(), expected: bytes.len() as u64, got: changed.len() as u64 };
        assert_eq!(refused(&path), expected);
    }
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(refused(&path), Error::Io { path, .. } if path == file));
}

#[test]
fn one_flipped_bit_names_file_and_block() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let large = |seed| {
        let mut state = StateDict::new();
        state.insert_tensor("t", buf(DType::U8, &[3 * BLOCK_BYTES as usize], seed));
        state
    };
    save(&path, &large(1)).unwrap();
    let file = path.join(&read_metadata(&path).unwrap().files[0].name);
    let good = std::fs::read(&file).unwrap();
    for at in [4096, BLOCK_BYTES as usize, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&file, bytes).unwrap();
        let block = at as u64 / BLOCK_BYTES;
        let mut state = large(2);
        let before = LoadOptions { verify: Verify::BeforeRead, ..LoadOptions::default() };
        check_damage(load_with(&path, &mut state, before).unwrap_err(), &file, block);
        assert_eq!(contents(&state), contents(&large(2)));
        // Verified in the same pass, blocks before the damaged one are there, and the error says in which tensors.
        match (block, load(&path, &mut state).unwrap_err()) {
            (0, error) => check_damage(error, &file, block),
            (_, Error::PartlyLoaded { overwritten, cause }) => {
                assert_eq!(overwritten, ["t"]);
                check_damage(*cause, &file, block);
            }
            (_, other) => panic!("{other}"),
        }
        // Without verification the flipped bit is loaded: the test sees what it claims to see.
        load_with(&path, &mut state, LoadOptions { verify: Verify::Off, ..LoadOptions::default() }).unwrap();
        assert_ne!(contents(&state), contents(&large(1)));
    }
}

#[track_caller]
fn check_damage(error: Error, file: &Path, block: u64) {
    let Error::Corrupt { path, what, offset_bytes, fqns, .. } = error else { panic!("{error}") };
    assert_eq!((&*path, what, offset_bytes), (file, format!("block {block}"), block * BLOCK_BYTES));
    assert_eq!(fqns, ["t"]);
}

#[test]
fn the_state_of_another_model_is_refused_with_every_name_and_both_shapes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let mut saved = StateDict::new();
    saved.insert_tensor("a", buf(DType::F32, &[2, 3], 1));
    saved.insert_tensor("b", buf(DType::F32, &[2], 1));
    saved.insert("n", 1i64);
    save(&path, &saved).unwrap();
    let try_load = |key: &str, dtype, shape: &[usize]| {
        let mut state = StateDict::new();
        state.insert_tensor("b", buf(DType::F32, &[2], 2));
        state.insert("n", 2i64);
        state.insert_tensor(key, buf(dtype, shape, 2));
        let error = load(&path, &mut state).unwrap_err();
        assert_eq!(state.get("n").and_then(Value::as_int), Some(2));
        assert_eq!(state.tensor::<TensorBuf>("b").unwrap().bytes(), buf(DType::F32, &[2], 2).bytes());
        error
    };
    let (missing, unexpected) = (vec!["c".to_owned()], vec!["a".to_owned()]);
    assert_eq!(
        try_load("c", DType::F32, &[2]),
        Error::KeyMismatch { path: path.clone(), missing, unexpected }
    );
    let shapes = try_load("a", DType::F32, &[3, 2]).to_string();
    assert_eq!(shapes, "a: expected shape [3, 2], got [2, 3]");
    assert_eq!(try_load("a", DType::I32, &[2, 3]).to_string(), "a: expected dtype i32, got f32");
}

#[test]
fn a_load_that_is_not_strict_reports_what_it_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let mut saved = StateDict::new();
    saved.insert_tensor("a", buf(DType::F32, &[2], 1));
    saved.insert_tensor("b", buf(DType::F32, &[2], 1));
    save(&path, &saved).unwrap();
    let mut state = StateDict::new();
    state.insert_tensor("b", buf(DType::F32, &[2], 2));
    state.insert_tensor("c", buf(DType::F32, &[2], 2));
    let report =
        load_with(&path, &mut state, LoadOptions { strict: false, ..LoadOptions::default() }).unwrap();
    assert_eq!((report.missing, report.unexpected), (vec!["c".to_owned()], vec!["a".to_owned()]));
    assert_eq!(state.tensor::<TensorBuf>("b").unwrap().bytes(), buf(DType::F32, &[2], 1).bytes());
    assert_eq!(state.tensor::<TensorBuf>("c").unwrap().bytes(), buf(DType::F32, &[2], 2).bytes());
}
