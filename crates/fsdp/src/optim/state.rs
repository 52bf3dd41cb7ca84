//! Moments: the optimizer state that lies beside each shard, its steps, and its state dicts.

use candle_core::{Device, Tensor};
use sconce_dtensor::{LocalTensor, StateDict, Value};

use crate::error::CandleContext;
use crate::shard::Shard;
use crate::state_dict::{Loading, shard_state_dict};
use crate::{Error, Fsdp, Result, StateDictType};

/// `N` buffers beside each unit's shard, and how many steps each unit made.
#[derive(Debug)]
pub(super) struct Moments<const N: usize> {
    units: Vec<UnitMoments<N>>,
}

#[derive(Debug)]
struct UnitMoments<const N: usize> {
    step: u64,
    buffers: [Shard; N],
}

impl<const N: usize> Moments<N> {
    pub(super) fn new(fsdp: &Fsdp) -> Self {
        let zeroed = |numel| UnitMoments { step: 0, buffers: std::array::from_fn(|_| Shard::zeros(numel)) };
        Self { units: fsdp.units.iter().map(|unit| zeroed(unit.flat.shard_numel())).collect() }
    }

    /// Calls `update(factors, parameters, gradient, buffers)` for every block of every unit that has a gradient, with
    /// the `factors(step)` of the unit's step, which counts from 1.
    pub(super) fn update<F>(
        &mut self,
        fsdp: &Fsdp,
        factors: impl Fn(u64) -> F,
        mut update: impl FnMut(&F, &mut [f32], &[f32], [&mut [f32]; N]),
    ) -> Result<()> {
        fsdp.reshard()?;
        for (unit, moments) in fsdp.units.iter().zip(&mut self.units) {
            let Some(gradient) = unit.take_gradient() else { continue };
            moments.step += 1;
            let factors = factors(moments.step);
            unit.shard.update(&moments.buffers, |range, param, buffers| {
                update(&factors, param, &gradient[range], buffers);
            });
        }
        Ok(())
    }

    /// `{"state": {fqn: {"step": …, names[i]: …}}, "param_groups": [group]}`.
    pub(super) fn state_dict(
        &self,
        fsdp: &Fsdp,
        kind: StateDictType,
        names: [&str; N],
        group: StateDict<'static>,
    ) -> Result<StateDict<'static>> {
        let mut state = StateDict::new();
        for (unit, moments) in fsdp.units.iter().zip(&self.units) {
            for param in unit.flat.params() {
                let step = Tensor::new(moments.step as f32, &Device::Cpu).during(|| "step".to_owned())?;
                state.insert(&*param.fqn, StateDict::from_iter([("step", Value::try_from(&step)?)]));
            }
        }
        for (nth, name) in names.into_iter().enumerate() {
            let mut moments = shard_state_dict(fsdp, &self.buffers(nth), kind)?;
            for (fqn, entry) in state.iter_mut() {
                if let (Value::Map(entry), Some(moment)) = (entry, moments.remove(fqn)) {
                    entry.insert(name, moment);
                }
            }
        }
        let groups = Value::List(vec![Value::Map(group)]);
        Ok(StateDict::from_iter([("state", Value::Map(state)), ("param_groups", groups)]))
    }

    pub(super) fn load_state_dict(
        &mut self,
        fsdp: &Fsdp,
        saved: &StateDict<'_>,
        names: [&str; N],
    ) -> Result<()> {
        let empty = StateDict::new();
        let entries = saved.map("state").unwrap_or(&empty);
        let mut loading = Loading::new(fsdp);
        for (nth, name) in names.into_iter().enumerate() {
            loading.add(&self.buffers(nth), name, |fqn| entries.map(fqn).and_then(|entry| entry.get(name)));
        }
        loading.refuse_unexpected(entries.keys());
        let steps = loading.run(saved_steps(fsdp, entries))?;
        for (moments, step) in self.units.iter_mut().zip(steps) {
            moments.step = step;
        }
        Ok(())
    }

    /// Buffer `nth` of every unit.
    fn buffers(&self, nth: usize) -> Vec<&Shard> {
        self.units.iter().map(|unit| &unit.buffers[nth]).collect()
    }
}

/// The step count of every unit: that of its first parameter.
fn saved_steps(fsdp: &Fsdp, entries: &StateDict<'_>) -> Result<Vec<u64>> {
    let step_of = |fqn: &str| -> Result<u64> {
        let missing = || Error::KeyMismatch { missing: vec![format!("{fqn}.step")], unexpected: vec![] };
        match entries.map(fqn).and_then(|entry| entry.get("step")) {
            Some(Value::Tensor(step)) => read_step(fqn, step.as_ref()),
            Some(Value::Int(step)) => Ok(u64::try_from(*step).unwrap_or(0)),
            _ => Err(missing()),
        }
    };
    let first = |unit: &std::sync::Arc<crate::unit::Unit>| match unit.flat.params().first() {
        Some(param) => step_of(&param.fqn),
        None => Ok(0),
    };
    fsdp.units.iter().map(first).collect()
}

fn read_step(fqn: &str, step: &dyn LocalTensor) -> Result<u64> {
    let mut read = None;
    if step.local_boxes().len() == 1 {
        step.read_box(0, &mut |bytes| read = bytes.try_into().ok().map(f32::from_le_bytes))?;
    }
    read.map(|step| step as u64).ok_or_else(|| Error::ValueMismatch {
        fqn: format!("{fqn}.step"),
        expected: "one f32".to_owned(),
        got: format!("{} {:?}", step.dtype(), step.global_shape()),
    })
}

/// The first parameter group of a saved state.
pub(super) fn param_group<'s, 'a>(saved: &'s StateDict<'a>) -> Option<&'s StateDict<'a>> {
    match saved.get("param_groups") {
        Some(Value::List(groups)) => groups.first().and_then(Value::as_map),
        _ => None,
    }
}

/// A number of the first parameter group; torch may have written an integer.
pub(super) fn hyperparameter(saved: &StateDict<'_>, name: &str) -> Option<f64> {
    let value = param_group(saved)?.get(name)?;
    value.as_float().or_else(|| value.as_int().map(|int| int as f64))
}
