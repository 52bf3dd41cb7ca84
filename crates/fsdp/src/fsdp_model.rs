//! Fsdp: the handle of a sharded model, through forward, backward and the optimizer's step.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use sconce_mesh::DeviceMesh;

use crate::declare::KeptWhole;
use crate::error::CandleContext;
use crate::pass::Pass;
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
    pub(crate) kept: Vec<KeptWhole>,
    pub(crate) pass: Arc<Pass>,
}

impl Fsdp {
    pub(crate) fn new(
        mesh: DeviceMesh,
        strategy: ShardingStrategy,
        groups: Groups,
        units: Vec<Arc<Unit>>,
        kept: Vec<KeptWhole>,
        pass: Arc<Pass>,
    ) -> Self {
        Self { mesh, strategy, groups, units, kept, pass }
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
        self.pass.forward_begins();
        let output = self.units[0].run(inputs, forward);
        self.typed(output, "forward")
    }

    /// Runs the model's forward without a graph, as for a validation: parameters are freed after it whatever the
    /// strategy, and what a unit computes inside is freed when it ends.
    ///
    /// Ranks: collective over the shard group.
    ///
    /// # Errors
    /// As [`Fsdp::forward`].
    ///
    /// # Source
    /// `torch.no_grad`.
    pub fn eval<O: UnitOutput>(&self, forward: impl FnOnce() -> candle_core::Result<O>) -> Result<O> {
        self.pass.during_eval(|| self.forward(&[], forward))
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
        let gradients = self.typed(loss.backward(), "backward");
        let kept = match gradients {
            Ok(_) if !self.pass.is_no_sync() => {
                self.units.iter().try_for_each(|unit| unit.reduce_what_is_kept())
            }
            _ => Ok(()),
        };
        let reduced = self.pass.finish_all_reductions();
        let gradients = gradients?;
        kept.and(reduced)?;
        // Units that ran forward but that the loss does not reach are still gathered.
        self.reshard()?;
        Ok(gradients)
    }

    /// Runs backward from `loss` and keeps the gradients whole on this rank, unreduced: the next [`Fsdp::backward`]
    /// reduces them with its own. For accumulation over several batches with the communication of one, at the price of
    /// a whole gradient in memory.
    ///
    /// Ranks: collective over the shard group (parameters are gathered), without reduction.
    ///
    /// # Errors
    /// As [`Fsdp::forward`].
    ///
    /// # Source
    /// `FullyShardedDataParallel.no_sync`.
    pub fn backward_no_sync(&self, loss: &Tensor) -> Result<GradStore> {
        self.pass.during_no_sync(|| self.backward(loss))
    }

    /// Forgets all gradients, reduced or not, for instance those of a step that is skipped.
    ///
    /// Ranks: local; every rank forgets together.
    pub fn zero_grad(&self) {
        self.units.iter().for_each(|unit| unit.zero_grad());
    }

    /// The tensors that [`FsdpConfig::kept_whole`](crate::FsdpConfig::kept_whole) chose, by name: whole on every rank,
    /// and variables whose gradients [`Fsdp::backward`] returns.
    pub fn kept_whole(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.kept.iter().map(|kept| (kept.fqn.as_str(), &kept.var))
    }

    /// Names of the units in order, the root first, whose name is empty.
    pub fn unit_names(&self) -> impl Iterator<Item = &str> {
        self.units.iter().map(|unit| unit.name.as_str())
    }

    /// The mesh that the model is sharded over.
    pub fn device_mesh(&self) -> &DeviceMesh {
        &self.mesh
    }

    /// How the model is spread over the mesh.
    pub fn sharding_strategy(&self) -> ShardingStrategy {
        self.strategy
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
    pub(crate) fn typed<T>(&self, outcome: candle_core::Result<T>, what: &str) -> Result<T> {
        match (outcome, self.pass.failure.take()) {
            (Err(_), Some(error)) => Err(error),
            (outcome, _) => outcome.during(|| what.to_owned()),
        }
    }
}
