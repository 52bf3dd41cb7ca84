//! Tensor parallelism: a two-layer perceptron whose first layer is split by columns and second by rows, trained beside the
//! same model in one piece, with which it must agree.
//!
//! ```text
//! x [n, d]  ──matmul──▶  [n, 4d] by columns  ──gelu──▶  the same  ──matmul──▶  pending sum ──▶  y [n, d]
//!  whole    w1 S(1)        no communication                       w2 S(0)        one all_reduce
//! ```
//!
//! `cargo run --release -p sconce-dtensor --example tensor_parallel`

#![allow(clippy::print_stdout, reason = "an example talks to the person who started it")]

use candle_core::{Tensor, Var};
use sconce_dtensor::{DTensor, DType, Placement};
use sconce_mesh::{DeviceMesh, DeviceType, GroupOptions, ProcessGroup};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const RANKS: usize = 4;
const BATCH: usize = 16;
const WIDTH: usize = 32;
const STEPS: usize = 20;
const RATE: f64 = 0.05;

const WHOLE: [Placement; 1] = [Placement::Replicate];
const COLUMNS: [Placement; 1] = [Placement::Shard(-1)];
const ROWS: [Placement; 1] = [Placement::Shard(0)];

/// One rank's shards of the weights.
struct Mlp {
    w1: Var,
    w2: Var,
}

impl Mlp {
    /// The same weights for every mesh: they follow from the seeds.
    fn new(mesh: &DeviceMesh) -> Result<Self> {
        let std = 1.0 / (WIDTH as f64).sqrt();
        let weight = |seed, shape: [usize; 2], placements: &[Placement]| -> Result<Var> {
            let weight = DTensor::randn((0.0, std), seed, &shape, DType::F32, mesh, placements)?;
            Ok(Var::from_tensor(weight.to_local())?)
        };
        let w1 = weight(1, [WIDTH, 4 * WIDTH], &COLUMNS)?;
        Ok(Self { w1, w2: weight(2, [4 * WIDTH, WIDTH], &ROWS)? })
    }

    fn forward(&self, x: &DTensor) -> Result<DTensor> {
        let mesh = x.device_mesh();
        let w1 = DTensor::from_local_with_shape(&self.w1, mesh, &COLUMNS, &[WIDTH, 4 * WIDTH])?;
        let w2 = DTensor::from_local_with_shape(&self.w2, mesh, &ROWS, &[4 * WIDTH, WIDTH])?;
        Ok(x.matmul(&w1)?.gelu()?.matmul(&w2)?.redistribute(&WHOLE)?)
    }

    /// One step of gradient descent towards `target`; the loss before it.
    fn step(&self, x: &DTensor, target: &Tensor) -> Result<f32> {
        let y = self.forward(x)?;
        let loss = (y.to_local() - target)?.sqr()?.mean_all()?;
        let grads = loss.backward()?;
        for weight in [&self.w1, &self.w2] {
            if let Some(grad) = grads.get(weight) {
                weight.set(&(weight.as_tensor() - (grad * RATE)?)?)?;
            }
        }
        Ok(loss.to_scalar()?)
    }
}

/// Trains on all ranks of `world` and returns the losses.
fn train(world: &ProcessGroup) -> Result<Vec<f32>> {
    let mesh = DeviceMesh::new(world, DeviceType::Cpu, &[world.size()], &["tp"])?;
    let model = Mlp::new(&mesh)?;
    let x = DTensor::randn((0.0, 1.0), 3, &[BATCH, WIDTH], DType::F32, &mesh, &WHOLE)?;
    let target = DTensor::randn((0.0, 1.0), 4, &[BATCH, WIDTH], DType::F32, &mesh, &WHOLE)?;
    if world.rank().0 == 0 && world.size() > 1 {
        let hidden = DTensor::zeros(&[BATCH, 4 * WIDTH], DType::F32, &mesh, &COLUMNS)?;
        println!("the hidden layer: {hidden}");
    }
    (0..STEPS).map(|_| model.step(&x, target.to_local())).collect()
}

fn main() -> Result<()> {
    let expected = train(&ProcessGroup::single())?;
    let ranks = ProcessGroup::threads(RANKS, GroupOptions::default())?;
    let losses = std::thread::scope(|scope| {
        let ranks: Vec<_> = ranks.into_iter().map(|world| scope.spawn(move || train(&world))).collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
            .collect::<Vec<_>>()
    });
    for (rank, losses) in losses.into_iter().enumerate() {
        let losses = losses?;
        let worst = losses.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!(
            "rank {rank}: loss {:.6} -> {:.6}, off by {worst:.1e} at most",
            losses[0],
            losses[STEPS - 1]
        );
        if worst > 1e-5 || losses[STEPS - 1] >= losses[0] {
            return Err(
                format!("rank {rank} does not agree with one process: {losses:?}, {expected:?}").into()
            );
        }
    }
    Ok(())
}
