//! Param: a parameter of a fused module, read in forward and given its gradient in backward.

use std::sync::Arc;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};

use crate::port::ParamPort;

/// A parameter that an op reads without necessarily having it among its arguments.
#[derive(Debug, Clone)]
pub(super) struct Param {
    tensor: Tensor,
    /// That of a sharded parameter.
    port: Option<Arc<ParamPort>>,
}

impl Param {
    pub(super) fn new(tensor: Tensor) -> Self {
        let port = ParamPort::of(&tensor);
        Self { tensor, port }
    }

    /// The parameter as a model knows it.
    pub(super) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Its values, outside any graph.
    pub(super) fn values(&self) -> Tensor {
        self.tensor.detach()
    }

    /// What the op takes as its argument: the token of a sharded parameter, any other itself.
    pub(super) fn argument(&self) -> &Tensor {
        self.port.as_ref().map_or(&self.tensor, |port| port.token())
    }

    /// Lends the values in forward, where `argument` is what candle lends for [`Param::argument`].
    pub(super) fn lend<R>(
        &self,
        argument: (&CpuStorage, &Layout),
        f: impl FnOnce((&CpuStorage, &Layout)) -> Result<R>,
    ) -> Result<R> {
        if self.port.is_none() {
            return f(argument);
        }
        let (storage, layout) = self.tensor.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => f((storage, layout)),
            _ => candle_core::bail!("a sharded parameter of a fused module must be on the CPU"),
        }
    }

    /// Takes what `gradient` computes, if anyone wants it, and returns what backward returns for the argument.
    pub(super) fn backward(&self, gradient: impl FnOnce() -> Result<Tensor>) -> Result<Option<Tensor>> {
        match &self.port {
            Some(port) => {
                if !port.is_frozen()? {
                    port.add_gradient(&gradient()?)?;
                }
                Ok(Some(port.token().zeros_like()?.detach()))
            }
            None if self.tensor.track_op() => gradient().map(Some),
            None => Ok(None),
        }
    }
}
