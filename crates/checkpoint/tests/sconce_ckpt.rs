//! The program `sconce-ckpt`, run as people run it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::path::Path;
use std::process::{Command, Output};

use sconce_checkpoint::{Format, LoadOptions, load_new_from, open, save};
use sconce_dtensor::{DType, StateDict, TensorBuf, Value};

fn ckpt(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sconce-ckpt")).args(arguments).current_dir(dir).output().unwrap()
}

#[track_caller]
fn ok(dir: &Path, arguments: &[&str]) -> String {
    ends(dir, arguments, 0)
}

#[track_caller]
fn ends(dir: &Path, arguments: &[&str], code: i32) -> String {
    let output = ckpt(dir, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{text}\n{errors}");
    format!("{text}{errors}")
}

fn f32s(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

/// A state of 3 MiB, an optimizer's nesting, and values.
fn state(seed: f32) -> StateDict<'static> {
    let mut model = StateDict::new();
    let weight = f32s((0..640 * 1000).map(|i| (i as f32).sin() + seed));
    model.insert_tensor("net.weight", TensorBuf::new(DType::F32, &[640, 1000], weight).unwrap());
    model
        .insert_tensor("net.bias", TensorBuf::new(DType::F32, &[5], f32s((0..5).map(|i| i as f32))).unwrap());
    model.insert_tensor("empty", TensorBuf::new(DType::U8, &[0, 3], vec![]).unwrap());
    model.insert_tensor("scalar", TensorBuf::new(DType::F64, &[], vec![0; 8]).unwrap());
    let mut state = StateDict::new();
    state.insert("model", model);
    state.insert("step", 7i64);
    state.insert("betas", vec![Value::Float(0.9), Value::Float(0.999)]);
    state
}

fn contents(path: &Path) -> Vec<(String, Vec<u8>)> {
    let state = load_new_from(open(path).unwrap().as_ref(), LoadOptions::default()).unwrap();
    let bytes = |tensor: &dyn sconce_dtensor::LocalTensor| {
        let mut all = vec![];
        tensor.read_box(0, &mut |b| all.extend_from_slice(b)).unwrap();
        all
    };
    state.flat_tensors().unwrap().into_iter().map(|(name, tensor)| (name.0, bytes(tensor))).collect()
}

#[test]
fn every_conversion_keeps_every_bit_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    save(at("a"), &state(0.0)).unwrap();
    ok(dir.path(), &["convert", "a", "torch", "--to", "torch"]);
    ok(dir.path(), &["reshard", "torch", "torch3", "--world", "3"]);
    ok(dir.path(), &["convert", "torch3", "hf", "--to", "safetensors", "--max-shard-bytes", "1000000"]);
    ok(dir.path(), &["convert", "hf", "one.safetensors", "--to", "safetensors"]);
    ok(dir.path(), &["convert", "one.safetensors", "back", "--to", "sconce"]);
    ok(dir.path(), &["reshard", "back", "back5", "-n", "5"]);
    assert_eq!(Format::of(&at("torch3")).unwrap(), Format::TorchDcp);
    assert!(at("torch3/__2_0.distcp").exists() && at("hf/model.safetensors.index.json").exists());
    assert!(at("back5/shard-00005-model-00001-of-00001.safetensors").exists());
    for name in ["torch", "torch3", "hf", "one.safetensors", "back", "back5"] {
        assert_eq!(contents(&at(name)), contents(&at("a")), "{name}");
        let told = ok(dir.path(), &["diff", "a", name]);
        assert!(told.contains("4 tensors are equal, 0 names differ"), "{name}: {told}");
        ok(dir.path(), &["verify", name]);
    }
}

#[test]
fn verify_names_the_damaged_block_and_its_tensors() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path().join("a"), &state(0.0)).unwrap();
    ok(dir.path(), &["convert", "a", "torch", "--to", "torch"]);
    for (path, file) in
        [("a", "a/shard-00001-model-00001-of-00001.safetensors"), ("torch", "torch/__0_0.distcp")]
    {
        assert!(ok(dir.path(), &["verify", path]).contains("whole"));
        let mut bytes = std::fs::read(dir.path().join(file)).unwrap();
        bytes[1_500_000] ^= 4;
        std::fs::write(dir.path().join(file), bytes).unwrap();
        let told = ends(dir.path(), &["verify", path], 1);
        assert!(told.contains("DAMAGED in 1 place") && told.contains("model.net.weight"), "{told}");
        let json = ends(dir.path(), &["--json", "verify", path], 1);
        let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
        assert_eq!(first["fqns"], serde_json::json!(["model.net.weight"]));
    }
    std::fs::remove_file(dir.path().join("a/shard-00001-model-00001-of-00001.safetensors")).unwrap();
    assert!(ends(dir.path(), &["verify", "a"], 1).contains("model.net.bias"));
}

