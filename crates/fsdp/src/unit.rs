//! Unit: one group of parameters through forward and backward: gathered, run, freed, its gradients reduced.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, Tensor};

use crate::cell::{Failure, UnitSlot, freed, input_token, mark_output, swap_storage};
use crate::error::CandleContext;
use crate::flat_param::FlatParameter;
use crate::grad_sync::reduce_gradients;
use crate::shard::Shard;
use crate::strategy::Groups;
use crate::{Result, UnitOutput};

/// One wrapped group of parameters. All ranks of the mesh hold the same units in the same order.
#[derive(Debug)]
pub(crate) struct Unit {
    /// Prefix of its parameters; empty for the root.
    pub(crate) name: String,
    pub(crate) flat: FlatParameter,
    pub(crate) shard: Shard,
    pub(crate) failure: Arc<Failure>,
    slot: Arc<UnitSlot>,
    cells: Vec<Tensor>,
    groups: Groups,
    reshard_after_forward: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    unsharded: bool,
    /// Complete gradients of this backward, by parameter.
    gradients: Vec<Option<Tensor>>,
    /// The reduced gradient of the shard, summed over the backwards since the last step.
    shard_gradient: Option<Vec<f32>>,
}

/// What a unit is made of.
pub(crate) struct UnitParts {
    pub(crate) name: String,
    pub(crate) flat: FlatParameter,
    pub(crate) shard: Shard,
    pub(crate) slot: Arc<UnitSlot>,
    pub(crate) cells: Vec<Tensor>,
    pub(crate) groups: Groups,
    pub(crate) reshard_after_forward: bool,
    pub(crate) failure: Arc<Failure>,
}

impl Unit {
    pub(crate) fn new(parts: UnitParts) -> Arc<Self> {
        let UnitParts { name, flat, shard, slot, cells, groups, reshard_after_forward, failure } = parts;
        let state = State { unsharded: false, gradients: vec![None; cells.len()], shard_gradient: None };
        let state = Mutex::new(state);
        let unit =
            Arc::new(Self { name, flat, shard, failure, slot, cells, groups, reshard_after_forward, state });
        unit.slot.set(&unit);
        unit
    }

    /// Gathers the parameters, runs `forward`, marks its outputs for backward, and frees the parameters if the
    /// strategy says so.
    pub(crate) fn run<O: UnitOutput>(
        &self,
        inputs: &[&Tensor],
        forward: impl FnOnce() -> candle_core::Result<O>,
    ) -> candle_core::Result<O> {
        self.unshard().map_err(|error| self.failure.keep(error))?;
        let output = forward()?;
        let token = input_token(inputs)?;
        let output = output.map_tensors(&mut |tensor| {
            if !tensor.track_op() || !tensor.dtype().is_float() {
                return Ok(tensor);
            }
            mark_output(&self.slot, token.as_ref(), &tensor.contiguous()?)
        })?;
        if self.reshard_after_forward {
            self.reshard().map_err(|error| self.failure.keep(error))?;
        }
        Ok(output)
    }

    /// All-gathers every shard straight into one buffer a parameter and hands the buffers to the cells.
    pub(crate) fn unshard(&self) -> Result<()> {
        if self.state().unsharded {
            return Ok(());
        }
        let mut buffers: Vec<Vec<f32>> = self.flat.params().iter().map(|p| vec![0.0; p.numel]).collect();
        let mut parts: Vec<&mut [f32]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
        self.groups.shard.all_gather_vectored(&self.shard.values(), &mut parts)?;
        for (cell, buffer) in self.cells.iter().zip(buffers) {
            swap_storage(cell, CpuStorage::F32(buffer))
                .during(|| format!("unsharding unit {:?}", self.name))?;
        }
        self.state().unsharded = true;
        Ok(())
    }

    /// Frees the gathered parameters: touching one is an error from here on.
    pub(crate) fn reshard(&self) -> Result<()> {
        if !std::mem::take(&mut self.state().unsharded) {
            return Ok(());
        }
        for cell in &self.cells {
            swap_storage(cell, freed()).during(|| format!("resharding unit {:?}", self.name))?;
        }
        Ok(())
    }

    /// Before the first op of the unit in backward.
    pub(crate) fn pre_backward(&self) -> Result<()> {
        self.unshard()
    }

    /// The complete gradient of parameter `index`; kept as it is, without a flat copy.
    pub(crate) fn keep_gradient(&self, index: usize, gradient: &Tensor) -> Result<()> {
        let fqn = || format!("gradient of {}", self.flat.params()[index].fqn);
        let gradient = gradient.contiguous().during(fqn)?;
        self.state().gradients[index] = Some(gradient);
        Ok(())
    }

    /// After every gradient that the loss reaches: frees the parameters, reduces the gradients.
    pub(crate) fn post_backward(&self) -> Result<()> {
        self.reshard()?;
        let gradients = std::mem::replace(&mut self.state().gradients, vec![None; self.cells.len()]);
        let reduced = reduce_gradients(&self.flat, &self.groups, &gradients)?;
        let mut state = self.state();
        match &mut state.shard_gradient {
            None => state.shard_gradient = Some(reduced),
            Some(sum) => sum.iter_mut().zip(&reduced).for_each(|(sum, g)| *sum += g),
        }
        Ok(())
    }

    /// The reduced gradient since the last call; `None` if no backward reached the unit.
    pub(crate) fn take_gradient(&self) -> Option<Vec<f32>> {
        self.state().shard_gradient.take()
    }

    /// This rank's position among the shards.
    pub(crate) fn shard_index(&self) -> usize {
        self.groups.shard.group_rank().0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
