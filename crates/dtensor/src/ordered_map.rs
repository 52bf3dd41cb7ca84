//! OrderedMap: values by name in the order in which they came. Pure.
//!
//! A removed entry leaves a hole, so that removing takes as long as finding; holes are closed once they outnumber entries.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;

/// A map that keeps insertion order, as Python's `dict` does.
///
/// ```
/// use sconce_dtensor::OrderedMap;
///
/// let mut map: OrderedMap<&str, i32> = [("b", 1), ("a", 2)].into_iter().collect();
/// map.insert("b", 3);
/// assert_eq!(map.iter().collect::<Vec<_>>(), [(&"b", &3), (&"a", &2)]);
/// assert_eq!(map.remove("b"), Some(3));
/// assert_eq!(map.len(), 1);
/// ```
pub struct OrderedMap<K, V> {
    /// In order; `None` where an entry was removed.
    entries: Vec<Option<(K, V)>>,
    /// Index of each entry.
    places: HashMap<K, usize>,
}

impl<K, V> Default for OrderedMap<K, V> {
    fn default() -> Self {
        Self { entries: Vec::new(), places: HashMap::new() }
    }
}

impl<K, V> OrderedMap<K, V> {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// True if there is no entry.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The entries in insertion order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().flatten().map(|(key, value)| (key, value))
    }

    /// The entries in insertion order, to change their values.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        self.entries.iter_mut().flatten().map(|(key, value)| (&*key, value))
    }

    /// The keys in insertion order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// The values in insertion order.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Hash + Eq, V> OrderedMap<K, V> {
    /// The value under `key`.
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let at = *self.places.get(key)?;
        self.entries[at].as_ref().map(|(_, value)| value)
    }

    /// The value under `key`, to change it.
    pub fn get_mut<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        let at = *self.places.get(key)?;
        self.entries[at].as_mut().map(|(_, value)| value)
    }

    /// True if there is a value under `key`.
    pub fn contains_key<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.places.contains_key(key)
    }

    /// Removes and returns the value under `key`; the others keep their order.
    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let at = self.places.remove(key)?;
        let removed = self.entries[at].take().map(|(_, value)| value);
        if self.entries.len() > 2 * self.places.len() {
            self.close_holes();
        }
        removed
    }

    fn close_holes(&mut self) {
        self.entries.retain(Option::is_some);
        for (at, (key, _)) in self.entries.iter().flatten().enumerate() {
            if let Some(place) = self.places.get_mut(key) {
                *place = at;
            }
        }
    }
}

impl<K: Hash + Eq + Clone, V> OrderedMap<K, V> {
    /// Enters `value` under `key` and returns what it replaced, whose place it takes.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        if let Some(held) = self.get_mut(&key) {
            return Some(std::mem::replace(held, value));
        }
        self.places.insert(key.clone(), self.entries.len());
        self.entries.push(Some((key, value)));
        None
    }

    /// The value under `key`, entered now if there is none, to change it.
    pub fn get_or_default(&mut self, key: K) -> &mut V
    where
        V: Default,
    {
        let at = *self.places.entry(key.clone()).or_insert(self.entries.len());
        if at == self.entries.len() {
            self.entries.push(None);
        }
        &mut self.entries[at].get_or_insert_with(|| (key, V::default())).1
    }
}

impl<K: Hash + Eq + Clone, V> FromIterator<(K, V)> for OrderedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::new();
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

impl<K, V> IntoIterator for OrderedMap<K, V> {
    type Item = (K, V);
    type IntoIter = std::iter::Flatten<std::vec::IntoIter<Option<(K, V)>>>;

    fn into_iter(self) -> Self::IntoIter {
        self.entries.into_iter().flatten()
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for OrderedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a list that is searched from its beginning.
        #[test]
        fn it_is_a_list_of_distinct_keys(steps in prop::collection::vec((any::<bool>(), 0u8..12, any::<u32>()), 0..80)) {
            let (mut map, mut list) = (OrderedMap::new(), Vec::<(u8, u32)>::new());
            for (is_insert, key, value) in steps {
                let at = list.iter().position(|(held, _)| *held == key);
                let expected = at.map(|at| list[at].1);
                if is_insert {
                    match at {
                        Some(at) => list[at].1 = value,
                        None => list.push((key, value)),
                    }
                    prop_assert_eq!(map.insert(key, value), expected);
                } else {
                    at.map(|at| list.remove(at));
                    prop_assert_eq!(map.remove(&key), expected);
                }
                prop_assert_eq!(map.len(), list.len());
                prop_assert!(map.iter().map(|(k, v)| (*k, *v)).eq(list.iter().copied()));
                for key in 0..12 {
                    let held = list.iter().find(|(held, _)| *held == key).map(|(_, value)| value);
                    prop_assert_eq!(map.get(&key), held);
                }
            }
            prop_assert!(map.into_iter().eq(list));
        }
    }
}
