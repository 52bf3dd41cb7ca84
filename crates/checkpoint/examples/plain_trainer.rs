//! A trainer that takes nothing of Sconce but its checkpoints: plain candle, one process. It trains, saves on the way,
//! begins anew from a checkpoint and must end with the same weights.
//!
//! `cargo run --release -p sconce-checkpoint --example plain_trainer`

#![allow(clippy::print_stdout, reason = "an example talks to the person who started it")]

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use sconce_checkpoint::{StateDict, Value, load, save};

/// y = x w + b by gradient descent.
struct Trainer {
    w: Var,
    b: Var,
    step: i64,
}

impl Trainer {
    fn new(seed: f64) -> Result<Self> {
        let w = Var::from_tensor(&(Tensor::ones((8, 1), DType::F32, &Device::Cpu)? * seed)?)?;
        let b = Var::zeros((1,), DType::F32, &Device::Cpu)?;
        Ok(Self { w, b, step: 0 })
    }

    fn train(&mut self, steps: usize) -> Result<f32> {
        let mut last = 0.0;
        for _ in 0..steps {
            let (x, y) = batch(self.step)?;
            let loss = x.matmul(&self.w)?.broadcast_add(&self.b)?.sub(&y)?.sqr()?.mean_all()?;
            let gradients = loss.backward()?;
            for var in [&self.w, &self.b] {
                if let Some(gradient) = gradients.get(var) {
                    var.set(&(var.as_tensor() - (gradient * 0.05)?)?)?;
                }
            }
            self.step += 1;
            last = loss.to_scalar()?;
        }
        Ok(last)
    }

    /// What a checkpoint keeps. The tensors share their memory with the variables: a load writes into them.
    fn state(&self) -> std::result::Result<StateDict<'static>, Box<dyn std::error::Error>> {
        let mut state = StateDict::new();
        state.insert("w", Value::try_from(self.w.as_tensor())?);
        state.insert("b", Value::try_from(self.b.as_tensor())?);
        state.insert("step", self.step);
        Ok(state)
    }

    fn load(&mut self, path: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let mut state = self.state()?;
        load(path, &mut state)?;
        self.step = state.get("step").and_then(Value::as_int).ok_or("the checkpoint has no step")?;
        Ok(())
    }

    fn weights(&self) -> Result<Vec<f32>> {
        self.w.flatten_all()?.to_vec1()
    }
}

/// The same numbers for the same step, in every run.
fn batch(step: i64) -> Result<(Tensor, Tensor)> {
    let values: Vec<f32> = (0..32 * 8).map(|i| ((i * 37 + step * 11) % 101) as f32 / 50.0 - 1.0).collect();
    let x = Tensor::from_vec(values, (32, 8), &Device::Cpu)?;
    let y = (x.sum_keepdim(1)? + 0.5)?;
    Ok((x, y))
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::temp_dir().join(format!("sconce-plain-trainer-{}", std::process::id()));
    let path = dir.join("step-40");
    let mut trainer = Trainer::new(0.1)?;
    println!("loss after 40 steps  {:.6}", trainer.train(40)?);
    save(&path, &trainer.state()?)?;
    println!("loss after 80 steps  {:.6}", trainer.train(40)?);

    let mut again = Trainer::new(-3.0)?;
    again.load(&path)?;
    println!("from the checkpoint  {:.6}  (step {})", again.train(40)?, again.step);
    std::fs::remove_dir_all(&dir)?;
    if again.weights()? == trainer.weights()? && again.step == trainer.step {
        println!("the same weights, to the last bit");
        return Ok(());
    }
    Err("the run from the checkpoint ended elsewhere".into())
}
