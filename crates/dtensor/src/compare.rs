//! Whether two DTensors hold the same values, whatever their layouts.

use candle_core::Tensor;
use sconce_mesh::ReduceOp;

use crate::candle_bytes::read_bytes;
use crate::error::CandleContext;
use crate::{DTensor, Result};

impl DTensor {
    /// True if both have the same shape, dtype and bits, under whatever placements and meshes of the same ranks. The same
    /// answer on every rank.
    ///
    /// Ranks: collective over the mesh of `self`.
    ///
    /// # Errors
    /// Whatever the collectives report.
    ///
    /// # Source
    /// `torch.equal`; a NaN equals itself here, and 0 differs from −0.
    pub fn equal(&self, other: &DTensor) -> Result<bool> {
        if self.shape() != other.shape() || self.spec().dtype != other.spec().dtype {
            return Ok(false);
        }
        self.compare(other, |a, b| {
            let mut equal = false;
            read_bytes(a, &mut |a| {
                let compared = read_bytes(b, &mut |b| equal = a == b);
                equal = equal && compared.is_ok();
            })?;
            Ok(equal)
        })
    }

    /// True if both have the same shape and each value of `self` is within `atol + rtol · |other|` of the other's. The
    /// same answer on every rank.
    ///
    /// Ranks: collective over the mesh of `self`.
    ///
    /// # Errors
    /// Whatever the collectives report; `Candle` for dtypes that do not convert to f64.
    ///
    /// # Source
    /// `torch.allclose`.
    pub fn allclose(&self, other: &DTensor, rtol: f64, atol: f64) -> Result<bool> {
        if self.shape() != other.shape() {
            return Ok(false);
        }
        self.compare(other, |a, b| {
            let values = |t: &Tensor| {
                let flat =
                    t.to_dtype(candle_core::DType::F64).and_then(|t| t.flatten_all()?.to_vec1::<f64>());
                flat.during(|| format!("comparing tensors of shape {:?}", self.shape()))
            };
            Ok(values(a)?
                .iter()
                .zip(values(b)?)
                .all(|(a, b)| a == &b || (a - b).abs() <= atol + rtol * b.abs()))
        })
    }

    /// Compares what each rank holds, and asks all ranks.
    fn compare(&self, other: &DTensor, same: impl FnOnce(&Tensor, &Tensor) -> Result<bool>) -> Result<bool> {
        // Terms may differ where their sums agree.
        let whole = self.redistribute(&crate::grad::grad_placements(self.placements()))?;
        let other = other.redistribute_to(whole.device_mesh(), whole.placements())?;
        let mut all = [u8::from(same(whole.to_local(), other.to_local())?)];
        self.device_mesh().mesh_group().all_reduce(&mut all, ReduceOp::Min)?;
        Ok(all == [1])
    }
}
