//! Reads a checkpoint that `torch.distributed.checkpoint.save` wrote, without Python.
//!
//! `cargo run --release -p sconce-checkpoint --features torch --example load_torch -- DIRECTORY`

#![allow(clippy::print_stdout, reason = "an example talks to the person who started it")]

use candle_core::Tensor;
use sconce_checkpoint::{LoadOptions, StorageReader as _, TensorBuf, load_new_from, torch};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: load_torch DIRECTORY")?;
    let reader = torch::Reader::new(path);
    // What there is, from the metadata alone.
    for tensor in &reader.read_metadata()?.tensors {
        println!("{:<40} {:?} {:?}", tensor.fqn, tensor.dtype, tensor.shape);
    }
    // Everything, each tensor whole, whatever ranks wrote it. To read a shard of a sharded model instead, give
    // `load_from` the state that `Fsdp::state_dict` or DTensors make.
    let state = load_new_from(&reader, LoadOptions::default())?;
    let (mut n_tensors, mut n_bytes) = (0, 0);
    for (fqn, tensor) in state.flat_tensors()? {
        let buffer = tensor.as_any().and_then(|tensor| tensor.downcast_ref::<TensorBuf>());
        let tensor = Tensor::try_from(buffer.ok_or("not loaded into memory of its own")?)?;
        n_tensors += 1;
        n_bytes += tensor.elem_count() * tensor.dtype().size_in_bytes();
        println!("{fqn}: {:?} {:?}", tensor.dtype(), tensor.dims());
    }
    println!("{n_tensors} tensors, {n_bytes} bytes");
    Ok(())
}
