//! StateDict: named, nested state, where fsdp and checkpoint meet without naming each other.
//! It holds values; it neither saves nor communicates.

use std::fmt;

use crate::{Error, LocalTensor, OrderedMap, Result};

/// A flattened, dotted name: `model.net1.weight`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fqn(pub String);

impl Fqn {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn child(&self, key: &str) -> Fqn {
        if self.0.is_empty() { Fqn(key.to_owned()) } else { Fqn(format!("{}.{key}", self.0)) }
    }
}

impl fmt::Display for Fqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Named state in insertion order: tensors, numbers, text, and nested maps and lists of them.
///
/// Nested names flatten to dotted ones (`{"model": {"w": …}}` is `model.w`, list items are numbered).
/// The lifetime is that of borrowed tensors; state that owns its tensors is `StateDict<'static>`.
///
/// # Source
/// The nested dicts of `torch.distributed.checkpoint` (`_nested_dict.py`).
///
/// ```
/// use sconce_dtensor::StateDict;
///
/// let mut state = StateDict::new();
/// state.insert("step", 7i64);
/// state.insert("lr", 0.1);
/// assert_eq!(state.get("step").and_then(|v| v.as_int()), Some(7));
/// ```
#[derive(Default)]
pub struct StateDict<'a> {
    entries: OrderedMap<String, Value<'a>>,
}

/// One value of a [`StateDict`].
pub enum Value<'a> {
    /// A tensor, or this rank's part of one.
    Tensor(Box<dyn LocalTensor + 'a>),
    /// Nested names.
    Map(StateDict<'a>),
    /// Items in order.
    List(Vec<Value<'a>>),
    /// An integer.
    Int(i64),
    /// A number; every bit is kept, NaN payloads included.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Str(String),
    /// Bytes without meaning to Sconce.
    Bytes(Vec<u8>),
    /// Python's `None`.
    None,
}

impl<'a> StateDict<'a> {
    /// An empty state dict.
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters `value` under `key` and returns what it replaced.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value<'a>>) -> Option<Value<'a>> {
        self.entries.insert(key.into(), value.into())
    }

    /// Enters a tensor under `key` and returns what it replaced.
    pub fn insert_tensor(
        &mut self,
        key: impl Into<String>,
        tensor: impl LocalTensor + 'a,
    ) -> Option<Value<'a>> {
        self.entries.insert(key.into(), Value::Tensor(Box::new(tensor)))
    }

    /// The value under a key of this level.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.entries.get(key)
    }

    /// The value under a key of this level, to change it.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Value<'a>> {
        self.entries.get_mut(key)
    }

    /// Removes and returns the value under a key of this level; the others keep their order.
    pub fn remove(&mut self, key: &str) -> Option<Value<'a>> {
        self.entries.remove(key)
    }

    /// Number of entries of this level.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries of this level in insertion order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value<'a>)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The entries of this level in insertion order, to change their values.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Value<'a>)> {
        self.entries.iter_mut().map(|(key, value)| (key.as_str(), value))
    }

    /// The keys of this level in insertion order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The nested map under `key`.
    pub fn map(&self, key: &str) -> Option<&StateDict<'a>> {
        self.get(key).and_then(Value::as_map)
    }

    /// The nested map under `key`, to change it.
    pub fn map_mut(&mut self, key: &str) -> Option<&mut StateDict<'a>> {
        match self.get_mut(key) {
            Some(Value::Map(map)) => Some(map),
            _ => None,
        }
    }

    /// The tensor under a key of this level, as the type that was inserted.
    pub fn tensor<T: LocalTensor + 'static>(&self, key: &str) -> Option<&T> {
        match self.get(key) {
            Some(Value::Tensor(tensor)) => tensor.as_any().and_then(|any| any.downcast_ref()),
            _ => None,
        }
    }

    /// All tensors with their flattened names, depth first.
    ///
    /// # Errors
    /// `DuplicateFqn` if two entries flatten to one name.
    pub fn flat_tensors(&self) -> Result<OrderedMap<Fqn, &(dyn LocalTensor + 'a)>> {
        let mut flat = OrderedMap::new();
        self.visit(&Fqn(String::new()), &mut |fqn, tensor| match flat.insert(fqn.clone(), tensor) {
            None => Ok(()),
            Some(_) => Err(Error::DuplicateFqn { fqn: fqn.0 }),
        })?;
        Ok(flat)
    }

    /// All tensors with their flattened names, depth first, to write into.
    ///
    /// # Errors
    /// `DuplicateFqn` if two entries flatten to one name.
    pub fn flat_tensors_mut(&mut self) -> Result<OrderedMap<Fqn, &mut (dyn LocalTensor + 'a)>> {
        let mut flat = OrderedMap::new();
        self.visit_mut(&Fqn(String::new()), &mut |fqn, tensor| match flat.insert(fqn.clone(), tensor) {
            None => Ok(()),
            Some(_) => Err(Error::DuplicateFqn { fqn: fqn.0 }),
        })?;
        Ok(flat)
    }

    /// A copy that shares no memory with this one (Python's `deepcopy`).
    ///
    /// # Errors
    /// A tensor's device could not be read.
    pub fn deep_copy(&self) -> Result<StateDict<'static>> {
        let copies = self.entries.iter().map(|(key, value)| Ok((key.clone(), value.deep_copy()?)));
        Ok(StateDict { entries: copies.collect::<Result<_>>()? })
    }

    fn visit<'s>(&'s self, at: &Fqn, found: &mut FoundTensor<'_, 's, 'a>) -> Result<()> {
        self.entries.iter().try_for_each(|(key, value)| value.visit(at.child(key), found))
    }

    fn visit_mut<'s>(&'s mut self, at: &Fqn, found: &mut FoundTensorMut<'_, 's, 'a>) -> Result<()> {
        self.entries.iter_mut().try_for_each(|(key, value)| value.visit_mut(at.child(key), found))
    }
}

