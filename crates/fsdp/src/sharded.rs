//! Sharded: a module that runs as a unit of its own inside a larger model.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::Module;

use crate::UnitOutput;
use crate::cell::UnitSlot;

/// A module whose parameters are gathered before its forward and freed after it, if the wrap policy makes it a unit;
/// otherwise it runs as a part of what it lies in.
///
/// Made by [`FsdpBuilder::wrap`](crate::FsdpBuilder::wrap). It is a [`Module`] where `M` is one; for other forwards
/// there is [`Sharded::run`].
#[derive(Debug, Clone)]
pub struct Sharded<M> {
    slot: Arc<UnitSlot>,
    module: M,
}

impl<M> Sharded<M> {
    pub(crate) fn new(slot: Arc<UnitSlot>, module: M) -> Self {
        Self { slot, module }
    }

    /// Runs `forward` with the parameters gathered. `inputs` are the tensors that gradients flow back to.
    ///
    /// Ranks: collective over the shard group.
    ///
    /// # Errors
    /// What `forward` returns, or a failed collective (typed by [`Fsdp::forward`](crate::Fsdp::forward)).
    pub fn run<O: UnitOutput>(&self, inputs: &[&Tensor], forward: impl FnOnce(&M) -> Result<O>) -> Result<O> {
        match self.slot.get().map_err(candle_core::Error::wrap)? {
            Some(unit) => unit.run(inputs, || forward(&self.module)),
            None => forward(&self.module),
        }
    }

    /// The wrapped module.
    pub fn module(&self) -> &M {
        &self.module
    }
}

impl<M: Module> Module for Sharded<M> {
    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        self.run(&[input], |module| module.forward(input))
    }
}
