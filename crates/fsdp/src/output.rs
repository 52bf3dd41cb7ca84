//! UnitOutput: what a unit's forward may return.

use candle_core::{Result, Tensor};

/// A value made of tensors, each of which a unit can mark as its output.
pub trait UnitOutput: Sized {
    /// The same value with every tensor replaced by what `f` makes of it, in order.
    ///
    /// # Errors
    /// Whatever `f` returns.
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self>;
}

impl UnitOutput for Tensor {
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        f(self)
    }
}

macro_rules! tuple_outputs {
    ($(($($name:ident $index:tt),+)),+) => {$(
        impl<$($name: UnitOutput),+> UnitOutput for ($($name,)+) {
            fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
                Ok(($(self.$index.map_tensors(f)?,)+))
            }
        }
    )+};
}

tuple_outputs!((A 0, B 1), (A 0, B 1, C 2), (A 0, B 1, C 2, D 3));

impl<A: UnitOutput> UnitOutput for Vec<A> {
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        self.into_iter().map(|item| item.map_tensors(f)).collect()
    }
}

impl<A: UnitOutput> UnitOutput for Option<A> {
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        self.map(|item| item.map_tensors(f)).transpose()
    }
}
