//! The models of PyTorch's test_hsdp_checkpoint.py, from plain candle_nn constructors.

use candle_core::{Result, Tensor};
use candle_nn::{Linear, Module, VarBuilder, linear};

/// Linear 5-8-4-12, ReLU after each of the three.
#[derive(Debug, Clone)]
pub struct SimpleModel(Vec<Linear>);

/// Linear 5-10-15-30-5, ReLU after each of the four.
#[derive(Debug, Clone)]
pub struct SimpleModelUneven(Vec<Linear>);

impl SimpleModel {
    /// The model with parameters `net1.weight` to `net3.bias` of `vb`.
    pub fn new(vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self(linears(&[5, 8, 4, 12], &vb)?))
    }
}

impl SimpleModelUneven {
    /// The model with parameters `net1.weight` to `net4.bias` of `vb`.
    pub fn new(vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self(linears(&[5, 10, 15, 30, 5], &vb)?))
    }
}

fn linears(widths: &[usize], vb: &VarBuilder<'_>) -> Result<Vec<Linear>> {
    let layers = widths.windows(2).enumerate();
    layers.map(|(nth, width)| linear(width[0], width[1], vb.pp(format!("net{}", nth + 1)))).collect()
}

fn relu_after_each(layers: &[Linear], x: &Tensor) -> Result<Tensor> {
    layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x)?.relu())
}

impl Module for SimpleModel {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        relu_after_each(&self.0, x)
    }
}

impl Module for SimpleModelUneven {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        relu_after_each(&self.0, x)
    }
}
