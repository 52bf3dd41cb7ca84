//! The candle ops that a unit hangs into the graph, and the cells that they make.
//!
//! ```text
//!   anchor Var [1] ─ Done ─▶ token "" ─ Done ─▶ token "blocks" ─ Done ─▶ token "blocks.0" ─ ParamGrad ─▶ parameter cell
//!   unit inputs ─ InputToken ─▶ [1] ┐
//!   unit output ────────────────────┴ UnitOut ─▶ output                                                  (identity)
//! ```
//!
//! candle has no module hooks, but a custom op's `bwd` runs at its place in backprop's order: `UnitOut`'s before any
//! op of the unit, `ParamGrad`'s with the complete gradient of its parameter, `Done`'s after all that lies below its
//! name. The ops only call the unit; what happens then is in `unit.rs`. There is a token for every level of names, so
//! that which of them are units may be decided once all parameters are known.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, DType, Device, InplaceOp1, Layout, Shape, Storage, Tensor, Var, bail,
};

use crate::Error;
use crate::checkpointed::is_beyond_rerun;
use crate::port::ParamPort;
use crate::unit::Unit;

/// The place of a name in the tree of names: what the ops know of the unit of that name, which is built after them.
#[derive(Debug)]
pub(crate) struct UnitSlot {
    name: String,
    /// Unset until the model is built; then the unit, if the name is one's.
    unit: OnceLock<Option<Weak<Unit>>>,
}

impl UnitSlot {
    pub(crate) fn new(name: String) -> Arc<Self> {
        Arc::new(Self { name, unit: OnceLock::new() })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Says what the name is once the model is built: a unit, or none.
    pub(crate) fn set(&self, unit: Option<&Arc<Unit>>) {
        // A builder builds once, so the slot is empty here.
        let _ = self.unit.set(unit.map(Arc::downgrade));
    }

    /// The unit of this name while its `Fsdp` lives; `None` if the name is no unit's.
    pub(crate) fn get(&self) -> crate::Result<Option<Arc<Unit>>> {
        match self.unit.get() {
            None => Err(Error::NotBuilt { unit: self.name.clone() }),
            Some(None) => Ok(None),
            Some(Some(unit)) => self.alive(unit).map(Some),
        }
    }

    fn alive(&self, unit: &Weak<Unit>) -> crate::Result<Arc<Unit>> {
        unit.upgrade().ok_or_else(|| Error::Dropped { unit: self.name.clone() })
    }

    /// Calls the unit, if the name is one's.
    fn call(&self, f: impl FnOnce(&Unit) -> crate::Result<()>) -> candle_core::Result<()> {
        match self.get().map_err(candle_core::Error::wrap)? {
            None => Ok(()),
            Some(unit) => f(&unit).map_err(|error| unit.pass.failure.keep(error)),
        }
    }
}

/// Where the gradient of one parameter goes: its unit and its index there, known once the model is built.
#[derive(Debug)]
pub(crate) struct ParamSlot {
    fqn: String,
    place: OnceLock<(Weak<Unit>, usize)>,
}

impl ParamSlot {
    pub(crate) fn new(fqn: String) -> Arc<Self> {
        Arc::new(Self { fqn, place: OnceLock::new() })
    }

    pub(crate) fn set(&self, unit: &Arc<Unit>, index: usize) {
        // A builder builds once, so the slot is empty here.
        let _ = self.place.set((Arc::downgrade(unit), index));
    }

    /// Adds `gradient` to the parameter's gradient of this backward.
    pub(crate) fn add_gradient(&self, gradient: &Tensor) -> candle_core::Result<()> {
        let (unit, index) = self.place()?;
        unit.add_gradient(index, gradient).map_err(|error| unit.pass.failure.keep(error))
    }

    /// Whether nobody wants the parameter's gradient.
    pub(crate) fn is_frozen(&self) -> candle_core::Result<bool> {
        let (unit, index) = self.place()?;
        Ok(unit.flat.params()[index].frozen)
    }