/// What has state that a checkpoint keeps: a model, an optimizer, a data loader, a counter.
///
/// Whatever implements it is saved and loaded by name in one call, `{"model": …, "optim": …, "step": 7}`.
///
/// # Source
/// `torch.distributed.checkpoint.stateful.Stateful`.
pub trait Stateful {
    /// Its state. Tensors may be shared with it: a load then writes into its own memory.
    ///
    /// # Errors
    /// Its own.
    fn state_dict(&self) -> Result<Value<'static>, StatefulError>;

    /// Takes on a loaded state, of the nesting that `state_dict` returns.
    ///
    /// # Errors
    /// Its own, for instance for a value of another kind.
    fn load_state_dict(&mut self, state: &Value<'static>) -> Result<(), StatefulError>;
}

/// Whatever a [`Stateful`] fails with.
pub type StatefulError = Box<dyn std::error::Error + Send + Sync>;

macro_rules! stateful_values {
    ($($plain:ty: $kind:ident => $expected:literal),* $(,)?) => {$(
        impl Stateful for $plain {
            fn state_dict(&self) -> Result<Value<'static>, StatefulError> {
                Ok(Value::$kind(self.clone()))
            }

            fn load_state_dict(&mut self, state: &Value<'static>) -> Result<(), StatefulError> {
                let Value::$kind(value) = state else {
                    return Err(format!("expected {}, got {state:?}", $expected).into());
                };
                self.clone_from(value);
                Ok(())
            }
        }
    )*};
}

stateful_values! {
    i64: Int => "an integer",
    f64: Float => "a number",
    bool: Bool => "a truth value",
    String: Str => "text",
    Vec<u8>: Bytes => "bytes",
}

type FoundTensor<'f, 's, 'a> = dyn FnMut(Fqn, &'s (dyn LocalTensor + 'a)) -> Result<()> + 'f;
type FoundTensorMut<'f, 's, 'a> = dyn FnMut(Fqn, &'s mut (dyn LocalTensor + 'a)) -> Result<()> + 'f;

impl<'a> Value<'a> {
    /// The integer, if this is one.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Value::Int(int) => Some(*int),
            _ => None,
        }
    }

    /// The number, if this is one.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Value::Float(float) => Some(*float),
            _ => None,
        }
    }

    /// The text, if this is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The nested map, if this is one.
    pub fn as_map(&self) -> Option<&StateDict<'a>> {
        match self {
            Value::Map(map) => Some(map),
            _ => None,
        }
    }

    fn deep_copy(&self) -> Result<Value<'static>> {
        Ok(match self {
            Value::Tensor(tensor) => Value::Tensor(tensor.deep_copy()?),
            Value::Map(map) => Value::Map(map.deep_copy()?),
            Value::List(items) => Value::List(items.iter().map(Value::deep_copy).collect::<Result<_>>()?),
            Value::Int(int) => Value::Int(*int),
            Value::Float(float) => Value::Float(*float),
            Value::Bool(truth) => Value::Bool(*truth),
            Value::Str(text) => Value::Str(text.clone()),
            Value::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Value::None => Value::None,
        })
    }

    fn visit<'s>(&'s self, at: Fqn, found: &mut FoundTensor<'_, 's, 'a>) -> Result<()> {
        match self {
            Value::Tensor(tensor) => found(at, tensor.as_ref()),
            Value::Map(map) => map.visit(&at, found),
            Value::List(items) => {
                let mut numbered = items.iter().enumerate();
                numbered.try_for_each(|(nth, item)| item.visit(at.child(&nth.to_string()), found))
            }
            _ => Ok(()),
        }
    }

    fn visit_mut<'s>(&'s mut self, at: Fqn, found: &mut FoundTensorMut<'_, 's, 'a>) -> Result<()> {
        match self {
            Value::Tensor(tensor) => found(at, tensor.as_mut()),
            Value::Map(map) => map.visit_mut(&at, found),
            Value::List(items) => {
                let mut numbered = items.iter_mut().enumerate();
                numbered.try_for_each(|(nth, item)| item.visit_mut(at.child(&nth.to_string()), found))
            }
            _ => Ok(()),
        }
    }
}