#[test]
fn diff_tells_names_shapes_and_the_first_element_that_differs() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path().join("a"), &state(0.0)).unwrap();
    let mut other = state(0.0);
    let model = other.map_mut("model").unwrap();
    let mut weight = f32s((0..640 * 1000).map(|i| (i as f32).sin()));
    weight[4 * 602_003..][..4].copy_from_slice(&100f32.to_le_bytes());
    model.insert_tensor("net.weight", TensorBuf::new(DType::F32, &[640, 1000], weight).unwrap());
    model
        .insert_tensor("net.bias", TensorBuf::new(DType::F32, &[4], f32s((0..4).map(|i| i as f32))).unwrap());
    model.remove("scalar");
    other.insert("step", 8i64);
    save(dir.path().join("b"), &other).unwrap();
    let told = ends(dir.path(), &["diff", "a", "b"], 1);
    for expected in ["1 of 640000 differ", "[602, 3]", "shape [5] and [4]", "only in the first", "7 and 8"] {
        assert!(told.contains(expected), "{expected}: {told}");
    }
    assert!(ends(dir.path(), &["diff", "--structure", "a", "b"], 1).contains("shape [5] and [4]"));
}

#[test]
fn inspect_cat_and_plot_show_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path().join("a"), &state(0.0)).unwrap();
    ok(dir.path(), &["reshard", "a", "b", "-n", "3"]);
    let told = ok(dir.path(), &["inspect", "b"]);
    assert!(
        told.contains("model.net.weight") && told.contains("[640, 1000]") && told.contains("step"),
        "{told}"
    );
    assert!(!ok(dir.path(), &["inspect", "b", "--filter", "net*bias"]).contains("weight"));
    assert!(ok(dir.path(), &["inspect", "b", "--tree"]).contains("net.weight  f32 [640, 1000]"));
    assert!(ok(dir.path(), &["inspect", "b", "--chunks"]).contains("shard-00003"));
    let lines = ok(dir.path(), &["--json", "inspect", "b"]);
    let first: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(first["tensors"], 4);
    let told = ok(dir.path(), &["cat", "b", "model.net.bias"]);
    assert!(
        told.contains("min 0  max 4  mean 2  std 1.414214") && told.contains(" 3            4\n"),
        "{told}"
    );
    assert!(ok(dir.path(), &["cat", "b", "betas.1"]).contains("0.999"));
    ends(dir.path(), &["cat", "b", "nothing"], 3);
    ok(dir.path(), &["plot", "b", "-o", "page.html"]);
    let page = std::fs::read_to_string(dir.path().join("page.html")).unwrap();
    assert!(page.contains("<rect") && !page.contains("<script") && !page.contains("http"));
    assert!(ok(dir.path(), &["completions", "bash"]).contains("sconce-ckpt"));
    assert!(ok(dir.path(), &["man"]).contains(".TH sconce-ckpt"));
}

#[test]
fn prune_keeps_what_was_asked_and_watch_reports_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = StateDict::new();
    small.insert("x", 1i64);
    for step in 1..=6 {
        save(dir.path().join(format!("step-{step:03}")), &small).unwrap();
    }
    std::fs::create_dir(dir.path().join("mine-1")).unwrap();
    assert!(
        ok(dir.path(), &["prune", ".", "--keep-last", "2", "--keep-every", "3", "--dry-run"])
            .contains("would be removed")
    );
    ok(dir.path(), &["prune", ".", "--keep-last", "2", "--keep-every", "3"]);
    let mut left: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["mine-1", "step-003", "step-005", "step-006"]);
    let told = ok(dir.path(), &["watch", ".", "--count", "3", "--verify", "--interval", "0.01"]);
    assert!(told.contains("step-006") && told.contains("whole"), "{told}");
}

#[test]
fn prune_goes_on_past_a_checkpoint_that_holds_other_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = StateDict::new();
    small.insert("x", 1i64);
    for step in 1..=4 {
        save(dir.path().join(format!("step-{step}")), &small).unwrap();
    }
    std::fs::write(dir.path().join("step-1/notes.txt"), "mine").unwrap();
    let told = ends(dir.path(), &["prune", ".", "--keep-last", "1"], 3);
    assert!(told.contains("step-1  could not be removed") && told.contains("not a checkpoint's"), "{told}");
    let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["step-1", "step-4"]);
}

#[test]
fn names_of_files_may_be_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let name = std::ffi::OsStr::from_bytes(b"step-\xff-1");
    save(dir.path().join(name), &state(0.0)).unwrap();
    let run = |arguments: &[&str], target: &[u8]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sconce-ckpt"));
        command.args(arguments).arg(name).current_dir(dir.path());
        if !target.is_empty() {
            command.arg(std::ffi::OsStr::from_bytes(target));
        }
        let output = command.output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{arguments:?} {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    for json in [&["--json"][..], &[]] {
        run(&[json, &["inspect"]].concat(), b"");
        run(&[json, &["verify"]].concat(), b"");
        run(&[json, &["plot", "-o", "page.html"]].concat(), b"");
    }
    run(&["--json", "convert", "--to", "torch"], b"to-\xff");
    run(&["--json", "reshard", "-n", "2"], b"two-\xff");
    ok(dir.path(), &["--json", "watch", ".", "--count", "1"]);
    ok(dir.path(), &["--json", "prune", ".", "--keep-last", "1"]);
}

