//! Checkpoints of raw bytes, without any tensor library: for burn, ndarray, or a program that calls C.
//!
//! `cargo run --release -p sconce-checkpoint --no-default-features --example raw_bytes`

#![allow(clippy::print_stdout, reason = "an example talks to the person who started it")]

use sconce_checkpoint::{DType, StateDict, TensorView, TensorViewMut, Value, load, read_metadata, save};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::temp_dir().join(format!("sconce-raw-bytes-{}", std::process::id()));
    let path = dir.join("step-7");

    let weights: Vec<f32> = (0..12).map(|i| i as f32 / 7.0).collect();
    let bytes: Vec<u8> = weights.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut state = StateDict::new();
    state.insert_tensor("w", TensorView::new(DType::F32, &[3, 4], &bytes)?);
    state.insert("step", 7i64);
    let report = save(&path, &state)?;
    println!("saved {} bytes in {} file", report.data_bytes, report.n_files);

    for tensor in &read_metadata(&path)?.tensors {
        println!("{} {:?} {:?}", tensor.fqn, tensor.dtype, tensor.shape);
    }

    let mut loaded = vec![0u8; bytes.len()];
    let mut state = StateDict::new();
    state.insert_tensor("w", TensorViewMut::new(DType::F32, &[3, 4], &mut loaded)?);
    state.insert("step", 0i64);
    load(&path, &mut state)?;
    let step = state.get("step").and_then(Value::as_int);
    drop(state);
    std::fs::remove_dir_all(&dir)?;
    if loaded == bytes && step == Some(7) {
        println!("the same bytes, and step 7");
        return Ok(());
    }
    Err("what was loaded is not what was saved".into())
}
