//! Summoning: all parameters whole for a moment, to read or to change.

use std::collections::HashMap;

use candle_core::Tensor;

use crate::error::CandleContext;
use crate::mixed_precision::{cast, slice_of};
use crate::unit::Unit;
use crate::{Error, Fsdp, Result};

/// Whole parameters by name, while they are summoned.
///
/// They are the model's own tensors, in the dtype that it computes in: the model may run meanwhile.
#[derive(Debug)]
pub struct FullParams<'f> {
    params: HashMap<&'f str, &'f Tensor>,
}

impl FullParams<'_> {
    /// The parameter of this name.
    pub fn get(&self, fqn: &str) -> Option<&Tensor> {
        self.params.get(fqn).copied()
    }

    /// Names and tensors, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.params.iter().map(|(fqn, tensor)| (*fqn, *tensor))
    }
}

impl Fsdp {
    /// Runs `f` while every parameter is whole on every rank.
    ///
    /// Ranks: collective over the shard group.
    ///
    /// # Errors
    /// A failed collective, or what `f` returns.
    ///
    /// # Source
    /// `FullyShardedDataParallel.summon_full_params(writeback=False)`.
    pub fn summon_full_params<R>(
        &self,
        f: impl FnOnce(&FullParams<'_>) -> candle_core::Result<R>,
    ) -> Result<R> {
        self.units.iter().try_for_each(|unit| unit.unshard())?;
        let named = self.units.iter().flat_map(|unit| unit.flat.params().iter().zip(unit.cells()));
        let params = named.map(|(param, cell)| (param.fqn.as_str(), cell)).collect();
        let outcome = f(&FullParams { params });
        self.reshard()?;
        self.pass.buffers.forget();
        self.typed(outcome, "with summoned parameters")
    }

    /// As [`Fsdp::summon_full_params`]; the tensors that `f` returns by name become the parameters' values. Every rank
    /// takes its own shard from its own tensors, so that all should return the same. Under mixed precision what is
    /// summoned is rounded to the dtype that the model computes in, and so is what is made of it.
    ///
    /// Ranks: collective over the shard group. Nothing changes on this rank if it fails.
    ///
    /// # Errors
    /// As [`Fsdp::summon_full_params`]; `KeyMismatch` for a name that is no parameter's, `ValueMismatch` for another
    /// shape.
    ///
    /// # Source
    /// `FullyShardedDataParallel.summon_full_params(writeback=True)`.
    pub fn rewrite_full_params(
        &self,
        f: impl FnOnce(&FullParams<'_>) -> candle_core::Result<HashMap<String, Tensor>>,
    ) -> Result<()> {
        // Copies: what `f` hands back as it was is freed as soon as it returns.
        let new = self.summon_full_params(|params| {
            let copy = |(fqn, tensor): (String, Tensor)| Ok((fqn, tensor.copy()?));
            f(params)?.into_iter().map(copy).collect::<candle_core::Result<HashMap<_, _>>>()
        })?;
        let of_name = |fqn: &str| {
            let mut all = self
                .units
                .iter()
                .flat_map(|unit| unit.flat.params().iter().enumerate().map(move |p| (unit, p)));
            all.find(|(_, (_, param))| param.fqn == fqn).map(|(unit, (index, _))| (unit, index))
        };
        let mut writes = Vec::new();
        for (fqn, tensor) in &new {
            let Some((unit, index)) = of_name(fqn) else {
                return Err(Error::KeyMismatch { missing: vec![], unexpected: vec![fqn.clone()] });
            };
            writes.push((unit, index, checked(unit, index, tensor)?));
        }
        writes.iter().try_for_each(|(unit, index, tensor)| write_shard(unit, *index, tensor))
    }
}

/// The tensor as f32, if it has the parameter's shape.
fn checked(unit: &Unit, index: usize, tensor: &Tensor) -> Result<Tensor> {
    let param = &unit.flat.params()[index];
    if tensor.dims() != param.shape {
        let (expected, got) = (format!("{:?}", param.shape), format!("{:?}", tensor.dims()));
        return Err(Error::ValueMismatch { fqn: param.fqn.clone(), expected, got });
    }
    let host = tensor.to_device(&candle_core::Device::Cpu).during(|| param.fqn.clone())?;
    cast(&host, candle_core::DType::F32, || param.fqn.clone())
}

fn write_shard(unit: &Unit, index: usize, tensor: &Tensor) -> Result<()> {
    let run = unit.flat.run(index, unit.shard_index());
    let (storage, layout) = tensor.storage_and_layout();
    let values: &[f32] = slice_of(&storage, layout)
        .unwrap_or_else(|| unreachable!("it was cast to contiguous f32 on the CPU"));
    let values = &values[run.param_offset..run.param_offset + run.len];
    unit.shard.write(|shard| shard[run.shard_offset..run.shard_offset + run.len].copy_from_slice(values));
    Ok(())
}
