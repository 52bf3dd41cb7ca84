//! MemoryStore: a store inside one process, for ranks that are threads and for tests.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::entries::{add, compare_set, list};
use crate::{Error, Result, Store};

/// A store that all clones share.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    entries: Mutex<HashMap<String, Vec<u8>>>,
    changed: Condvar,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<u8>>> {
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<R>(&self, change: impl FnOnce(&mut HashMap<String, Vec<u8>>) -> R) -> R {
        let result = change(&mut self.lock());
        self.shared.changed.notify_all();
        result
    }
}

impl Store for MemoryStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.change(|entries| entries.insert(key.to_owned(), value.to_vec()));
        Ok(())
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let started = Instant::now();
        let mut entries = self.lock();
        loop {
            if let Some(value) = entries.get(key) {
                return Ok(value.clone());
            }
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(Error::store("get", key, format!("nobody set it within {timeout:?}")));
            }
            let woken = self.shared.changed.wait_timeout(entries, left);
            entries = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        self.change(|entries| add(entries, key, delta))
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        Ok(self.change(|entries| compare_set(entries, key, expected, desired)))
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        super::wait_for_each(self, keys, timeout)
    }

    fn delete(&self, key: &str) -> Result<bool> {
        Ok(self.change(|entries| entries.remove(key).is_some()))
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>> {
        Ok(list(&self.lock(), prefix))
    }
}
