//! Fsdp: the handle of a sharded model, through forward, backward and the optimizer's step.

use std::sync::Arc;

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use sconce_mesh::DeviceMesh;

use crate::cell::Failure;
use crate::error::CandleContext;
use crate::strategy::Groups;
use crate::unit::Unit;
use crate::{Result, ShardingStrategy, UnitOutput};

/// A model of which this rank holds a shard.
///
/// The model's own value stays with the caller: its parameters are cells that are filled while a unit runs and
/// freed otherwise.
#[derive(Debug)]
pub struct Fsdp {
    pub(crate) mesh: DeviceMesh,
    pub(crate) strategy: ShardingStrategy,
    pub(crate) groups: Groups,
    /// The root first.
    pub(crate) units: Vec<Arc<Unit>>,
    failure: Arc<Failure>,
}

impl Fsdp {
    pub(crate) fn new(
        mesh: DeviceMesh,
        strategy: ShardingStrategy,
        groups: Groups,
        units: Vec<Arc<Unit>>,
        failure: Arc<Failure>,
    ) -> Self {
        Self { mesh, strategy, groups, units, failure }
    }

    /// Runs the model's forward with the root's parameters gathered; wrapped modules gather their own.
    ///
    /// `inputs` are the tensors that `forward` reads and that gradients may flow back to.
    /// Ranks: collective over the shard group.
    ///
    /// # Errors
    /// `Mesh` for a failed collective, `Candle` for what the model's own ops report: using a parameter while it is
    /// freed is one (storage of dtype F4).
    pub fn forward<O: UnitOutput>(
        &self,
        inputs: &[&Tensor],
        forward: impl FnOnce() -> candle_core::Result<O>,
    ) -> Result<O> {
        let output = self.units[0].run(inputs, forward);
        self.typed(output, "forward")
    }

    /// Runs backward from `loss`: gradients of all units are reduced into this rank's shards, where they add up
    /// until the optimizer's step.
    ///
    /// Returns the gradients of variables that are not parameters of the model.
    /// Ranks: collective over the mesh; the loss must reach the same units on every rank.
    ///
    /// # Errors
    /// As [`Fsdp::forward`].
    pub fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        let gradients = self.typed(loss.backward(), "backward")?;
        // Units that ran forward but that the loss does not reach are still gathered.
        self.reshard()?;
        Ok(gradients)
    }

    /// The mesh that the model is sharded over.
    pub fn device_mesh(&self) -> &DeviceMesh {
        &self.mesh
    }

    /// Number of elements of this rank's shards, padding included.
    pub fn shard_numel(&self) -> usize {
        self.units.iter().map(|unit| unit.flat.shard_numel()).sum()
    }

    /// Number of elements of the whole model.
    pub fn numel(&self) -> usize {
        self.units.iter().flat_map(|unit| unit.flat.params()).map(|param| param.numel).sum()
    }

    /// Frees every gathered parameter: shards that change next must not leave old copies behind.
    pub(crate) fn reshard(&self) -> Result<()> {
        self.units.iter().try_for_each(|unit| unit.reshard())
    }

    /// Puts the error that a unit met inside candle in the place of candle's text of it.
    fn typed<T>(&self, outcome: candle_core::Result<T>, what: &str) -> Result<T> {
        match (outcome, self.failure.take()) {
            (Err(_), Some(error)) => Err(error),
            (outcome, _) => outcome.during(|| what.to_owned()),
        }
    }
}
