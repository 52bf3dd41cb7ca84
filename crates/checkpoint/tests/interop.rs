//! PyTorch reads what we write, bit for bit: run by `cargo xtask interop --torch PYTHON`.

#![cfg(feature = "torch")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;
#[path = "common/plain.rs"]
mod plain;
#[path = "common/torch_cases.rs"]
mod torch_cases;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::ranks;
use plain::{entries, plain, sorted_text, state, text};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use sconce_checkpoint::{
    DefaultSavePlanner, LoadOptions, SaveOptions, StorageWriter, hf, load_new_from, open, save_to, save_with,
    torch,
};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value, chunk_range, copy_runs};

/// Random states that go through torch, and random checkpoints that it writes of each kind; `SCONCE_INTEROP_CASES` makes
/// it more.
const CASES: usize = 40;

fn n_cases() -> usize {
    std::env::var("SCONCE_INTEROP_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(CASES)
}

#[track_caller]
fn python(arguments: &[&str]) {
    script("tests/interop.py", arguments);
}

#[track_caller]
fn script(name: &str, arguments: &[&str]) {
    let python = std::env::var("SCONCE_TORCH_PYTHON")
        .unwrap_or_else(|_| panic!("run `cargo xtask interop --torch PYTHON`"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let output = Command::new(python).arg(script).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
}

/// Every dtype, and the shapes that cut unevenly; with `small`, those without elements and dims too.
fn tensors(small: bool) -> Vec<(String, TensorBuf)> {
    let mut shapes: Vec<Vec<usize>> = vec![vec![6, 8], vec![7], vec![3, 5, 2], vec![1, 1]];
    if small {
        shapes.extend([vec![], vec![0], vec![2, 0, 3]]);
    }
    let mut tensors = Vec::new();
    for dtype in DType::ALL {
        for shape in &shapes {
            let len = shape.iter().product::<usize>() * dtype.size_bytes();
            let byte = |i: usize| if dtype == DType::Bool { (i % 2) as u8 } else { (i * 29 % 251) as u8 };
            let name =
                format!("{dtype}.{}", shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x"));
            tensors.push((name, TensorBuf::new(dtype, shape, (0..len).map(byte).collect()).unwrap()));
        }
    }
    tensors
}

/// Without the dtype that torch's reader does not find in the Python package of safetensors 0.8.
fn known_to_safetensors(mut tensors: Vec<(String, TensorBuf)>) -> Vec<(String, TensorBuf)> {
    use sconce_dtensor::LocalTensor;
    tensors.retain(|(_, tensor)| tensor.dtype() != DType::F8E8M0);
    tensors
}

/// The part of rank `rank`: rows, columns or copies, by turns.
fn part(nth: usize, whole: &TensorBuf, rank: usize, world: usize) -> TensorBuf {
    use sconce_dtensor::LocalTensor;
    let shape = whole.global_shape().to_vec();
    let mut bounds = TensorBox::whole(&shape);
    if nth % 3 < shape.len() {
        let range = chunk_range(shape[nth % 3], world, rank);
        (bounds.offsets[nth % 3], bounds.sizes[nth % 3]) = (range.start, range.len());
    }
    let size = whole.dtype().size_bytes();
    let mut bytes = vec![0; bounds.numel() * size];
    if !bounds.is_empty() {
        for run in copy_runs(&bounds, &TensorBox::whole(&shape), &bounds) {
            bytes[run.dst * size..][..run.len * size]
                .copy_from_slice(&whole.bytes()[run.src * size..][..run.len * size]);
        }
    }
    TensorBuf::from_boxes(whole.dtype(), &shape, vec![bounds], bytes).unwrap()
}

fn flat(tensors: &[(String, TensorBuf)]) -> StateDict<'static> {
    let mut state = StateDict::new();
    tensors.iter().for_each(|(name, tensor)| drop(state.insert_tensor(name.clone(), tensor.clone())));
    state
}

/// The whole tensors as a file that torch compares with.
fn expected(dir: &Path, tensors: &[(String, TensorBuf)]) -> PathBuf {
    let path = dir.join("expected.safetensors");
    save_to(&mut hf::Writer::new(&path), &mut DefaultSavePlanner, &flat(tensors), None).unwrap();
    path
}

fn on_ranks(
    world: usize,
    tensors: &[(String, TensorBuf)],
    writer: impl Fn() -> Box<dyn StorageWriter> + Sync,
) {
    ranks(world, |group| {
        let rank = group.group_rank().0;
        let parts =
            tensors.iter().enumerate().map(|(n, (name, whole))| (name.clone(), part(n, whole, rank, world)));
        save_to(writer().as_mut(), &mut DefaultSavePlanner, &flat(&parts.collect::<Vec<_>>()), Some(&group))
            .unwrap();
    });
}

#[test]
#[ignore = "needs PyTorch: cargo xtask interop --torch PYTHON"]
fn torch_loads_our_distributed_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = tensors(true);
    let expected = expected(dir.path(), &tensors);
    for world in [1, 4] {
        let path = dir.path().join(format!("dcp-{world}"));
        on_ranks(world, &tensors, || Box::new(torch::Writer::new(&path)));
        python(&["check", "dcp", path.to_str().unwrap(), expected.to_str().unwrap()]);
        python(&["ranks", path.to_str().unwrap(), expected.to_str().unwrap()]);
    }
}

#[test]
#[ignore = "needs PyTorch: cargo xtask interop --torch PYTHON"]
fn torch_loads_our_values_and_nesting() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("values");
    let mut groups = StateDict::new();
    groups.insert("lr", 0.1);
    groups.insert("betas", vec![Value::Float(0.9), Value::Float(0.999)]);
    groups.insert("params", vec![Value::Str("a".into()), Value::Str("größer".into())]);
    let mut state = StateDict::new();
    state.insert("optim", StateDict::from_iter([("param_groups", vec![Value::Map(groups)])]));
    state.insert("step", i64::MAX);
    state.insert("none", Value::None);
    state.insert("flag", true);
    save_to(&mut torch::Writer::new(&path), &mut DefaultSavePlanner, &state, None).unwrap();
    let json = r#"{"optim.param_groups.0.lr": 0.1, "optim.param_groups.0.betas": [0.9, 0.999],
        "optim.param_groups.0.params": ["a", "größer"], "step": 9223372036854775807, "none": null, "flag": true}"#;
    std::fs::write(dir.path().join("values.json"), json).unwrap();
    python(&["values", path.to_str().unwrap(), dir.path().join("values.json").to_str().unwrap()]);
}

