//! Unit: one group of parameters through forward and backward: gathered, run, freed, its gradients reduced.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Storage, Tensor};
use sconce_mesh::Work;

use crate::cell::{UnitSlot, freed, input_token, mark_output, swap_storage};
use crate::error::CandleContext;
use crate::flat_param::FlatParameter;
use crate::gather::{gather, release, room};
use crate::grad_sync::Reduction;
use crate::pass::Pass;
use crate::shard::Shard;
use crate::strategy::Groups;
use crate::trace::{self, Begun};
use crate::{Result, UnitOutput};

/// One wrapped group of parameters. All ranks of the mesh hold the same units in the same order.
#[derive(Debug)]
pub(crate) struct Unit {
    /// Prefix of its parameters; empty for the root.
    pub(crate) name: String,
    pub(crate) flat: Arc<FlatParameter>,
    pub(crate) shard: Shard,
    pub(crate) pass: Arc<Pass>,
    /// Position among the model's units.
    index: usize,
    slot: Arc<UnitSlot>,
    cells: Vec<Tensor>,
    groups: Groups,
    reshard_after_forward: bool,
    /// Whether any parameter in it, units inside included, has a gradient.
    trains: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    params: Params,
    /// Complete gradients by trainable parameter: of this backward, and of those before it that did not reduce.
    gradients: Vec<Option<Tensor>>,
    /// The reduced gradient of the shard, summed over the backwards since the last step.
    shard_gradient: Option<Vec<f32>>,
    /// While backward is in the unit.
    backward: Option<Begun>,
}

/// Where a unit's whole parameters are.
#[derive(Debug)]
enum Params {
    Freed,
    /// On their way into buffers, not yet in the cells.
    Gathering(Work<Vec<Storage>>),
    Unsharded,
}

/// What a unit is made of.
pub(crate) struct UnitParts {
    pub(crate) index: usize,
    pub(crate) name: String,
    pub(crate) flat: FlatParameter,
    pub(crate) shard: Shard,
    pub(crate) slot: Arc<UnitSlot>,
    /// One for each parameter of `flat`, in its order.
    pub(crate) cells: Vec<Tensor>,
    pub(crate) groups: Groups,
    pub(crate) reshard_after_forward: bool,
    pub(crate) trains: bool,
    pub(crate) pass: Arc<Pass>,
}

impl Unit {
    pub(crate) fn new(parts: UnitParts) -> Arc<Self> {
        let UnitParts { index, name, flat, shard, slot, cells, groups, reshard_after_forward, trains, pass } =
            parts;
        let gradients = vec![None; flat.trainable().len()];
        let state =
            Mutex::new(State { params: Params::Freed, gradients, shard_gradient: None, backward: None });
        let unit = Arc::new(Self {
            name,
            flat: Arc::new(flat),
            shard,
            pass,
            index,
            slot,
            cells,
            groups,
            reshard_after_forward,
            trains,
            state,
        });
        unit.slot.set(Some(&unit));
        unit
    }

    /// Gathers the parameters, runs `forward`, marks its outputs for backward, and frees the parameters if the
    /// strategy says so.
    pub(crate) fn run<O: UnitOutput>(
        &self,
        inputs: &[&Tensor],
        forward: impl FnOnce() -> candle_core::Result<O>,
    ) -> candle_core::Result<O> {
        trace::forward(&self.name, || self.run_inside(inputs, forward))
    }

    fn run_inside<O: UnitOutput>(
        &self,
        inputs: &[&Tensor],
        forward: impl FnOnce() -> candle_core::Result<O>,
    ) -> candle_core::Result<O> {
        let begun = self.unshard().and_then(|()| self.pass.forward_reached(self.index));
        begun.map_err(|error| self.pass.failure.keep(error))?;
        let output = self.mark(inputs, forward()?)?;
        self.pass.forward_left(self.index);
        if self.reshard_after_forward || self.pass.is_eval() {
            self.reshard().map_err(|error| self.pass.failure.keep(error))?;
        }
        Ok(output)
    }

