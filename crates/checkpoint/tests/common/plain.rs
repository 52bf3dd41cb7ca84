//! Random states for tests that write them somewhere and read them again.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use proptest::prelude::*;
use sconce_dtensor::{DType, StateDict, TensorBuf, Value};

/// A state that owns its tensors, from plain values that proptest can make and shrink.
#[derive(Debug, Clone)]
pub(crate) enum Plain {
    Tensor(DType, Vec<usize>, u8),
    Map(Vec<(String, Plain)>),
    List(Vec<Plain>),
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(String),
    Bytes(Vec<u8>),
    None,
}

pub(crate) fn plain() -> impl Strategy<Value = Plain> {
    let dtype = proptest::sample::select(DType::ALL.to_vec());
    let shape = proptest::collection::vec(0usize..5, 0..4);
    let leaf = prop_oneof![
        4 => (dtype, shape, any::<u8>()).prop_map(|(d, s, b)| Plain::Tensor(d, s, b)),
        1 => any::<i64>().prop_map(Plain::Int),
        1 => any::<f64>().prop_map(Plain::Float),
        1 => any::<bool>().prop_map(Plain::Bool),
        1 => ".{0,6}".prop_map(Plain::Str),
        1 => proptest::collection::vec(any::<u8>(), 0..9).prop_map(Plain::Bytes),
        1 => Just(Plain::None),
    ];
    leaf.prop_recursive(3, 24, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Plain::List),
            entries(inner).prop_map(Plain::Map),
        ]
    })
}

pub(crate) fn entries(value: impl Strategy<Value = Plain>) -> impl Strategy<Value = Vec<(String, Plain)>> {
    proptest::collection::btree_map("[a-zé][a-z0-9_]{0,5}", value, 0..5)
        .prop_map(|map| map.into_iter().collect())
}

pub(crate) fn value(plain: &Plain) -> Value<'static> {
    match plain {
        Plain::Tensor(dtype, shape, seed) => {
            let len = shape.iter().product::<usize>() * dtype.size_bytes();
            // Truth values are 0 and 1: torch reads no other.
            let byte = |i: usize| {
                if *dtype == DType::Bool { (i % 2) as u8 } else { (i as u8).wrapping_mul(37) ^ seed }
            };
            Value::Tensor(Box::new(TensorBuf::new(*dtype, shape, (0..len).map(byte).collect()).unwrap()))
        }
        Plain::Map(map) => Value::Map(state(map)),
        Plain::List(items) => Value::List(items.iter().map(value).collect()),
        Plain::Int(int) => Value::Int(*int),
        Plain::Float(float) => Value::Float(*float),
        Plain::Bool(truth) => Value::Bool(*truth),
        Plain::Str(text) => Value::Str(text.clone()),
        Plain::Bytes(bytes) => Value::Bytes(bytes.clone()),
        Plain::None => Value::None,
    }
}

pub(crate) fn state(entries: &[(String, Plain)]) -> StateDict<'static> {
    entries.iter().map(|(key, plain)| (key.clone(), value(plain))).collect()
}

/// The state as text: nesting, values, bits of floats, bytes of tensors.
pub(crate) fn text(state: &StateDict<'_>) -> String {
    map_text(state, false)
}

/// The same whatever the order of keys.
pub(crate) fn sorted_text(state: &StateDict<'_>) -> String {
    map_text(state, true)
}

fn map_text(state: &StateDict<'_>, sorted: bool) -> String {
    let mut entries: Vec<String> =
        state.iter().map(|(key, v)| format!("{key:?}: {}", value_text(v, sorted))).collect();
    if sorted {
        entries.sort();
    }
    format!("{{{}}}", entries.join(", "))
}

fn value_text(value: &Value<'_>, sorted: bool) -> String {
    match value {
        Value::Map(map) => map_text(map, sorted),
        Value::List(items) => {
            format!("{:?}", items.iter().map(|item| value_text(item, sorted)).collect::<Vec<_>>())
        }
        Value::Float(float) => format!("{:016x}", float.to_bits()),
        Value::Bytes(bytes) => format!("{bytes:?}"),
        Value::Tensor(tensor) => {
            let mut bytes = Vec::new();
            tensor.read_box(0, &mut |b| bytes.extend_from_slice(b)).unwrap();
            format!("{} {:?} {bytes:?}", tensor.dtype(), tensor.global_shape())
        }
        other => format!("{other:?}"),
    }
}
