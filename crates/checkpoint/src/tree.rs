//! Node: the nesting of a state dict and its values that are no tensors, as it crosses ranks and reaches the manifest.

use std::collections::HashMap;

use sconce_dtensor::{StateDict, Value};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// serde_json reads 128 brackets within one another; what holds a tree has a few around it.
const MAX_JSON_DEPTH: usize = 120;

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

    /// Whether both have the same names and items, plain values aside.
    pub(crate) fn has_nesting_of(&self, other: &Node) -> bool {
        match (self, other) {
            (Node::Map(mine), Node::Map(theirs)) => {
                let mut pairs = mine.iter().zip(theirs);
                mine.len() == theirs.len() && pairs.all(|((a, x), (b, y))| a == b && x.has_nesting_of(y))
            }
            (Node::List(mine), Node::List(theirs)) => {
                mine.len() == theirs.len() && mine.iter().zip(theirs).all(|(x, y)| x.has_nesting_of(y))
            }
            (Node::Map(_) | Node::List(_), _) | (_, Node::Map(_) | Node::List(_)) => false,
            (mine, theirs) => (*mine == Node::Tensor) == (*theirs == Node::Tensor),
        }
    }

    /// Refuses a tree whose JSON nobody could read back.
    ///
    /// # Errors
    /// `ValueMismatch`.
    pub(crate) fn check_depth(&self) -> Result<()> {
        let depth = self.json_depth();
        if depth > MAX_JSON_DEPTH {
            let expected = format!("maps and lists nested up to {MAX_JSON_DEPTH} brackets of JSON");
            return Err(Error::ValueMismatch { fqn: String::new(), expected, got: depth.to_string() });
        }
        Ok(())
    }

    /// Brackets within one another in its JSON.
    fn json_depth(&self) -> usize {
        match self {
            Node::Map(entries) => 3 + entries.iter().map(|(_, node)| node.json_depth()).max().unwrap_or(0),
            Node::List(items) => 2 + items.iter().map(Node::json_depth).max().unwrap_or(0),
            Node::Bytes(_) => 2,
            _ => 1,
        }
    }

    /// The tree without its other values. Lists become maps: their items keep their names.
    #[cfg(feature = "torch")]
    pub(crate) fn tensors_only(&self) -> Node {
        let keep = |node: &Node| match node {
            Node::Tensor => Some(Node::Tensor),
            Node::Map(_) | Node::List(_) => {
                let below = node.tensors_only();
                matches!(&below, Node::Map(entries) if !entries.is_empty()).then_some(below)
            }
            _ => None,
        };
        match self {
            Node::Map(entries) => {
                Node::Map(entries.iter().filter_map(|(key, node)| Some((key.clone(), keep(node)?))).collect())
            }
            Node::List(items) => {
                let numbered = items.iter().enumerate();
                Node::Map(numbered.filter_map(|(nth, node)| Some((nth.to_string(), keep(node)?))).collect())
            }
            other => other.clone(),
        }
    }

    /// The values of the leaves that are no tensors, in order.
    pub(crate) fn plain_leaves(&self) -> Vec<Node> {
        let leaves = self.leaves().into_iter().filter(|(_, node)| **node != Node::Tensor);
        leaves.map(|(_, node)| node.clone()).collect()
    }

    /// The same nesting with other plain values, in order; `None` if they are not as many.
    pub(crate) fn with_plain_leaves(&self, values: Vec<Node>) -> Option<Node> {
        let mut values = values.into_iter();
        let filled = self.filled(&mut values)?;
        values.next().is_none().then_some(filled)
    }

    fn filled(&self, values: &mut impl Iterator<Item = Node>) -> Option<Node> {
        Some(match self {
            Node::Tensor => Node::Tensor,
            Node::Map(entries) => {
                let entry = |(key, node): &(String, Node)| Some((key.clone(), node.filled(values)?));
                Node::Map(entries.iter().map(entry).collect::<Option<_>>()?)
            }
            Node::List(items) => {
                Node::List(items.iter().map(|node| node.filled(values)).collect::<Option<_>>()?)
            }
            _ => values.next()?,
        })
    }

    /// The names of the leaves of a node whose own name is `at`.
    pub(crate) fn leaves_below(&self, at: &str) -> impl Iterator<Item = String> {
        let mut leaves = Vec::new();
        self.collect_leaves(at.to_owned(), &mut leaves);
        leaves.into_iter().map(|(name, _)| name)
    }

    /// The number of that flattened name.
    pub(crate) fn number(&self, name: &str) -> Option<f64> {
        match self.leaves().into_iter().find(|(leaf, _)| leaf == name)?.1 {
            Node::Float(bits) => Some(f64::from_bits(*bits)),
            Node::Int(int) => Some(*int as f64),
            _ => None,
        }
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
                for (nth, (key, node)) in theirs.into_iter().enumerate() {
                    // Most ranks have the same keys in the same order.
                    let same_place = mine.get(nth).is_some_and(|(name, _)| *name == key).then_some(nth);
                    match same_place.or_else(|| mine.iter().position(|(name, _)| *name == key)) {
                        None => mine.push((key, node)),
                        Some(place) => {
                            let (name, slot) = &mut mine[place];
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

/// Gives the plain values of `state` new ones, by flattened names; others stay.
pub(crate) fn restore(state: &mut StateDict<'_>, values: &HashMap<&str, &Node>) {
    state.iter_mut().for_each(|(key, value)| restore_value(value, key, values));
}

fn restore_value(value: &mut Value<'_>, at: &str, values: &HashMap<&str, &Node>) {
    match value {
        Value::Tensor(_) => {}
        Value::Map(map) => {
            map.iter_mut().for_each(|(key, value)| restore_value(value, &child(at, key), values));
        }
        Value::List(items) => {
            let numbered = items.iter_mut().enumerate();
            numbered.for_each(|(nth, value)| restore_value(value, &child(at, &nth.to_string()), values));
        }
        plain => {
            if let Some(new) = values.get(at).and_then(|node| node.plain_value()) {
                *plain = new;
            }
        }
    }
}

/// A name below another.
pub(crate) fn child(at: &str, key: &str) -> String {
    if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") }
}