    /// Runs `forward` a second time, in backward: what it gathers stays until the unit's gradients have come.
    pub(crate) fn run_again(
        &self,
        input: &Tensor,
        forward: impl FnOnce() -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        self.unshard().map_err(|error| self.pass.failure.keep(error))?;
        self.mark(&[input], self.pass.during_rerun(forward)?)
    }

    /// Outputs through which backward finds its way into the unit, or that end the graph if none is needed.
    fn mark<O: UnitOutput>(&self, inputs: &[&Tensor], output: O) -> candle_core::Result<O> {
        let token = input_token(inputs)?;
        let no_graph = self.pass.is_eval() || (token.is_none() && !self.trains);
        let output_dtype = self.pass.precision.output_dtype.filter(|_| self.name.is_empty());
        output.map_tensors(&mut |tensor| {
            if !tensor.dtype().is_float() {
                return Ok(tensor);
            }
            let tensor = tensor.to_dtype(output_dtype.unwrap_or(tensor.dtype()))?;
            match tensor.track_op() {
                // A copy, as `mark_output` makes one: it may be a view of a parameter, which is freed.
                true if no_graph => Ok(tensor.force_contiguous()?.detach()),
                true => mark_output(&self.slot, token.as_ref(), &tensor.contiguous()?),
                false => Ok(tensor),
            }
        })
    }

    /// Begins to gather, so that the collective runs beside what this thread computes next.
    pub(crate) fn prefetch(&self) -> Result<()> {
        let mut state = self.state();
        let travels = self.travels(self.groups.shard.size()) && !self.flat.params().is_empty();
        if travels && matches!(state.params, Params::Freed) {
            let (flat, shard, pass) = (self.flat.clone(), self.shard.values(), self.pass.clone());
            let room = room(&flat, &pass)?;
            let gathering = self.groups.shard.issue(move |group| gather(group, &flat, &shard, &pass, room));
            state.params = Params::Gathering(gathering);
        }
        Ok(())
    }

    /// All-gathers every shard straight into one buffer a parameter and hands the buffers to the cells.
    pub(crate) fn unshard(&self) -> Result<()> {
        let params = std::mem::replace(&mut self.state().params, Params::Freed);
        let gathered = match params {
            Params::Freed => {
                let room = room(&self.flat, &self.pass)?;
                gather(&self.groups.shard, &self.flat, &self.shard.values(), &self.pass, room)?
            }
            Params::Gathering(work) => work.wait()?,
            Params::Unsharded => {
                self.state().params = Params::Unsharded;
                return Ok(());
            }
        };
        for (cell, buffer) in self.cells.iter().zip(gathered) {
            swap_storage(cell, buffer).during(|| format!("unsharding unit {:?}", self.name))?;
        }
        self.state().params = Params::Unsharded;
        Ok(())
    }

    /// Frees the gathered parameters: touching one is an error from here on.
    pub(crate) fn reshard(&self) -> Result<()> {
        match std::mem::replace(&mut self.state().params, Params::Freed) {
            Params::Freed => {}
            Params::Gathering(work) => {
                work.wait()?.into_iter().for_each(|buffer| release(buffer, &self.pass.buffers));
            }
            Params::Unsharded => {
                for cell in &self.cells {
                    let buffer = freed(&self.pass.device).and_then(|freed| swap_storage(cell, freed));
                    let buffer = buffer.during(|| format!("resharding unit {:?}", self.name))?;
                    release(buffer, &self.pass.buffers);
                }
            }
        }
        Ok(())
    }

    /// Whether its parameters are neither here nor on their way.
    pub(crate) fn is_freed(&self) -> bool {
        matches!(self.state().params, Params::Freed)
    }

    /// Before the first op of the unit in backward.
    pub(crate) fn pre_backward(&self) -> Result<()> {
        self.state().backward.get_or_insert_with(|| Begun::backward(&self.name));
        self.unshard()?;
        self.pass.backward_reached(self.index)
    }

