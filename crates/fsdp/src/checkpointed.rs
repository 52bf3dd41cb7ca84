//! Checkpointed: a unit that keeps no activations but its input, and runs its forward again in backward.

use std::cell::RefCell;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Storage, Tensor, Var};
use candle_nn::Module;

use crate::cell::{UnitSlot, copy_storage};
use crate::wrap::is_inside;

/// A module that trades time for memory: of its forward only the input and the output are kept; backward runs the forward
/// again, in the one gathering of parameters that it needs anyway.
///
/// Made by [`FsdpBuilder::wrap_checkpointed`](crate::FsdpBuilder::wrap_checkpointed). The module must compute the same when
/// it runs again: no fresh random numbers. Gradients of its parameters reach them as ever, those of other variables that
/// it uses are lost: they belong in its input.
///
/// # Source
/// `torch.utils.checkpoint` (`use_reentrant=True`) applied by `apply_activation_checkpointing`.
pub struct Checkpointed<M> {
    slot: Arc<UnitSlot>,
    module: Arc<M>,
    /// What makes backward come here even if the input needs no gradient, and before what surrounds the module is done:
    /// the token of the name above, or a variable.
    anchor: Tensor,
}

thread_local! {
    /// Modules whose second forward is in its backward on this thread, the innermost last.
    static RERUNS: RefCell<Vec<Arc<UnitSlot>>> = const { RefCell::new(Vec::new()) };
}

/// Whether `name` is beyond the module that is run again, whose graph leads to the tokens of all that surrounds it: that is
/// done when the backward of the whole model says so.
pub(crate) fn is_beyond_rerun(name: &str) -> bool {
    RERUNS.with_borrow(|reruns| {
        reruns.last().is_some_and(|rerun| name != rerun.name() && !is_inside(name, rerun.name()))
    })
}

/// Runs `f` as the backward of the module's second forward.
fn during_rerun<R>(slot: &Arc<UnitSlot>, f: impl FnOnce() -> R) -> R {
    struct Pop;
    impl Drop for Pop {
        fn drop(&mut self) {
            RERUNS.with_borrow_mut(Vec::pop);
        }
    }
    RERUNS.with_borrow_mut(|reruns| reruns.push(slot.clone()));
    let _pop = Pop;
    f()
}

impl<M> Checkpointed<M> {
    /// `above` is the token of the name without its last component; nothing is above the whole model.
    pub(crate) fn new(
        slot: Arc<UnitSlot>,
        module: M,
        above: Option<Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let anchor = match above {
            Some(token) => token,
            None => Var::zeros(1, DType::F32, device)?.as_tensor().clone(),
        };
        Ok(Self { slot, module: Arc::new(module), anchor })
    }

    /// The wrapped module.
    pub fn module(&self) -> &M {
        &self.module
    }
}

impl<M> fmt::Debug for Checkpointed<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpointed").field("unit", &self.slot).finish_non_exhaustive()
    }
}

impl<M> Clone for Checkpointed<M> {
    fn clone(&self) -> Self {
        Self { slot: self.slot.clone(), module: self.module.clone(), anchor: self.anchor.clone() }
    }
}

impl<M: Module + Send + Sync + 'static> Module for Checkpointed<M> {
    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let unit = self.slot.get().map_err(candle_core::Error::wrap)?;
        if let Some(unit) = unit.filter(|unit| unit.pass.is_eval()) {
            return unit.run(&[], || self.module.forward(input));
        }
        recomputed(&self.anchor, input, self.module.clone(), self.slot.clone())
    }
}

/// The module's output, whose backward runs the module again, as the unit of `slot` if it is one.
fn recomputed<M: Module + Send + Sync + 'static>(
    anchor: &Tensor,
    input: &Tensor,
    module: Arc<M>,
    slot: Arc<UnitSlot>,
) -> Result<Tensor> {
    let kept = input.detach();
    let output = match slot.get().map_err(candle_core::Error::wrap)? {
        Some(unit) => unit.pass.during_eval(|| unit.run(&[], || module.forward(&kept)))?,
        None => module.forward(&kept)?.detach(),
    };
    let of_rerun = slot.clone();
    let again = move |input: &Tensor| match of_rerun.get().map_err(candle_core::Error::wrap)? {
        Some(unit) => unit.run_again(input, || module.forward(input)),
        None => module.forward(input),
    };
    anchor.apply_op2(input, Recompute { slot, again: Box::new(again), output: Mutex::new(Some(output)) })
}

type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

struct Recompute {
    slot: Arc<UnitSlot>,
    again: Forward,
    /// What forward computed, until it becomes the op's result.
    output: Mutex<Option<Tensor>>,
}

impl CustomOp2 for Recompute {
    fn name(&self) -> &'static str {
        "fsdp-checkpointed"
    }

    fn cpu_fwd(
        &self,
        _anchor: &CpuStorage,
        _: &Layout,
        _input: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let output = self.take_output()?;
        let (storage, layout) = output.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((copy_storage(storage, layout)?, layout.shape().clone())),
            other => candle_core::bail!("the output of a unit lies on {:?}", other.device().location()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _anchor: &CudaStorage,
        _: &Layout,
        _input: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let output = self.take_output()?;
        let (storage, layout) = output.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => {
                Ok((crate::cuda::copy_storage(storage, layout)?, layout.shape().clone()))
            }
            other => candle_core::bail!("the output of a unit lies on {:?}", other.device().location()),
        }
    }

    fn bwd(
        &self,
        anchor: &Tensor,
        input: &Tensor,
        _output: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // candle needs a gradient for every node that it walks, except for variables.
        let of_anchor = if anchor.is_variable() { None } else { Some(anchor.zeros_like()?) };
        if !(input.track_op() && input.dtype().is_float()) {
            self.backward(&input.detach(), gradient)?;
            return Ok((of_anchor, None));
        }
        let leaf = Var::from_tensor(&input.detach())?;
        let gradients = self.backward(leaf.as_tensor(), gradient)?;
        let of_input = gradients.get(&leaf).map_or_else(|| leaf.zeros_like(), |g| Ok(g.clone()))?;
        Ok((of_anchor, Some(of_input)))
    }
}

impl Recompute {
    fn take_output(&self) -> Result<Tensor> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(output) = output else { candle_core::bail!("a checkpointed unit's op runs once") };
        output.contiguous()
    }

    /// Runs the module again, and backward through it: the gradient of this sum with respect to the output is
    /// `gradient`.
    fn backward(&self, input: &Tensor, gradient: &Tensor) -> Result<GradStore> {
        let output = (self.again)(input)?;
        during_rerun(&self.slot, || output.mul(&gradient.detach())?.sum_all()?.backward())
    }
}
