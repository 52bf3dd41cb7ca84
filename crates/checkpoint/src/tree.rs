//! Node: the nesting of a state dict and its values that are no tensors, as it crosses ranks and reaches the manifest.

use sconce_dtensor::{StateDict, Value};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One value of a saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// A tensor; its data are found by the value's flattened name.
    Tensor,
    /// Nested names, in order.
    Map(Vec<(String, Node)>),
    /// Items in order.
    List(Vec<Node>),
    /// An integer.
    Int(i64),
    /// The bits of an f64, so that every NaN is kept.
    Float(u64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Str(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// None.
    None,
}

impl Node {
    /// The nesting and plain values of a state dict.
    pub(crate) fn of(state: &StateDict<'_>) -> Node {
        Node::Map(state.iter().map(|(key, value)| (key.to_owned(), Node::of_value(value))).collect())
    }

    fn of_value(value: &Value<'_>) -> Node {
        match value {
            Value::Tensor(_) => Node::Tensor,
            Value::Map(map) => Node::of(map),
            Value::List(items) => Node::List(items.iter().map(Node::of_value).collect()),
            Value::Int(int) => Node::Int(*int),
            Value::Float(float) => Node::Float(float.to_bits()),
            Value::Bool(truth) => Node::Bool(*truth),
            Value::Str(text) => Node::Str(text.clone()),
            Value::Bytes(bytes) => Node::Bytes(bytes.clone()),
            Value::None => Node::None,
        }
    }

    /// The flattened names of all leaves, tensors included, in order.
    pub fn leaves(&self) -> Vec<(String, &Node)> {
        let mut leaves = Vec::new();
        self.collect_leaves(String::new(), &mut leaves);
        leaves
    }

    fn collect_leaves<'n>(&'n self, at: String, leaves: &mut Vec<(String, &'n Node)>) {
        match self {
            Node::Map(entries) => {
                entries.iter().for_each(|(key, node)| node.collect_leaves(child(&at, key), leaves));
            }
            Node::List(items) => {
                let numbered = items.iter().enumerate();
                numbered.for_each(|(nth, node)| node.collect_leaves(child(&at, &nth.to_string()), leaves));
            }
            leaf => leaves.push((at, leaf)),
        }
    }

    /// Both trees in one: maps are merged by key, everything else must be equal.
    ///
    /// # Errors
    /// `ValueMismatch` naming the first value that differs.
    pub(crate) fn merge(self, other: Node, at: &str) -> Result<Node> {
        match (self, other) {
            (Node::Map(mut mine), Node::Map(theirs)) => {
                for (key, node) in theirs {
                    match mine.iter_mut().find(|(name, _)| *name == key) {
                        None => mine.push((key, node)),
                        Some((name, slot)) => {
                            let old = std::mem::replace(slot, Node::None);
                            *slot = old.merge(node, &child(at, name))?;
                        }
                    }
                }
                Ok(Node::Map(mine))
            }
            (mine, theirs) if mine == theirs => Ok(mine),
            (mine, theirs) => Err(Error::ValueMismatch {
                fqn: at.to_owned(),
                expected: format!("{mine:?} as on an earlier rank"),
                got: format!("{theirs:?}"),
            }),
        }
    }

    /// Checks that [`Node::restore`] into a state of the shape of `wanted` can succeed.
    ///
    /// # Errors
    /// `ValueMismatch` where one has a tensor or a nesting and the other has not.
    pub(crate) fn check_restorable(&self, wanted: &Node, at: &str) -> Result<()> {
        match (self, wanted) {
            (Node::Map(saved), Node::Map(wanted)) => saved.iter().try_for_each(|(key, node)| {
                let same = wanted.iter().find(|(name, _)| name == key);
                same.map_or(Ok(()), |(_, wanted)| node.check_restorable(wanted, &child(at, key)))
            }),
            (Node::List(saved), Node::List(wanted)) => {
                let mut pairs = saved.iter().zip(wanted).enumerate();
                pairs.try_for_each(|(nth, (node, wanted))| {
                    node.check_restorable(wanted, &child(at, &nth.to_string()))
                })
            }
            (Node::Tensor, Node::Tensor) => Ok(()),
            (saved, wanted) if saved.is_plain() && wanted.is_plain() => Ok(()),
            (saved, wanted) => Err(Error::ValueMismatch {
                fqn: at.to_owned(),
                expected: format!("{wanted:?}"),
                got: format!("{saved:?}"),
            }),
        }
    }

    fn is_plain(&self) -> bool {
        !matches!(self, Node::Tensor | Node::Map(_) | Node::List(_))
    }

    /// Replaces the plain values of `state` by this tree's, where both have the name; the rest stays.
    pub(crate) fn restore(&self, state: &mut StateDict<'_>) {
        let Node::Map(entries) = self else { return };
        for (key, node) in entries {
            if let Some(value) = state.get_mut(key) {
                node.restore_value(value);
            }
        }
    }

    fn restore_value(&self, value: &mut Value<'_>) {
        match (self, value) {
            (Node::Map(_), Value::Map(map)) => self.restore(map),
            (Node::List(nodes), Value::List(values)) => {
                nodes.iter().zip(values).for_each(|(node, value)| node.restore_value(value));
            }
            (saved, value) => {
                if let Some(plain) = saved.plain_value() {
                    *value = plain;
                }
            }
        }
    }

    /// The value of a leaf that is no tensor.
    pub(crate) fn plain_value(&self) -> Option<Value<'static>> {
        Some(match self {
            Node::Tensor | Node::Map(_) | Node::List(_) => return None,
            Node::Int(int) => Value::Int(*int),
            Node::Float(bits) => Value::Float(f64::from_bits(*bits)),
            Node::Bool(truth) => Value::Bool(*truth),
            Node::Str(text) => Value::Str(text.clone()),
            Node::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Node::None => Value::None,
        })
    }
}

/// A name below another.
pub(crate) fn child(at: &str, key: &str) -> String {
    if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") }
}