    fn place(&self) -> candle_core::Result<(Arc<Unit>, usize)> {
        let Some((unit, index)) = self.place.get() else {
            return Err(candle_core::Error::wrap(Error::NotBuilt { unit: self.fqn.clone() }));
        };
        let dropped = || candle_core::Error::wrap(Error::Dropped { unit: self.fqn.clone() });
        Ok((unit.upgrade().ok_or_else(dropped)?, *index))
    }
}

/// The first error of a unit inside candle, kept as the type it was: candle hands on text only.
#[derive(Debug, Default)]
pub(crate) struct Failure(Mutex<Option<Error>>);

impl Failure {
    /// Keeps `error` and returns what candle shall report meanwhile.
    pub(crate) fn keep(&self, error: Error) -> candle_core::Error {
        let shown = candle_core::Error::Msg(error.to_string());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        shown
    }

    pub(crate) fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The token of the whole model, on the device of its parameters.
pub(crate) fn root_token(slot: &Arc<UnitSlot>, device: &Device) -> candle_core::Result<Tensor> {
    token_below(Var::zeros(1, DType::F32, device)?.as_tensor(), slot)
}

/// The token of a name: where the gradients of all parameters below it meet. `parent` is the token of the name without
/// its last component.
pub(crate) fn token_below(parent: &Tensor, slot: &Arc<UnitSlot>) -> candle_core::Result<Tensor> {
    parent.apply_op1(Done(slot.clone()))
}

/// A parameter of the model: a tensor of `shape` whose storage comes and goes. It starts freed.
pub(crate) fn parameter_cell(
    token: &Tensor,
    slot: &Arc<ParamSlot>,
    shape: Shape,
    dtype: DType,
) -> candle_core::Result<Tensor> {
    let port = ParamPort::new(slot, token);
    let cell = token.apply_op1(ParamGrad { port: port.clone(), shape, dtype })?;
    port.register(&cell);
    swap_storage(&cell, freed(cell.device())?)?;
    Ok(cell)
}

/// Storage of a freed parameter. F4 has no kernels, so that any op on it is an error; an empty F32 vector would be
/// read out of bounds by gemm, which takes raw pointers.
pub(crate) fn freed(device: &Device) -> candle_core::Result<Storage> {
    match device {
        Device::Cpu => Ok(Storage::Cpu(CpuStorage::F4(Vec::new()))),
        other => freed_elsewhere(other),
    }
}

#[cfg(feature = "cuda")]
fn freed_elsewhere(device: &Device) -> candle_core::Result<Storage> {
    match device {
        Device::Cuda(device) => crate::cuda::freed(device).map(Storage::Cuda),
        other => bail!("no parameter lies on {:?}", other.location()),
    }
}

#[cfg(not(feature = "cuda"))]
fn freed_elsewhere(device: &Device) -> candle_core::Result<Storage> {
    bail!("no parameter lies on {:?}: this build is for the CPU", device.location())
}

/// Replaces the storage of a tensor, for all who share it, and returns the old one.
pub(crate) fn swap_storage(cell: &Tensor, new: Storage) -> candle_core::Result<Storage> {
    let op = Swap(Mutex::new(new));
    cell.inplace_op1(&op)?;
    Ok(op.0.into_inner().unwrap_or_else(PoisonError::into_inner))
}

struct Swap(Mutex<Storage>);

impl InplaceOp1 for Swap {
    fn name(&self) -> &'static str {
        "fsdp-swap"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _layout: &Layout) -> candle_core::Result<()> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Storage::Cpu(new) => std::mem::swap(storage, new),
            new => bail!("a cell on the CPU got storage on {:?}", new.device().location()),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _layout: &Layout) -> candle_core::Result<()> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Storage::Cuda(new) => std::mem::swap(storage, new),
            new => bail!("a cell on a CUDA device got storage on {:?}", new.device().location()),
        }
        Ok(())
    }
}

struct Done(Arc<UnitSlot>);

impl CustomOp1 for Done {
    fn name(&self) -> &'static str {
        "fsdp-unit-done"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, parent: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::order(&parent.device)?, Shape::from(1)))
    }

    fn bwd(&self, parent: &Tensor, _token: &Tensor, _grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !is_beyond_rerun(self.0.name()) {
            self.0.call(Unit::post_backward)?;
        }
        // candle needs a gradient for every node that it walks, except for variables.
        if parent.is_variable() { Ok(None) } else { Ok(Some(parent.zeros_like()?)) }
    }
}

