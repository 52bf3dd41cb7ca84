//! Checkpoints that PyTorch wrote, and what they hold: loaded whole and under worlds 1 to 4.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sconce_checkpoint::{LoadOptions, load_from, load_new_from, open};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value, chunk_range, copy_runs};

use crate::common::ranks;

/// Tensors that torch says are there, by flattened name.
pub(crate) struct Expected {
    tensors: BTreeMap<String, TensorBuf>,
    values: BTreeMap<String, serde_json::Value>,
}

pub(crate) fn expected(case: &Path) -> Expected {
    let bytes = std::fs::read(case.join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let text = format!("{:?}", view.dtype());
        let dtype = DType::ALL
            .into_iter()
            .find(|d| d.name().to_uppercase() == text)
            .unwrap_or_else(|| panic!("{text}"));
        tensors.insert(name, TensorBuf::new(dtype, view.shape(), view.data().to_vec()).unwrap());
    }
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(case.join("expected.json")).unwrap()).unwrap();
    let values = json.get("values").filter(|_| json.get("torch").is_some()).unwrap_or(&json);
    let mut flat = BTreeMap::new();
    values.as_object().unwrap().iter().for_each(|(name, value)| flatten(name.clone(), value, &mut flat));
    Expected { tensors, values: flat }
}

/// Lists and tuples become their items; names go on with their numbers.
fn flatten(name: String, value: &serde_json::Value, flat: &mut BTreeMap<String, serde_json::Value>) {
    match value.get("list").or_else(|| value.get("tuple")).and_then(|items| items.as_array()) {
        Some(items) => {
            items.iter().enumerate().for_each(|(n, item)| flatten(format!("{name}.{n}"), item, flat))
        }
        None => drop(flat.insert(name, value.clone())),
    }
}

/// The tensors and the other values of a state, by flattened name.
fn flat<'s>(
    state: &'s StateDict<'static>,
) -> (BTreeMap<String, TensorBuf>, BTreeMap<String, &'s Value<'static>>) {
    fn visit<'s>(at: String, value: &'s Value<'static>, values: &mut BTreeMap<String, &'s Value<'static>>) {
        match value {
            Value::Map(map) => map.iter().for_each(|(key, v)| visit(format!("{at}.{key}"), v, values)),
            Value::List(items) => {
                items.iter().enumerate().for_each(|(n, v)| visit(format!("{at}.{n}"), v, values))
            }
            Value::Tensor(_) => {}
            plain => drop(values.insert(at[1..].to_owned(), plain)),
        }
    }
    let mut values = BTreeMap::new();
    state.iter().for_each(|(key, value)| visit(format!(".{key}"), value, &mut values));
    let tensors = state.flat_tensors().unwrap().into_iter().map(|(name, tensor)| {
        let mut bytes = Vec::new();
        tensor.read_box(0, &mut |b| bytes.extend_from_slice(b)).unwrap();
        (name.0, TensorBuf::new(tensor.dtype(), tensor.global_shape(), bytes).unwrap())
    });
    (tensors.collect(), values)
}

#[track_caller]
fn same_value(name: &str, got: &Value<'_>, expected: &serde_json::Value) {
    let same = match (got, expected) {
        (Value::None, serde_json::Value::Null) => true,
        (Value::Int(got), expected) => expected.as_i64() == Some(*got),
        (Value::Bool(got), expected) => expected.as_bool() == Some(*got),
        (Value::Str(got), expected) => expected.as_str() == Some(got),
        (Value::Float(got), expected) => match &expected["float"] {
            serde_json::Value::String(hex) => hex_float(hex).to_bits() == got.to_bits(),
            _ => expected.as_f64() == Some(*got),
        },
        (Value::Bytes(got), expected) => {
            let bytes: Vec<u8> =
                expected["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8).collect();
            bytes == *got
        }
        _ => false,
    };
    assert!(same, "{name}: expected {expected}, got {got:?}");
}

/// Python's `float.hex`.
fn hex_float(text: &str) -> f64 {
    match text {
        "inf" => return f64::INFINITY,
        "-inf" => return f64::NEG_INFINITY,
        "nan" => return f64::NAN,
        _ => {}
    }
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (mantissa, exponent) = text.strip_prefix("0x").unwrap().split_once('p').unwrap();
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, "0"));
    let digits = u64::from_str_radix(&format!("{whole}{fraction}"), 16).unwrap();
    let scale = exponent.parse::<i32>().unwrap() - 4 * fraction.len() as i32;
    // In two steps: the least number of all is 2^-1074, and 2^1074 is none.
    let value = digits as f64 * 2f64.powi(scale / 2) * 2f64.powi(scale - scale / 2);
    if negative { -value } else { value }
}

