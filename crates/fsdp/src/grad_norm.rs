//! The norm of all gradients together, and clipping by it.

use sconce_mesh::ReduceOp;

use crate::{Fsdp, Result};

/// torch adds it to the norm, so that nothing is divided by zero.
const CLIP_EPS: f64 = 1e-6;

impl Fsdp {
    /// The p-norm of the whole model's reduced gradient, as one long vector; `f64::INFINITY` for its largest magnitude.
    ///
    /// It is the same on every rank, bit for bit; NaN if any gradient is NaN, also for the infinite norm.
    /// Ranks: collective over the shard group, after backward and before the optimizer's step.
    ///
    /// # Errors
    /// A failed collective.
    pub fn grad_norm(&self, p: f64) -> Result<f64> {
        let of_units = self.units.iter().filter_map(|unit| unit.with_gradient(|g| partial(g, p)));
        let (mut all, op) = if p.is_infinite() {
            (
                of_units.fold([0.0, 0.0], |[max, nan], part| [part.max(max), marks_nan(part).max(nan)]),
                ReduceOp::Max,
            )
        } else {
            ([of_units.sum(), 0.0], ReduceOp::Sum)
        };
        self.groups.shard.all_reduce(&mut all, op)?;
        let [norm, nan] = all;
        Ok(match p.is_infinite() {
            true if nan > 0.0 => f64::NAN,
            true => norm,
            false => norm.powf(1.0 / p),
        })
    }

    /// Scales all gradients so that their p-norm is at most `max_norm`, and returns the norm that it was.
    ///
    /// Ranks: collective over the shard group, after backward and before the optimizer's step.
    ///
    /// # Errors
    /// A failed collective.
    ///
    /// # Source
    /// `FullyShardedDataParallel.clip_grad_norm_`.
    pub fn clip_grad_norm(&self, max_norm: f64, p: f64) -> Result<f64> {
        let norm = self.grad_norm(p)?;
        let factor = max_norm / (norm + CLIP_EPS);
        // A NaN goes through, as in torch: the step that follows shall not look healthy.
        if factor < 1.0 || factor.is_nan() {
            self.scale_gradients(factor as f32);
        }
        Ok(norm)
    }

    /// Multiplies all reduced gradients.
    pub(crate) fn scale_gradients(&self, factor: f32) {
        for unit in &self.units {
            unit.with_gradient(|gradient| gradient.iter_mut().for_each(|g| *g *= factor));
        }
    }
}

/// Σ |g|^p, or the maximum of |g| for an infinite p, with a NaN for a NaN.
fn partial(gradient: &[f32], p: f64) -> f64 {
    let magnitudes = gradient.iter().map(|g| f64::from(g.abs()));
    if p.is_infinite() {
        magnitudes.fold(0.0, |max, g| if g > max || g.is_nan() { g } else { max })
    } else if p == 2.0 {
        magnitudes.map(|g| g * g).sum()
    } else {
        magnitudes.map(|g| g.powf(p)).sum()
    }
}

fn marks_nan(value: f64) -> f64 {
    f64::from(u8::from(value.is_nan()))
}