struct ParamGrad {
    port: Arc<ParamPort>,
    shape: Shape,
    dtype: DType,
}

impl CustomOp1 for ParamGrad {
    fn name(&self) -> &'static str {
        "fsdp-parameter"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let storage = match self.dtype {
            DType::F32 => CpuStorage::F32(Vec::new()),
            DType::F16 => CpuStorage::F16(Vec::new()),
            DType::BF16 => CpuStorage::BF16(Vec::new()),
            other => bail!("no parameter is gathered in {other:?}"),
        };
        Ok((storage, self.shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, token: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::typed(&token.device, self.dtype)?, self.shape.clone()))
    }

    fn bwd(&self, token: &Tensor, _cell: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.port.add_gradient(grad)?;
        Ok(Some(token.zeros_like()?))
    }
}

/// Marks the outputs of a unit. With the inputs' token as first argument, candle's depth-first walk visits all that
/// is upstream before the unit's interior, so that in backward the whole interior comes before what is upstream.
pub(crate) fn mark_output(
    slot: &Arc<UnitSlot>,
    inputs: Option<&Tensor>,
    output: &Tensor,
) -> candle_core::Result<Tensor> {
    match inputs {
        Some(token) => token.apply_op2(output, UnitOut(slot.clone())),
        None => output.apply_op1(UnitOut(slot.clone())),
    }
}

struct UnitOut(Arc<UnitSlot>);

impl CustomOp1 for UnitOut {
    fn name(&self) -> &'static str {
        "fsdp-unit-out"
    }

    fn cpu_fwd(&self, output: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((copy_storage(output, layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, output: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::copy_storage(output, layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _output: &Tensor, _res: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.0.call(Unit::pre_backward)?;
        Ok(Some(grad.clone()))
    }
}

impl CustomOp2 for UnitOut {
    fn name(&self) -> &'static str {
        "fsdp-unit-out"
    }

    fn cpu_fwd(
        &self,
        _token: &CpuStorage,
        _: &Layout,
        output: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((copy_storage(output, layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _token: &CudaStorage,
        _: &Layout,
        output: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::copy_storage(output, layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        token: &Tensor,
        _output: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        self.0.call(Unit::pre_backward)?;
        Ok((Some(token.zeros_like()?), Some(grad.clone())))
    }
}

pub(crate) fn copy_storage(storage: &CpuStorage, layout: &Layout) -> candle_core::Result<CpuStorage> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("the output of a unit must be contiguous here, got {layout:?}");
    };
    Ok(match storage {
        CpuStorage::F32(v) => CpuStorage::F32(v[start..end].to_vec()),
        CpuStorage::F64(v) => CpuStorage::F64(v[start..end].to_vec()),
        CpuStorage::BF16(v) => CpuStorage::BF16(v[start..end].to_vec()),
        CpuStorage::F16(v) => CpuStorage::F16(v[start..end].to_vec()),
        other => bail!("no gradient flows through a unit output of this storage: {other:?}"),
    })
}

/// One token for all inputs that gradients flow to; it carries order, no values.
pub(crate) fn input_token(inputs: &[&Tensor]) -> candle_core::Result<Option<Tensor>> {
    let tracked = inputs.iter().filter(|x| x.track_op() && x.dtype().is_float());
    tracked.map(|x| x.apply_op1(InputToken)).try_fold(None, |sum: Option<Tensor>, token| {
        let token = token?;
        Ok(Some(match sum {
            None => token,
            Some(sum) => sum.add(&token)?,
        }))
    })
}

struct InputToken;

impl CustomOp1 for InputToken {
    fn name(&self) -> &'static str {
        "fsdp-unit-in"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, input: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::order(&input.device)?, Shape::from(1)))
    }

    fn bwd(&self, input: &Tensor, _token: &Tensor, _grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        // candle needs a gradient for every node that it walks; zero changes none.
        Ok(Some(Tensor::zeros(1, input.dtype(), input.device())?.broadcast_as(input.shape())?))
    }
}
