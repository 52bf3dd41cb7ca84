//! Moments: the optimizer state that lies beside each shard, its steps, and its state dicts.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use sconce_dtensor::{StateDict, Value};

use super::configs::{Configs, Hyper};
use super::groups::{ParamGroup, group_of, runs};
use super::steps::agreed_steps;
use crate::error::CandleContext;
use crate::pass::Pass;
use crate::shard::Shard;
use crate::state_dict::{Loading, ShardView, shard_state_dict};
use crate::{Error, Fsdp, Result, StateDictType};

/// `N` buffers beside each unit's trainable parameters, and how many steps each unit made.
#[derive(Debug)]
pub(super) struct Moments<const N: usize> {
    /// Whose shards these lie beside.
    pass: Arc<Pass>,
    units: Vec<UnitMoments<N>>,
    /// Names of the parameters of each group.
    params: Vec<Vec<String>>,
}

#[derive(Debug)]
struct UnitMoments<const N: usize> {
    step: u64,
    buffers: [Shard; N],
    /// Which elements have which group's hyperparameters.
    runs: Vec<(Range<usize>, usize)>,
}

impl<const N: usize> Moments<N> {
    /// Zeroed, for the optimizer's own group and `groups`.
    pub(super) fn new<C>(fsdp: &Fsdp, groups: &[ParamGroup<C>]) -> Self {
        let mut params = vec![Vec::new(); groups.len() + 1];
        for param in fsdp.units.iter().flat_map(|unit| unit.flat.trainable()) {
            params[group_of(groups, param)].push(param.fqn.clone());
        }
        let zeroed = |unit: &Arc<crate::unit::Unit>| UnitMoments {
            step: 0,
            buffers: std::array::from_fn(|_| Shard::zeros(unit.flat.trainable_shard_numel())),
            runs: runs(&unit.flat, unit.shard_index(), |param| group_of(groups, param)),
        };
        Self { pass: fsdp.pass.clone(), units: fsdp.units.iter().map(zeroed).collect(), params }
    }

    /// Calls `update(factors, parameters, gradient, buffers)` for every block of every unit that has a gradient, with
    /// the `factors(step, group)` of the unit's step, which counts from 1, and of the elements' group.
    pub(super) fn update<F: Sync>(
        &mut self,
        fsdp: &Fsdp,
        factors: impl Fn(u64, usize) -> F,
        update: impl Fn(&F, &mut [f32], &[f32], [&mut [f32]; N]) + Sync,
    ) -> Result<()> {
        if !Arc::ptr_eq(&self.pass, &fsdp.pass) {
            return Err(Error::OtherModel);
        }
        fsdp.reshard()?;
        for (unit, moments) in fsdp.units.iter().zip(&mut self.units) {
            let Some(gradient) = unit.take_gradient() else { continue };
            moments.step += 1;
            let UnitMoments { step, buffers, runs } = moments;
            let factors: Vec<F> = (0..self.params.len()).map(|group| factors(*step, group)).collect();
            unit.shard.update(gradient.len(), buffers, |block, param, mut buffers| {
                for (run, group) in runs.iter() {
                    let both = run.start.max(block.start)..run.end.min(block.end);
                    if both.is_empty() {
                        continue;
                    }
                    let here = both.start - block.start..both.end - block.start;
                    let buffers = buffers.each_mut().map(|buffer| &mut buffer[here.clone()]);
                    update(&factors[*group], &mut param[here], &gradient[both], buffers);
                }
            });
            unit.give_gradient(gradient);
        }
        Ok(())
    }

