//! A program for any launcher: each rank adds its number to everyone's sum and says what came out.
//!
//! ```sh
//! cargo build -p sconce-mesh --features launcher --example ranks --bin sconce-run
//! target/debug/sconce-run --nproc-per-node 4 target/debug/examples/ranks
//! mpirun -n 4 target/debug/examples/ranks
//! for rank in 0 1; do RANK=$rank WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 target/debug/examples/ranks & done; wait
//! ```

#![allow(clippy::print_stdout, reason = "an example talks to its user")]

use sconce_mesh::{GroupOptions, ProcessGroup, ReduceOp, Result};

fn main() -> Result<()> {
    let world = ProcessGroup::from_env(GroupOptions::default())?;
    let mut sum = [world.rank().0 as u32];
    world.all_reduce(&mut sum, ReduceOp::Sum)?;
    let expected = (0..world.size() as u32).sum::<u32>();
    println!("rank {} of {}: sum {}", world.rank(), world.size(), sum[0]);
    assert_eq!(sum, [expected]);
    Ok(())
}
