//! What PyTorch wrote, loaded bit for bit under other layouts.

#![cfg(feature = "torch")]
#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

mod common;
#[path = "common/torch_cases.rs"]
mod torch_cases;

use std::path::{Path, PathBuf};

use sconce_checkpoint::{LoadOptions, load_new_from, open};
use sconce_dtensor::{Fqn, Value};
use torch_cases::{check, checkpoint_of, expected};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/torch")
}

fn cases(folder: &str) -> Vec<PathBuf> {
    let dirs = std::fs::read_dir(fixtures().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut dirs: Vec<PathBuf> = dirs.filter(|path| path.is_dir()).collect();
    dirs.sort();
    dirs
}

#[test]
fn directories_of_torch_load_bit_for_bit_at_worlds_1_to_4() {
    let dirs = cases("dcp");
    assert_eq!(dirs.len(), 3);
    dirs.iter().for_each(|dir| check(&dir.join("checkpoint"), &expected(dir)));
}

#[test]
fn whatever_torch_writes_loads_bit_for_bit_at_worlds_1_to_4() {
    let dirs = cases("interop");
    assert!(dirs.len() >= 16, "{dirs:?}");
    for dir in dirs {
        check(&checkpoint_of(&dir), &expected(&dir));
    }
}

#[test]
fn lists_and_dicts_come_back_as_such() {
    let reader = open(fixtures().join("interop/nested/checkpoint")).unwrap();
    let state = load_new_from(reader.as_ref(), LoadOptions::default()).unwrap();
    assert!(matches!(state.get("list"), Some(Value::List(items)) if items.len() == 3));
    assert!(matches!(state.get("empty_list"), Some(Value::List(items)) if items.is_empty()));
    assert!(matches!(state.get("tensors_in_tuple"), Some(Value::List(items)) if items.len() == 2));
    assert!(state.map("model").is_some_and(|model| model.get("layer.weight").is_some()));
    assert!(state.flat_tensors().unwrap().contains_key(&Fqn("model.deep.er.est".to_owned())));
}