    /// `{"state": {fqn: {"step": …, names[i]: …}}, "param_groups": [{"params": […], …}]}`; `groups` are the hyperparameters.
    pub(super) fn state_dict(
        &self,
        fsdp: &Fsdp,
        kind: StateDictType,
        names: [&str; N],
        groups: impl Iterator<Item = StateDict<'static>>,
    ) -> Result<StateDict<'static>> {
        let mut state = StateDict::new();
        for (unit, moments) in fsdp.units.iter().zip(&self.units) {
            for param in unit.flat.trainable() {
                let step = Tensor::new(moments.step as f32, &Device::Cpu).during(|| "step".to_owned())?;
                state.insert(&*param.fqn, StateDict::from_iter([("step", Value::try_from(&step)?)]));
            }
        }
        for (nth, name) in names.into_iter().enumerate() {
            let mut moments = shard_state_dict(fsdp, &self.views(fsdp, nth), kind)?;
            for (fqn, entry) in state.iter_mut() {
                if let (Value::Map(entry), Some(moment)) = (entry, moments.remove(fqn)) {
                    entry.insert(name, moment);
                }
            }
        }
        if kind == StateDictType::FullOnFirstRank && fsdp.groups.mesh.group_rank().0 != 0 {
            return Ok(StateDict::new());
        }
        let group = |(mut group, names): (StateDict<'static>, &Vec<String>)| {
            let names = names.iter().map(|fqn| Value::from(fqn.as_str())).collect();
            group.insert("params", Value::List(names));
            Value::Map(group)
        };
        let groups = Value::List(groups.zip(&self.params).map(group).collect());
        Ok(StateDict::from_iter([("state", Value::Map(state)), ("param_groups", groups)]))
    }

    /// `configs` with what a saved state says of them.
    ///
    /// # Errors
    /// `OtherModel`; as [`Configs::loaded`].
    pub(super) fn loaded_configs<C: Hyper>(
        &self,
        fsdp: &Fsdp,
        saved: &StateDict<'_>,
        configs: &Configs<C>,
    ) -> Result<Configs<C>> {
        if !Arc::ptr_eq(&self.pass, &fsdp.pass) {
            return Err(Error::OtherModel);
        }
        configs.loaded(fsdp, saved, &self.params)
    }

    /// Takes buffers and steps; `unsaved_step` where none was saved, which is an error without that.
    pub(super) fn load_state_dict(
        &mut self,
        fsdp: &Fsdp,
        saved: &StateDict<'_>,
        names: [&str; N],
        unsaved_step: Option<u64>,
    ) -> Result<()> {
        if !Arc::ptr_eq(&self.pass, &fsdp.pass) {
            return Err(Error::OtherModel);
        }
        let empty = StateDict::new();
        let entries = saved.map("state").unwrap_or(&empty);
        let mut loading = Loading::new(fsdp, true);
        for (nth, name) in names.into_iter().enumerate() {
            let found = |fqn: &str| entries.map(fqn).and_then(|entry| entry.get(name));
            loading.add(&self.views(fsdp, nth), name, found)?;
        }
        loading.note_unexpected(entries.keys());
        let steps = agreed_steps(fsdp, entries, unsaved_step)?;
        let (steps, refusal) = match steps {
            Ok(steps) => (steps, Ok(())),
            Err(error) => (vec![], Err(error)),
        };
        loading.run(refusal)?;
        for (moments, step) in self.units.iter_mut().zip(steps) {
            moments.step = step;
        }
        Ok(())
    }

    /// Buffer `nth` of every unit.
    fn views<'f>(&'f self, fsdp: &'f Fsdp, nth: usize) -> Vec<ShardView<'f>> {
        let view = |(unit, moments): (&'f Arc<crate::unit::Unit>, &'f UnitMoments<N>)| ShardView {
            unit,
            shard: &moments.buffers[nth],
            params: unit.flat.trainable(),
        };
        fsdp.units.iter().zip(&self.units).map(view).collect()
    }
}

impl Moments<0> {
    /// The same with a zeroed buffer, beside the shards of the model that it was made for.
    pub(super) fn with_buffer(&self, fsdp: &Fsdp) -> Moments<1> {
        let with_buffer = |(unit, moments): (&Arc<crate::unit::Unit>, &UnitMoments<0>)| UnitMoments {
            step: moments.step,
            buffers: [Shard::zeros(unit.flat.trainable_shard_numel())],
            runs: moments.runs.clone(),
        };
        let units = fsdp.units.iter().zip(&self.units).map(with_buffer).collect();
        Moments { pass: self.pass.clone(), units, params: self.params.clone() }
    }
}

/// A number of a parameter group; torch may have written an integer.
pub(crate) fn number(group: &StateDict<'_>, name: &str) -> Option<f64> {
    let value = group.get(name)?;
    value.as_float().or_else(|| value.as_int().map(|int| int as f64))
}

/// A truth value of a parameter group.
pub(super) fn truth(group: &StateDict<'_>, name: &str) -> Option<bool> {
    match group.get(name)? {
        Value::Bool(truth) => Some(*truth),
        _ => None,
    }
}
