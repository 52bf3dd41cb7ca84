//! Any state, written in a format of others and read again, is the same.

#![cfg(feature = "torch")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;
#[path = "common/plain.rs"]
mod plain;

use std::path::Path;

use common::{part, ranks, whole};
use plain::{entries, plain, state, text};
use proptest::prelude::*;
use sconce_checkpoint::{
    DefaultSavePlanner, Error, Format, LoadOptions, StorageWriter, hf, load_new_from, open, save, save_to,
    torch,
};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value, chunk_range};

fn round_trip(state: &StateDict<'_>, writer: &mut dyn StorageWriter, path: &Path) -> StateDict<'static> {
    save_to(writer, &mut DefaultSavePlanner, state, None).unwrap();
    load_new_from(open(path).unwrap().as_ref(), LoadOptions::default()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_state_comes_back_unchanged_through_every_format(entries in entries(plain())) {
        let dir = tempfile::tempdir().unwrap();
        let state = state(&entries);
        // Two values of one flattened name are no state in any format.
        prop_assume!(state.flat_tensors().is_ok());
        let torch = dir.path().join("torch");
        prop_assert_eq!(text(&round_trip(&state, &mut torch::Writer::new(&torch), &torch)), text(&state));
        let many = dir.path().join("many");
        let mut writer = hf::Writer::with_max_shard_bytes(&many, 40);
        if state.flat_tensors().unwrap().is_empty() { return Ok(()); }
        prop_assert_eq!(text(&round_trip(&state, &mut writer, &many)), text(&state));
        let one = dir.path().join("one.safetensors");
        prop_assert_eq!(text(&round_trip(&state, &mut hf::Writer::new(&one), &one)), text(&state));
    }
}

/// Rows, then columns, of each rank of a world.
fn boxes(shape: &[usize], dim: usize, world: usize, rank: usize) -> Vec<TensorBox> {
    let mut bounds = TensorBox::whole(shape);
    let range = chunk_range(shape[dim], world, rank);
    (bounds.offsets[dim], bounds.sizes[dim]) = (range.start, range.len());
    vec![bounds]
}

#[test]
fn ranks_write_their_parts_of_one_checkpoint_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let shape = [7, 5];
    for world in 1..=4 {
        for (nth, name) in ["torch", "many", "one.safetensors"].into_iter().enumerate() {
            let path = dir.path().join(format!("{world}-{name}"));
            ranks(world, |group| {
                let rank = group.group_rank().0;
                let mut state = StateDict::new();
                state.insert_tensor("rows", part(&shape, &boxes(&shape, 0, world, rank), true));
                state.insert_tensor("columns", part(&shape, &boxes(&shape, 1, world, rank), true));
                state.insert("step", 3i64);
                let mut writers: [Box<dyn StorageWriter>; 3] = [
                    Box::new(torch::Writer::new(&path)),
                    Box::new(hf::Writer::with_max_shard_bytes(&path, 100)),
                    Box::new(hf::Writer::new(&path)),
                ];
                save_to(writers[nth].as_mut(), &mut DefaultSavePlanner, &state, Some(&group)).unwrap();
            });
            let state = load_new_from(open(&path).unwrap().as_ref(), LoadOptions::default()).unwrap();
            let bytes: Vec<u8> = whole(&shape).iter().flat_map(|v| v.to_le_bytes()).collect();
            for tensor in ["rows", "columns"] {
                assert_eq!(state.tensor::<TensorBuf>(tensor).unwrap().bytes(), bytes, "{}", path.display());
            }
            assert_eq!(state.get("step").and_then(Value::as_int), Some(3));
        }
    }
}

#[test]
fn our_own_directories_are_safetensors_directories_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = StateDict::new();
    state.insert_tensor("w", TensorBuf::new(DType::I16, &[2, 2], vec![1, 0, 2, 0, 3, 0, 4, 0]).unwrap());
    save(dir.path().join("a"), &state).unwrap();
    assert_eq!(Format::of(&dir.path().join("a")).unwrap(), Format::Sconce);
    let loaded = load_new_from(&hf::Reader::new(dir.path().join("a")), LoadOptions::default()).unwrap();
    assert_eq!(text(&loaded), text(&state));
}

#[test]
fn nothing_is_written_over_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("one.safetensors"), b"mine").unwrap();
    let mut state = StateDict::new();
    state.insert("x", 1i64);
    let refused = save_to(
        &mut hf::Writer::new(dir.path().join("one.safetensors")),
        &mut DefaultSavePlanner,
        &state,
        None,
    );
    assert!(matches!(refused, Err(Error::AlreadyExists { .. })));
    assert_eq!(std::fs::read(dir.path().join("one.safetensors")).unwrap(), b"mine");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}
