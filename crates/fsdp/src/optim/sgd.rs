//! SGD with momentum, exact to torch's formula.

use sconce_dtensor::{StateDict, Value};

use super::Optimizer;
use super::state::{self, Moments};
use crate::{Fsdp, Result, StateDictType};

/// Hyperparameters of [`Sgd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Factor of the running gradient; 0 keeps none.
    pub momentum: f64,
    /// L2 penalty.
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0.0, weight_decay: 0.0 }
    }
}

/// Stochastic gradient descent.
///
/// # Source
/// `torch.optim.SGD` (`_single_tensor_sgd`), without dampening and Nesterov.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    moments: Moments<1>,
}

const STATE: [&str; 1] = ["momentum_buffer"];

impl Sgd {
    /// An optimizer for the shards of `fsdp`.
    ///
    /// # Errors
    /// The state could not be allocated.
    pub fn new(fsdp: &Fsdp, config: SgdConfig) -> Result<Self> {
        Ok(Self { config, moments: Moments::new(fsdp) })
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, fsdp: &Fsdp) -> Result<()> {
        let SgdConfig { lr, momentum, weight_decay } = self.config;
        self.moments.update(
            fsdp,
            |step| step == 1,
            |is_first, param, gradient, [buffer]| {
                for ((param, gradient), buffer) in param.iter_mut().zip(gradient).zip(buffer) {
                    let mut gradient = *gradient;
                    if weight_decay != 0.0 {
                        gradient += weight_decay as f32 * *param;
                    }
                    if momentum != 0.0 {
                        *buffer = if *is_first { gradient } else { momentum as f32 * *buffer + gradient };
                        gradient = *buffer;
                    }
                    *param -= lr as f32 * gradient;
                }
            },
        )
    }

    fn state_dict(&self, fsdp: &Fsdp, kind: StateDictType) -> Result<StateDict<'static>> {
        let group = StateDict::from_iter([
            ("lr", Value::Float(self.config.lr)),
            ("momentum", Value::Float(self.config.momentum)),
            ("weight_decay", Value::Float(self.config.weight_decay)),
        ]);
        self.moments.state_dict(fsdp, kind, STATE, group)
    }

    fn load_state_dict(&mut self, fsdp: &Fsdp, saved: &StateDict<'_>) -> Result<()> {
        self.moments.load_state_dict(fsdp, saved, STATE)?;
        self.config.lr = state::hyperparameter(saved, "lr").unwrap_or(self.config.lr);
        self.config.momentum = state::hyperparameter(saved, "momentum").unwrap_or(self.config.momentum);
        let decay = state::hyperparameter(saved, "weight_decay");
        self.config.weight_decay = decay.unwrap_or(self.config.weight_decay);
        Ok(())
    }

    fn set_lr(&mut self, lr: f64) {
        self.config.lr = lr;
    }
}
