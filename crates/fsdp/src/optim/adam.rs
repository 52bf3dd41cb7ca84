//! Adam and AdamW, exact to torch's formula.

use sconce_dtensor::{StateDict, Value};

use super::Optimizer;
use super::configs::{Configs, Hyper};
use super::groups::ParamGroup;
use super::state::{Moments, number, truth};
use crate::{Fsdp, Result, StateDictType};

/// Hyperparameters of [`Adam`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment's average.
    pub beta1: f64,
    /// Decay of the second moment's average.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay: an L2 penalty, or taken from the weights directly if `decoupled_weight_decay`.
    pub weight_decay: f64,
    /// True for AdamW.
    pub decoupled_weight_decay: bool,
}

impl Default for AdamConfig {
    /// torch's defaults of Adam.
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            decoupled_weight_decay: false,
        }
    }
}

impl AdamConfig {
    /// torch's defaults of AdamW, with the given learning rate.
    pub fn adamw(lr: f64) -> Self {
        Self { lr, weight_decay: 1e-2, decoupled_weight_decay: true, ..Self::default() }
    }
}

impl Hyper for AdamConfig {
    fn state_dict(&self) -> StateDict<'static> {
        let betas = vec![Value::Float(self.beta1), Value::Float(self.beta2)];
        StateDict::from_iter([
            ("lr", Value::Float(self.lr)),
            ("betas", Value::List(betas)),
            ("eps", Value::Float(self.eps)),
            ("weight_decay", Value::Float(self.weight_decay)),
            ("decoupled_weight_decay", Value::Bool(self.decoupled_weight_decay)),
        ])
    }

    fn load(&mut self, group: &StateDict<'_>) {
        self.lr = number(group, "lr").unwrap_or(self.lr);
        self.eps = number(group, "eps").unwrap_or(self.eps);
        self.weight_decay = number(group, "weight_decay").unwrap_or(self.weight_decay);
        let decoupled = truth(group, "decoupled_weight_decay");
        self.decoupled_weight_decay = decoupled.unwrap_or(self.decoupled_weight_decay);
        if let Some(Value::List(betas)) = group.get("betas")
            && let [Value::Float(beta1), Value::Float(beta2)] = betas.as_slice()
        {
            (self.beta1, self.beta2) = (*beta1, *beta2);
        }
    }

    fn numbers(&self) -> Vec<f64> {
        let Self { lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay } = *self;
        vec![lr, beta1, beta2, eps, weight_decay, f64::from(u8::from(decoupled_weight_decay))]
    }

    fn set_numbers(&mut self, numbers: &[f64]) {
        if let [lr, beta1, beta2, eps, weight_decay, decoupled] = *numbers {
            *self = Self { lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay: decoupled != 0.0 };
        }
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn set_lr(&mut self, lr: f64) {
        self.lr = lr;
    }
}

/// Adam, or AdamW.
///
/// # Source
/// `torch.optim.Adam` (`_single_tensor_adam`), without amsgrad.
#[derive(Debug)]
pub struct Adam {
    configs: Configs<AdamConfig>,
    moments: Moments<2>,
}

const STATE: [&str; 2] = ["exp_avg", "exp_avg_sq"];

impl Adam {
    /// An optimizer for the shards of `fsdp`.
    ///
    /// # Errors
    /// None today.
    pub fn new(fsdp: &Fsdp, config: AdamConfig) -> Result<Self> {
        Self::with_groups(fsdp, config, Vec::new())
    }

    /// As [`Adam::new`], with other hyperparameters for some parameters, such as no weight decay for biases.
    ///
    /// # Errors
    /// None today.
    pub fn with_groups(fsdp: &Fsdp, config: AdamConfig, groups: Vec<ParamGroup<AdamConfig>>) -> Result<Self> {
        Ok(Self { moments: Moments::new(fsdp, &groups), configs: Configs::new(config, &groups) })
    }
}

impl Optimizer for Adam {
    fn step(&mut self, fsdp: &Fsdp) -> Result<()> {
        let configs = &self.configs;
        let factors = |step, group| Scalars::new(configs.get(group), step);
        self.moments.update(fsdp, factors, |scalars, param, gradient, [exp_avg, exp_avg_sq]| {
            let state = exp_avg.iter_mut().zip(exp_avg_sq);
            for ((param, gradient), (avg, avg_sq)) in param.iter_mut().zip(gradient).zip(state) {
                scalars.update(param, *gradient, avg, avg_sq);
            }
        })
    }

    fn state_dict(&self, fsdp: &Fsdp, kind: StateDictType) -> Result<StateDict<'static>> {
        self.moments.state_dict(fsdp, kind, STATE, self.configs.iter().map(AdamConfig::state_dict))
    }

    fn load_state_dict(&mut self, fsdp: &Fsdp, saved: &StateDict<'_>) -> Result<()> {
        let configs = self.moments.loaded_configs(fsdp, saved, &self.configs)?;
        self.moments.load_state_dict(fsdp, saved, STATE, None)?;
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

/// The factors of one step; computed in f64 and applied in f32, as torch does.
struct Scalars {
    l2_penalty: f32,
    weight_factor: f32,
    lerp: f32,
    beta2: f32,
    one_minus_beta2: f32,
    correction2_sqrt: f32,
    eps: f32,
    step_size: f32,
}

impl Scalars {
    fn new(config: &AdamConfig, step: u64) -> Self {
        let correction1 = 1.0 - config.beta1.powf(step as f64);
        let correction2 = 1.0 - config.beta2.powf(step as f64);
        let (decay, decoupled) = (config.weight_decay, config.decoupled_weight_decay);
        Self {
            l2_penalty: if decoupled { 0.0 } else { decay as f32 },
            weight_factor: if decoupled { (1.0 - config.lr * decay) as f32 } else { 1.0 },
            lerp: (1.0 - config.beta1) as f32,
            beta2: config.beta2 as f32,
            one_minus_beta2: (1.0 - config.beta2) as f32,
            correction2_sqrt: correction2.sqrt() as f32,
            eps: config.eps as f32,
            step_size: (config.lr / correction1) as f32,
        }
    }

    fn update(&self, param: &mut f32, gradient: f32, exp_avg: &mut f32, exp_avg_sq: &mut f32) {
        *param *= self.weight_factor;
        let gradient = gradient + self.l2_penalty * *param;
        *exp_avg += self.lerp * (gradient - *exp_avg);
        *exp_avg_sq = *exp_avg_sq * self.beta2 + self.one_minus_beta2 * gradient * gradient;
        let denominator = exp_avg_sq.sqrt() / self.correction2_sqrt + self.eps;
        *param -= self.step_size * *exp_avg / denominator;
    }
}