    /// Adds to the gradient of parameter `index`. candle's own ops bring it whole, a fused op once for each time that
    /// it ran; the first is kept as it is, without a flat copy.
    pub(crate) fn add_gradient(&self, index: usize, gradient: &Tensor) -> Result<()> {
        let param = &self.flat.params()[index];
        if param.frozen {
            return Ok(());
        }
        let before = self.state().gradients[index].take();
        let gradient = match before {
            None => gradient.contiguous(),
            Some(before) => before.add(gradient),
        };
        self.state().gradients[index] = Some(gradient.during(|| format!("gradient of {}", param.fqn))?);
        Ok(())
    }

    /// After every gradient that the loss reaches: frees the parameters, reduces the gradients.
    pub(crate) fn post_backward(&self) -> Result<()> {
        self.reshard()?;
        // Its computation is over; what follows is the reduction's.
        self.state().backward = None;
        // A gather ahead waits for its turn after the reduction that begins here, whose gradients lie in memory until
        // then: keeping a buffer for it would make the peak a unit higher. On a device no parameters lie here.
        if self.pass.device.is_cpu() && (self.reduces_beside() || !self.pass.is_gather_ahead()) {
            self.pass.buffers.free_idle();
        }
        if self.pass.is_no_sync() { Ok(()) } else { self.reduce() }
    }

    /// After a backward that reduces: reduces what an earlier one that did not has left, where this one did not come.
    pub(crate) fn reduce_what_is_kept(&self) -> Result<()> {
        let is_kept = self.state().gradients.iter().any(Option::is_some);
        if is_kept { self.reduce() } else { Ok(()) }
    }

    fn reduce(&self) -> Result<()> {
        if self.flat.trainable().is_empty() {
            return Ok(());
        }
        let reduces_beside = self.reduces_beside();
        let n_gradients = self.flat.trainable().len();
        let gradients = std::mem::replace(&mut self.state().gradients, vec![None; n_gradients]);
        let reduction = Reduction::new(&self.flat, &self.groups, &self.pass, gradients)?;
        if reduces_beside {
            self.pass.reducing(self.index, || self.groups.shard.issue(move |_| Ok(reduction.run())))
        } else {
            self.add_shard_gradient(reduction.run()?);
            Ok(())
        }
    }

    fn reduces_beside(&self) -> bool {
        self.pass.overlap.reduce && self.travels(self.groups.n_ranks())
    }

    /// Whether a shard goes anywhere: to other ranks, or between host memory and a device.
    fn travels(&self, n_ranks: usize) -> bool {
        n_ranks > 1 || self.pass.device.is_cuda()
    }

    pub(crate) fn add_shard_gradient(&self, reduced: Vec<f32>) {
        let mut state = self.state();
        match &mut state.shard_gradient {
            None => state.shard_gradient = Some(reduced),
            Some(sum) => {
                sum.iter_mut().zip(&reduced).for_each(|(sum, g)| *sum += g);
                self.give_gradient(reduced);
            }
        }
    }

    /// The reduced gradient since the last call; `None` if no backward reached the unit. For [`Unit::give_gradient`] then.
    pub(crate) fn take_gradient(&self) -> Option<Vec<f32>> {
        self.state().shard_gradient.take()
    }

    /// Gives back the memory of a reduced gradient. What comes from a device is written there again; on the CPU it would
    /// lie idle while memory is dearest, at the end of forward.
    pub(crate) fn give_gradient(&self, gradient: Vec<f32>) {
        if self.pass.device.is_cuda() {
            self.pass.buffers.give(gradient);
        }
    }

    /// Lends the reduced gradient, if there is one.
    pub(crate) fn with_gradient<R>(&self, f: impl FnOnce(&mut [f32]) -> R) -> Option<R> {
        self.state().shard_gradient.as_deref_mut().map(f)
    }

    /// Forgets all gradients.
    pub(crate) fn zero_grad(&self) {
        let mut state = self.state();
        state.gradients.fill(None);
        if let Some(gradient) = state.shard_gradient.take() {
            self.give_gradient(gradient);
        }
    }

    /// This rank's position among the shards.
    pub(crate) fn shard_index(&self) -> usize {
        self.groups.shard.group_rank().0
    }

    /// The model's tensors of this unit, in the order of its parameters.
    pub(crate) fn cells(&self) -> &[Tensor] {
        &self.cells
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