#[test]
#[ignore = "needs PyTorch: cargo xtask interop --torch PYTHON"]
fn torchs_hugging_face_reader_loads_format_1_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = known_to_safetensors(tensors(false));
    let expected = expected(dir.path(), &tensors);
    for world in [1, 4] {
        let path = dir.path().join(format!("sconce-{world}"));
        ranks(world, |group| {
            let rank = group.group_rank().0;
            let parts = tensors
                .iter()
                .enumerate()
                .map(|(n, (name, whole))| (name.clone(), part(n, whole, rank, world)));
            let options = SaveOptions { group: Some(&group), ..Default::default() };
            save_with(&path, &flat(&parts.collect::<Vec<_>>()), options).unwrap();
        });
        python(&["check", "hf", path.to_str().unwrap(), expected.to_str().unwrap()]);
    }
}

#[test]
#[ignore = "needs PyTorch: cargo xtask interop --torch PYTHON"]
fn safetensors_and_torchs_reader_load_consolidated_directories() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = known_to_safetensors(tensors(true));
    let expected = expected(dir.path(), &tensors);
    for (name, max) in [("one", u64::MAX), ("many", 300)] {
        let path = dir.path().join(name);
        on_ranks(4, &tensors, || Box::new(hf::Writer::with_max_shard_bytes(&path, max)));
        python(&["check", "safetensors", path.to_str().unwrap(), expected.to_str().unwrap()]);
        python(&["check", "hf", path.to_str().unwrap(), expected.to_str().unwrap()]);
    }
}

#[test]
#[ignore = "needs PyTorch: cargo xtask interop --torch PYTHON"]
fn random_states_go_through_torch_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let count = n_cases();
    let mut runner =
        TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let mut states = Vec::new();
    while states.len() < count {
        let made = entries(plain()).new_tree(&mut runner).unwrap().current();
        let made = state(&made);
        // torch itself loses dicts without entries.
        if made.is_empty() || made.flat_tensors().is_err() || text(&made).contains("{}") {
            continue;
        }
        let path = dir.path().join(format!("{:04}", states.len()));
        std::fs::create_dir(&path).unwrap();
        save_to(&mut torch::Writer::new(path.join("a")), &mut DefaultSavePlanner, &made, None).unwrap();
        states.push(made);
    }
    python(&["resave", dir.path().to_str().unwrap()]);
    for (nth, made) in states.iter().enumerate() {
        let back = open(dir.path().join(format!("{nth:04}/b"))).unwrap();
        let back = load_new_from(back.as_ref(), LoadOptions::default()).unwrap();
        // Torch's plans put values before tensors, so that the order of keys is not kept.
        assert_eq!(sorted_text(&back), sorted_text(made), "case {nth}");
    }
}

#[test]
#[ignore = "needs PyTorch: cargo xtask interop --torch PYTHON"]
fn whatever_torch_writes_loads_bit_for_bit_or_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let seed = std::env::var("SCONCE_INTEROP_SEED").unwrap_or_else(|_| "1".to_owned());
    let out = dir.path().to_str().unwrap();
    script("tests/interop_cases.py", &[out, &n_cases().to_string(), &seed]);
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    for case in &cases {
        let checkpoint = torch_cases::checkpoint_of(case);
        match std::fs::read_to_string(case.join("refused.txt")) {
            Err(_) => torch_cases::check(&checkpoint, &torch_cases::expected(case)),
            Ok(words) => {
                let loaded = load_new_from(open(&checkpoint).unwrap().as_ref(), LoadOptions::default());
                let told = loaded.map(|state| text(&state)).unwrap_err().to_string();
                assert!(words.lines().all(|word| told.contains(word)), "{}: {told}", case.display());
            }
        }
    }
    println!("{} checkpoints of torch", cases.len());
    assert!(cases.len() > 5 * n_cases());
}
