//! ParamPort: how a fused op, which is given a parameter as a plain tensor, finds the unit that wants its gradient.
//!
//! candle adds every gradient that an op returns to a zeroed buffer of its own. A fused op therefore does not take a
//! sharded parameter as its argument: it takes the parameter's token, one element that puts the op at its place in
//! backward's order, and hands the gradient to the unit itself.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::{Tensor, TensorId};

use crate::cell::ParamSlot;

/// Where the gradient of one parameter cell goes.
#[derive(Debug)]
pub(crate) struct ParamPort {
    slot: Arc<ParamSlot>,
    token: Tensor,
}

/// The ports of all cells that live, by the cell's tensor. Tensors carry nothing else that a module, which gets them
/// from candle's var builder, could find its unit by.
static PORTS: LazyLock<Mutex<HashMap<TensorId, Weak<ParamPort>>>> = LazyLock::new(Mutex::default);

impl ParamPort {
    /// The port of a parameter whose name lies below that of `token`.
    pub(crate) fn new(slot: &Arc<ParamSlot>, token: &Tensor) -> Arc<Self> {
        Arc::new(Self { slot: slot.clone(), token: token.clone() })
    }

    /// Lets [`ParamPort::of`] find the port by its cell, for as long as someone holds the port.
    pub(crate) fn register(self: &Arc<Self>, cell: &Tensor) {
        let mut ports = ports();
        ports.retain(|_, port| port.strong_count() > 0);
        ports.insert(cell.id(), Arc::downgrade(self));
    }

    /// The port of a parameter cell; `None` for any other tensor.
    pub(crate) fn of(tensor: &Tensor) -> Option<Arc<Self>> {
        ports().get(&tensor.id()).and_then(Weak::upgrade)
    }

    /// What stands for the parameter among an op's arguments.
    pub(crate) fn token(&self) -> &Tensor {
        &self.token
    }

    /// Adds `gradient` to the parameter's gradient of this backward.
    pub(crate) fn add_gradient(&self, gradient: &Tensor) -> candle_core::Result<()> {
        self.slot.add_gradient(gradient)
    }

    /// Whether nobody wants the parameter's gradient.
    pub(crate) fn is_frozen(&self) -> candle_core::Result<bool> {
        self.slot.is_frozen()
    }
}

fn ports() -> MutexGuard<'static, HashMap<TensorId, Weak<ParamPort>>> {
    PORTS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Shape};

    use super::*;
    use crate::cell::{UnitSlot, parameter_cell, root_token};

    #[test]
    fn a_cell_is_known_while_it_lives_and_its_views_are_not() {
        let token = root_token(&UnitSlot::new(String::new()), &Device::Cpu).unwrap();
        let slot = ParamSlot::new("weight".to_owned());
        let cell = parameter_cell(&token, &slot, Shape::from((2, 2)), candle_core::DType::F32).unwrap();
        let port = ParamPort::of(&cell.clone()).unwrap();
        assert_eq!((Arc::as_ptr(&port.slot), port.token.id()), (Arc::as_ptr(&slot), token.id()));
        assert!(ParamPort::of(&cell.t().unwrap()).is_none());
        assert!(ParamPort::of(&Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap()).is_none());
        let id = cell.id();
        drop((cell, port));
        assert!(ports().get(&id).and_then(Weak::upgrade).is_none());
    }
}
