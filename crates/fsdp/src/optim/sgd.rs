//! SGD with momentum, exact to torch's formula.

use sconce_dtensor::{StateDict, Value};

use super::Optimizer;
use super::configs::{Configs, Hyper};
use super::groups::ParamGroup;
use super::state::{Moments, number, truth};
use crate::{Fsdp, Result, StateDictType};

/// Hyperparameters of [`Sgd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Factor of the running gradient; 0 keeps none.
    pub momentum: f64,
    /// How much of a new gradient the running one leaves out.
    pub dampening: f64,
    /// L2 penalty.
    pub weight_decay: f64,
    /// Nesterov's momentum.
    pub nesterov: bool,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false }
    }
}

/// Stochastic gradient descent.
///
/// # Source
/// `torch.optim.SGD` (`_single_tensor_sgd`).
#[derive(Debug)]
pub struct Sgd {
    configs: Configs<SgdConfig>,
    state: State,
}

/// Without momentum there is no buffer.
#[derive(Debug)]
enum State {
    Plain(Moments<0>),
    Momentum(Moments<1>),
}

impl Sgd {
    /// An optimizer for the shards of `fsdp`.
    ///
    /// # Errors
    /// None today.
    pub fn new(fsdp: &Fsdp, config: SgdConfig) -> Result<Self> {
        Self::with_groups(fsdp, config, Vec::new())
    }

    /// As [`Sgd::new`], with other hyperparameters for some parameters.
    ///
    /// # Errors
    /// None today.
    pub fn with_groups(fsdp: &Fsdp, config: SgdConfig, groups: Vec<ParamGroup<SgdConfig>>) -> Result<Self> {
        let has_momentum = config.momentum != 0.0 || groups.iter().any(|g| g.config.momentum != 0.0);
        let state = if has_momentum {
            State::Momentum(Moments::new(fsdp, &groups))
        } else {
            State::Plain(Moments::new(fsdp, &groups))
        };
        Ok(Self { configs: Configs::new(config, &groups), state })
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, fsdp: &Fsdp) -> Result<()> {
        let configs = &self.configs;
        let factors = |step, group| Factors::new(configs.get(group), step);
        match &mut self.state {
            State::Plain(moments) => moments.update(fsdp, factors, |factors, param, gradient, []| {
                for (param, gradient) in param.iter_mut().zip(gradient) {
                    *param -= factors.lr * factors.decayed(*gradient, *param);
                }
            }),
            State::Momentum(moments) => {
                moments.update(fsdp, factors, |factors, param, gradient, [buffer]| {
                    for ((param, gradient), buffer) in param.iter_mut().zip(gradient).zip(buffer) {
                        let gradient = factors.decayed(*gradient, *param);
                        *param -= factors.lr * factors.with_momentum(gradient, buffer);
                    }
                })
            }
        }
    }

    fn state_dict(&self, fsdp: &Fsdp, kind: StateDictType) -> Result<StateDict<'static>> {
        let groups = self.configs.iter().map(SgdConfig::state_dict);
        match &self.state {
            State::Plain(moments) => moments.state_dict(fsdp, kind, [], groups),
            State::Momentum(moments) => moments.state_dict(fsdp, kind, ["momentum_buffer"], groups),
        }
    }

    fn load_state_dict(&mut self, fsdp: &Fsdp, saved: &StateDict<'_>) -> Result<()> {
        let configs = match &self.state {
            State::Plain(moments) => moments.loaded_configs(fsdp, saved, &self.configs)?,
            State::Momentum(moments) => moments.loaded_configs(fsdp, saved, &self.configs)?,
        };
        if let State::Plain(moments) = &self.state
            && configs.iter().any(|config| config.momentum != 0.0)
        {
            self.state = State::Momentum(moments.with_buffer(fsdp));
        }
        match &mut self.state {
            State::Plain(moments) => moments.load_state_dict(fsdp, saved, [], Some(0))?,
            // torch saves no step: a buffer that it saved has been filled.
            State::Momentum(moments) => {
                moments.load_state_dict(fsdp, saved, ["momentum_buffer"], Some(1))?;
            }
        }
        self.configs = configs;
        Ok(())
    }

    fn set_lr(&mut self, lr: f64) {
        self.configs.set_lr(lr);
    }

    fn lrs(&self) -> Vec<f64> {
        self.configs.lrs()
    }

    fn set_group_lr(&mut self, group: usize, lr: f64) {
        self.configs.set_group_lr(group, lr);
    }
}

impl Hyper for SgdConfig {
    fn state_dict(&self) -> StateDict<'static> {
        StateDict::from_iter([
            ("lr", Value::Float(self.lr)),
            ("momentum", Value::Float(self.momentum)),
            ("dampening", Value::Float(self.dampening)),
            ("weight_decay", Value::Float(self.weight_decay)),
            ("nesterov", Value::Bool(self.nesterov)),
        ])
    }

    fn load(&mut self, group: &StateDict<'_>) {
        self.lr = number(group, "lr").unwrap_or(self.lr);
        self.momentum = number(group, "momentum").unwrap_or(self.momentum);
        self.dampening = number(group, "dampening").unwrap_or(self.dampening);
        self.weight_decay = number(group, "weight_decay").unwrap_or(self.weight_decay);
        self.nesterov = truth(group, "nesterov").unwrap_or(self.nesterov);
    }

    fn numbers(&self) -> Vec<f64> {
        let Self { lr, momentum, dampening, weight_decay, nesterov } = *self;
        vec![lr, momentum, dampening, weight_decay, f64::from(u8::from(nesterov))]
    }

    fn set_numbers(&mut self, numbers: &[f64]) {
        if let [lr, momentum, dampening, weight_decay, nesterov] = *numbers {
            *self = Self { lr, momentum, dampening, weight_decay, nesterov: nesterov != 0.0 };
        }
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn set_lr(&mut self, lr: f64) {
        self.lr = lr;
    }
}

/// The factors of one step; computed in f64 and applied in f32, as torch does.
struct Factors {
    lr: f32,
    momentum: f32,
    one_minus_dampening: f32,
    weight_decay: f32,
    nesterov: bool,
    is_first: bool,
}

impl Factors {
    fn new(config: &SgdConfig, step: u64) -> Self {
        Self {
            lr: config.lr as f32,
            momentum: config.momentum as f32,
            one_minus_dampening: (1.0 - config.dampening) as f32,
            weight_decay: config.weight_decay as f32,
            nesterov: config.nesterov,
            is_first: step == 1,
        }
    }

    fn decayed(&self, gradient: f32, param: f32) -> f32 {
        if self.weight_decay == 0.0 { gradient } else { gradient + self.weight_decay * param }
    }

    fn with_momentum(&self, gradient: f32, buffer: &mut f32) -> f32 {
        if self.momentum == 0.0 {
            return gradient;
        }
        *buffer = if self.is_first {
            gradient
        } else {
            self.momentum * *buffer + self.one_minus_dampening * gradient
        };
        if self.nesterov { gradient + self.momentum * *buffer } else { *buffer }
    }
}