#[test]
fn diff_and_cat_are_exact() {
    let dir = tempfile::tempdir().unwrap();
    let save_one = |name: &str, dtype: DType, bytes: Vec<u8>| {
        let mut state = StateDict::new();
        let shape = [bytes.len() / dtype.size_bytes()];
        state.insert_tensor("t", TensorBuf::new(dtype, &shape, bytes).unwrap());
        save(dir.path().join(name), &state).unwrap();
    };
    let i64s = |values: [i64; 2]| values.into_iter().flat_map(i64::to_le_bytes).collect::<Vec<_>>();
    save_one("a", DType::I64, i64s([1, 1 << 53]));
    save_one("b", DType::I64, i64s([1, (1 << 53) + 1]));
    let told = ends(dir.path(), &["diff", "a", "b", "--tolerance", "0.5"], 1);
    assert!(told.contains("at most by 1e0; first at [1]: 9007199254740992 and 9007199254740993"), "{told}");
    ok(dir.path(), &["diff", "a", "b", "--tolerance", "1"]);
    assert!(ok(dir.path(), &["cat", "b", "t"]).contains("9007199254740993"));
    // Numbers of one magnitude, in other directions.
    save_one("c", DType::C64, f32s([0.0, 1.0, 0.6, 0.8].into_iter()));
    save_one("d", DType::C64, f32s([0.0, 1.0, 0.8, 0.6].into_iter()));
    let told = ends(dir.path(), &["diff", "c", "d", "--tolerance", "1e-6"], 1);
    assert!(told.contains("first at [1]: 0.6000000238418579+0.800000011920929j"), "{told}");
    assert!(ok(dir.path(), &["--json", "cat", "c", "t"]).contains(r#""values":[[0.0,1.0],["#));
}

#[test]
fn damaged_safetensors_and_archives_of_torch_are_damage() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    save(at("a"), &state(0.0)).unwrap();
    ok(dir.path(), &["convert", "a", "hf", "--to", "safetensors", "--max-shard-bytes", "1000"]);
    let name = "model-00002-of-00003.safetensors";
    let bytes = std::fs::read(at("hf").join(name)).unwrap();
    std::fs::write(at("hf").join(name), &bytes[..bytes.len() / 2]).unwrap();
    let told = ends(dir.path(), &["verify", "hf"], 1);
    assert!(told.contains(name) && told.contains("in model.net.weight"), "{told}");
    std::fs::remove_file(at("hf").join(name)).unwrap();
    assert!(ends(dir.path(), &["verify", "hf"], 1).contains(name));

    let fixture = "../testkit/fixtures/torch/interop/pt_module/checkpoint.pt";
    let mut bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture)).unwrap();
    std::fs::write(at("whole.pt"), &bytes).unwrap();
    assert!(ok(dir.path(), &["verify", "whole.pt"]).contains("whole.pt: whole"));
    bytes[1220] ^= 1;
    std::fs::write(at("flipped.pt"), &bytes).unwrap();
    let told = ends(dir.path(), &["verify", "flipped.pt"], 1);
    assert!(told.contains("record checkpoint/data/0") && told.contains("in 0.weight"), "{told}");
    std::fs::write(at("cut.pt"), &bytes[..bytes.len() - 30]).unwrap();
    ends(dir.path(), &["verify", "cut.pt"], 1);
}

#[test]
fn output_that_nobody_can_take_is_told_and_a_reader_that_left_is_not() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path().join("a"), &state(0.0)).unwrap();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let program = || Command::new(env!("CARGO_BIN_EXE_sconce-ckpt"));
    let mut inspect = program();
    inspect.args(["inspect", "a"]).current_dir(dir.path()).stdout(full);
    let output = inspect.output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("standard output"));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut inspect = program();
    inspect.args(["inspect", "a"]).current_dir(dir.path()).stdout(writer);
    let output = inspect.output().unwrap();
    assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]));
}

#[test]
fn programs_are_told_all_and_people_how_much_more_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let many = StateDict::from_iter((0..150).map(|n| (format!("v{n}"), Value::Int(n))));
    save(dir.path().join("a"), &many).unwrap();
    assert_eq!(ok(dir.path(), &["--json", "inspect", "a"]).lines().count(), 151);
    assert!(ok(dir.path(), &["inspect", "a"]).contains("… and 50 more values"));
    assert_eq!(ok(dir.path(), &["--json", "inspect", "a", "--limit", "3"]).lines().count(), 4);
}

#[test]
fn what_is_no_checkpoint_ends_with_3_and_nothing_is_left_of_a_failed_conversion() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    assert!(ends(dir.path(), &["inspect", "empty"], 3).contains("not a checkpoint"));
    assert!(ends(dir.path(), &["verify", "nowhere"], 3).contains("no such checkpoint"));
    ends(dir.path(), &["convert", "empty"], 2);
    save(dir.path().join("a"), &state(0.0)).unwrap();
    let file = dir.path().join("a/shard-00001-model-00001-of-00001.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[1_500_000] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    for to in ["sconce", "torch", "safetensors"] {
        assert!(ends(dir.path(), &["convert", "a", "b", "--to", to], 3).contains("damaged"));
    }
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 2, "what was written of a failed conversion is gone");
}
