//! GradScaler: a loss scale for f16, in which small gradients would vanish, that adapts itself.

use candle_core::Tensor;
use sconce_dtensor::{StateDict, Value};
use sconce_mesh::ReduceOp;

use crate::optim::number;
use crate::{Error, Fsdp, Optimizer, Result};

/// torch's names for the scale and for the good steps in a row.
const SCALE: &str = "scale";
const TRACKER: &str = "_growth_tracker";

/// How a [`GradScaler`] adapts.
///
/// # Source
/// Parameters and defaults of `torch.amp.GradScaler`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradScalerConfig {
    /// The first scale.
    pub init_scale: f64,
    /// What the scale is multiplied by after `growth_interval` good steps.
    pub growth_factor: f64,
    /// What the scale is multiplied by when a gradient is infinite or NaN.
    pub backoff_factor: f64,
    /// Good steps in a row before the scale grows.
    pub growth_interval: u32,
}

impl Default for GradScalerConfig {
    fn default() -> Self {
        Self { init_scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }
}

/// Scales the loss, unscales the gradients, and leaves out steps whose gradients are not finite.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::Module;
/// # use sconce_fsdp::{Adam, AdamConfig, FsdpBuilder, FsdpConfig, GradScaler, GradScalerConfig, MixedPrecision};
/// # use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
/// # let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &[])?;
/// let mixed_precision = MixedPrecision { param_dtype: DType::F16, ..MixedPrecision::default() };
/// let builder = FsdpBuilder::new(&mesh, FsdpConfig { mixed_precision, ..FsdpConfig::default() })?;
/// let model = candle_nn::linear(3, 2, builder.var_builder())?;
/// let fsdp = builder.build()?;
/// let mut optim = Adam::new(&fsdp, AdamConfig::default())?;
/// let mut scaler = GradScaler::new(GradScalerConfig::default());
///
/// let x = Tensor::ones((4, 3), DType::F16, &Device::Cpu)?;
/// let loss = fsdp.forward(&[&x], || model.forward(&x)?.to_dtype(DType::F32)?.mean_all())?;
/// fsdp.backward(&scaler.scale(&loss)?)?;
/// scaler.unscale(&fsdp)?;
/// fsdp.clip_grad_norm(1.0, 2.0)?;
/// let stepped = scaler.step(&mut optim, &fsdp)?;
/// # assert!(stepped || scaler.loss_scale() < 65536.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Source
/// `torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler`.
#[derive(Debug, Clone)]
pub struct GradScaler {
    config: GradScalerConfig,
    scale: f64,
    good_steps: u32,
    /// What `unscale` found, if it ran since the last step.
    finite: Option<bool>,
}

impl GradScaler {
    /// A scaler at its first scale.
    pub fn new(config: GradScalerConfig) -> Self {
        Self { config, scale: config.init_scale, good_steps: 0, finite: None }
    }

    /// The loss to run backward from.
    ///
    /// # Errors
    /// candle's, if the loss is no float.
    pub fn scale(&self, loss: &Tensor) -> candle_core::Result<Tensor> {
        loss.affine(self.scale, 0.0)
    }

    /// Divides the reduced gradients by the scale and finds out whether those of all ranks are finite.
    ///
    /// Ranks: collective over the mesh, after the last backward of a step and before anything that looks at gradients, such
    /// as [`Fsdp::clip_grad_norm`]. A second call before the step finds nothing left to do.
    ///
    /// # Errors
    /// A failed collective.
    pub fn unscale(&mut self, fsdp: &Fsdp) -> Result<()> {
        if self.finite.is_some() {
            return Ok(());
        }
        fsdp.scale_gradients((1.0 / self.scale) as f32);
        let finite = |gradient: &mut [f32]| gradient.iter().all(|g| g.is_finite());
        let here = fsdp.units.iter().all(|unit| unit.with_gradient(finite).unwrap_or(true));
        let mut anywhere_not = [u8::from(!here)];
        fsdp.groups.mesh.all_reduce(&mut anywhere_not, ReduceOp::Max)?;
        self.finite = Some(anywhere_not == [0]);
        Ok(())
    }

    /// Steps if all gradients are finite, otherwise forgets them; adapts the scale; tells whether it stepped. It unscales
    /// first, unless [`GradScaler::unscale`] has.
    ///
    /// Ranks: collective over the mesh; the answer is the same on every rank.
    ///
    /// # Errors
    /// A failed collective, or the optimizer's.
    pub fn step(&mut self, optim: &mut dyn Optimizer, fsdp: &Fsdp) -> Result<bool> {
        self.unscale(fsdp)?;
        let finite = self.finite.take() == Some(true);
        if finite {
            optim.step(fsdp)?;
        } else {
            fsdp.zero_grad();
        }
        self.adapt(finite);
        Ok(finite)
    }

    /// The scale of the next loss.
    pub fn loss_scale(&self) -> f64 {
        self.scale
    }

    /// The scale and how many good steps it has had, the same on every rank, under torch's names.
    pub fn state_dict(&self) -> StateDict<'static> {
        StateDict::from_iter([
            (SCALE, Value::Float(self.scale)),
            ("growth_factor", Value::Float(self.config.growth_factor)),
            ("backoff_factor", Value::Float(self.config.backoff_factor)),
            ("growth_interval", Value::Int(self.config.growth_interval.into())),
            (TRACKER, Value::Int(self.good_steps.into())),
        ])
    }

    /// Goes on as the scaler did whose state this is, torch's or ours; how it adapts stays as configured.
    ///
    /// # Errors
    /// `KeyMismatch` if scale or good steps are not there as numbers.
    pub fn load_state_dict(&mut self, saved: &StateDict<'_>) -> Result<()> {
        let missing = |name: &str| Error::KeyMismatch { missing: vec![name.to_owned()], unexpected: vec![] };
        let scale = number(saved, SCALE).ok_or_else(|| missing(SCALE))?;
        let good_steps = saved.get(TRACKER).and_then(Value::as_int).and_then(|n| u32::try_from(n).ok());
        (self.good_steps, self.scale) = (good_steps.ok_or_else(|| missing(TRACKER))?, scale);
        self.finite = None;
        Ok(())
    }

    fn adapt(&mut self, finite: bool) {
        self.good_steps = if finite { self.good_steps + 1 } else { 0 };
        if !finite {
            self.scale *= self.config.backoff_factor;
        } else if self.good_steps >= self.config.growth_interval {
            self.scale *= self.config.growth_factor;
            self.good_steps = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_halves_at_once_and_doubles_after_enough_good_steps() {
        let config = GradScalerConfig { init_scale: 8.0, growth_interval: 2, ..GradScalerConfig::default() };
        let mut scaler = GradScaler::new(config);
        let scales: Vec<f64> = [true, true, true, false, true, true]
            .into_iter()
            .map(|finite| {
                scaler.adapt(finite);
                scaler.loss_scale()
            })
            .collect();
        assert_eq!(scales, [8.0, 16.0, 16.0, 8.0, 8.0, 16.0]);
        scaler.adapt(true);
        let mut resumed = GradScaler::new(config);
        resumed.load_state_dict(&scaler.state_dict()).unwrap();
        for scaler in [&mut scaler, &mut resumed] {
            scaler.adapt(true);
            assert_eq!(scaler.loss_scale(), 32.0, "after two good steps, one of them before it was saved");
        }
        assert!(resumed.load_state_dict(&StateDict::new()).is_err());
    }
}
