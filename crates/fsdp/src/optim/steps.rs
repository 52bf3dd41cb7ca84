//! Step counts of a saved optimizer state, agreed on by all ranks: a state on one rank only is every rank's.

use std::sync::Arc;

use sconce_dtensor::{DType, LocalTensor, StateDict, Value};

use crate::unit::Unit;
use crate::{Error, Fsdp, Result};

/// How a rank without a step says so.
const NONE: u64 = u64::MAX;

/// The step count of every unit: that of its first trainable parameter, `unsaved` if it has none saved, which is an error
/// without that; 0 for a unit without parameters.
///
/// Ranks: collective over the mesh. The inner result is this rank's own verdict, for all ranks to agree on.
pub(super) fn agreed_steps(
    fsdp: &Fsdp,
    entries: &StateDict<'_>,
    unsaved: Option<u64>,
) -> Result<Result<Vec<u64>>> {
    let found = fsdp.units.iter().map(|unit| step_of(unit, entries));
    let (found, refusal) = match found.collect::<Result<Vec<Option<u64>>>>() {
        Ok(found) => (found, None),
        Err(error) => (vec![None; fsdp.units.len()], Some(error)),
    };
    let mine: Vec<u8> = found.iter().flat_map(|step| step.unwrap_or(NONE).to_le_bytes()).collect();
    let all = fsdp.groups.mesh.all_gather_object(&mine)?;
    let of_rank = |bytes: &Vec<u8>, nth: usize| {
        bytes.as_chunks::<8>().0.get(nth).map(|step| u64::from_le_bytes(*step)).filter(|step| *step != NONE)
    };
    let agreed = fsdp.units.iter().enumerate().map(|(nth, unit)| {
        match (all.iter().find_map(|bytes| of_rank(bytes, nth)), unit.flat.trainable().first()) {
            (Some(step), _) => Ok(step),
            (None, None) => Ok(0),
            (None, Some(param)) => unsaved.ok_or_else(|| {
                let missing = vec![format!("{}.step", param.fqn)];
                Error::KeyMismatch { missing, unexpected: vec![] }
            }),
        }
    });
    Ok(refusal.map_or_else(|| agreed.collect(), Err))
}

fn step_of(unit: &Arc<Unit>, entries: &StateDict<'_>) -> Result<Option<u64>> {
    let Some(param) = unit.flat.trainable().first() else { return Ok(None) };
    match entries.map(&param.fqn).and_then(|entry| entry.get("step")) {
        Some(Value::Tensor(step)) => read_step(&param.fqn, step.as_ref()).map(Some),
        Some(Value::Int(step)) => Ok(u64::try_from(*step).ok()),
        Some(Value::Float(step)) => Ok(Some(*step as u64)),
        _ => Ok(None),
    }
}

fn read_step(fqn: &str, step: &dyn LocalTensor) -> Result<u64> {
    let mut read = None;
    if step.local_boxes().len() == 1 {
        step.read_box(0, &mut |bytes| {
            read = match step.dtype() {
                DType::F32 => bytes.try_into().ok().map(|b| f32::from_le_bytes(b) as u64),
                DType::I64 => bytes.try_into().ok().and_then(|b| u64::try_from(i64::from_le_bytes(b)).ok()),
                _ => None,
            }
        })?;
    }
    read.ok_or_else(|| Error::ValueMismatch {
        fqn: format!("{fqn}.step"),
        expected: "one f32 or i64".to_owned(),
        got: format!("{} {:?}", step.dtype(), step.global_shape()),
    })
}