/// The part of `whole` that rank `rank` of `world` holds: rows, columns, or all of it, by the tensor's name.
fn part(name: &str, whole: &TensorBuf, rank: usize, world: usize, filled: bool) -> TensorBuf {
    use sconce_dtensor::LocalTensor;
    let shape = whole.global_shape().to_vec();
    let mut bounds = TensorBox::whole(&shape);
    if !shape.is_empty() && !name.len().is_multiple_of(4) {
        let dim = name.len() % shape.len();
        let range = chunk_range(shape[dim], world, rank);
        (bounds.offsets[dim], bounds.sizes[dim]) = (range.start, range.len());
    }
    let size = whole.dtype().size_bytes();
    let mut bytes = vec![0u8; bounds.numel() * size];
    if filled && !bounds.is_empty() {
        for run in copy_runs(&bounds, &TensorBox::whole(&shape), &bounds) {
            let from = &whole.bytes()[run.src * size..(run.src + run.len) * size];
            bytes[run.dst * size..(run.dst + run.len) * size].copy_from_slice(from);
        }
    }
    TensorBuf::from_boxes(whole.dtype(), &shape, vec![bounds], bytes).unwrap()
}

/// Loads what is at `path` whole, and then under worlds 1 to 4.
#[track_caller]
pub(crate) fn check(path: &Path, expected: &Expected) {
    let reader = open(path).unwrap();
    let state = load_new_from(reader.as_ref(), LoadOptions::default())
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (tensors, values) = flat(&state);
    let names = |tensors: &BTreeMap<String, TensorBuf>| tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&tensors), names(&expected.tensors), "{}", path.display());
    for (name, tensor) in &expected.tensors {
        assert_eq!(tensors[name], *tensor, "{}: {name}", path.display());
    }
    let plain: Vec<&String> = values.keys().collect();
    assert_eq!(plain, expected.values.keys().collect::<Vec<_>>(), "{}", path.display());
    values.iter().for_each(|(name, value)| same_value(name, value, &expected.values[name]));
    for world in 1..=4 {
        check_world(path, expected, world);
    }
}

#[track_caller]
fn check_world(path: &Path, expected: &Expected, world: usize) {
    ranks(world, |group| {
        let rank = group.group_rank().0;
        let mut state = StateDict::new();
        for (name, whole) in &expected.tensors {
            state.insert_tensor(name.clone(), part(name, whole, rank, world, false));
        }
        let options = LoadOptions { group: Some(&group), strict: false, ..Default::default() };
        load_from(open(path).unwrap().as_ref(), &mut state, options).unwrap();
        for (name, whole) in &expected.tensors {
            let got = state.tensor::<TensorBuf>(name).unwrap();
            assert_eq!(
                *got,
                part(name, whole, rank, world, true),
                "{}: {name} on rank {rank} of {world}",
                path.display()
            );
        }
    });
}

/// What torch wrote of a case: a directory or a file.
pub(crate) fn checkpoint_of(case: &Path) -> PathBuf {
    let names = ["checkpoint", "checkpoint.pt", "checkpoint.safetensors"];
    let found = names.map(|name| case.join(name)).into_iter().find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{}: no checkpoint", case.display()))
}