macro_rules! value_from {
    ($($source:ty => |$v:ident| $value:expr),* $(,)?) => {$(
        impl<'a> From<$source> for Value<'a> {
            fn from($v: $source) -> Self {
                $value
            }
        }
    )*};
}

value_from! {
    StateDict<'a> => |map| Value::Map(map),
    Vec<Value<'a>> => |items| Value::List(items),
    Box<dyn LocalTensor + 'a> => |tensor| Value::Tensor(tensor),
    i64 => |int| Value::Int(int),
    f64 => |float| Value::Float(float),
    bool => |truth| Value::Bool(truth),
    String => |text| Value::Str(text),
    &str => |text| Value::Str(text.to_owned()),
    Vec<u8> => |bytes| Value::Bytes(bytes),
}

impl<K: Into<String>, V: Into<Value<'static>>> FromIterator<(K, V)> for StateDict<'static> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self { entries: entries.into_iter().map(|(key, value)| (key.into(), value.into())).collect() }
    }
}

impl fmt::Debug for StateDict<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.entries.iter()).finish()
    }
}

impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Tensor(t) => {
                write!(f, "{}{:?} holding {:?}", t.dtype(), t.global_shape(), t.local_boxes())
            }
            Value::Map(map) => map.fmt(f),
            Value::List(items) => items.fmt(f),
            Value::Int(int) => int.fmt(f),
            Value::Float(float) => float.fmt(f),
            Value::Bool(truth) => truth.fmt(f),
            Value::Str(text) => text.fmt(f),
            Value::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Value::None => f.write_str("None"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TensorBuf;
    use sconce_mesh::DType;

    fn tensor(byte: u8) -> TensorBuf {
        TensorBuf::new(DType::U8, &[1], vec![byte]).unwrap()
    }

    #[test]
    fn nested_names_flatten_to_dotted_ones_in_order() {
        let mut model = StateDict::new();
        model.insert_tensor("net1.weight", tensor(1));
        let mut state = StateDict::new();
        state.insert("model", model);
        state.insert("layers", vec![Value::Tensor(Box::new(tensor(2))), Value::Int(3)]);
        let flat = state.flat_tensors().unwrap();
        assert_eq!(flat.keys().map(Fqn::as_str).collect::<Vec<_>>(), ["model.net1.weight", "layers.0"]);
    }

    #[test]
    fn two_entries_with_one_flat_name_are_refused() {
        let mut inner = StateDict::new();
        inner.insert_tensor("b", tensor(1));
        let mut state = StateDict::new();
        state.insert("a", inner);
        state.insert_tensor("a.b", tensor(2));
        let refused = state.flat_tensors().err().map(|e| e.to_string());
        assert_eq!(refused.as_deref(), Some("state dict: two entries flatten to \"a.b\""));
    }

    #[test]
    fn a_deep_copy_does_not_see_later_writes() {
        let mut state = StateDict::new();
        state.insert_tensor("t", tensor(1));
        let copy = state.deep_copy().unwrap();
        for (_, tensor) in state.flat_tensors_mut().unwrap() {
            tensor.write_box(0, &mut |bytes| bytes.fill(9)).unwrap();
        }
        assert_eq!(copy.tensor::<TensorBuf>("t").unwrap().bytes(), [1]);
        assert_eq!(state.tensor::<TensorBuf>("t").unwrap().bytes(), [9]);
    }
}
