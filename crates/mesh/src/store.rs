//! Rendezvous: the small key-value store through which ranks find each other before they have a group.
//!
//! It carries addresses, tokens and names, not tensors. Implementations are below `store/`.

mod entries;
mod file;
mod memory;
#[cfg(feature = "tcp-store")]
mod tcp;

pub use file::FileStore;
pub use memory::MemoryStore;
#[cfg(feature = "tcp-store")]
pub use tcp::{TcpStore, TcpStoreServer};

use std::time::{Duration, Instant};

use crate::Result;

/// A key-value store shared by the ranks of a world.
///
/// Values are bytes; keys are UTF-8. Every call that can wait takes a deadline.
///
/// # Source
/// `torch.distributed.Store` (TCPStore's contract).
pub trait Store: Send + Sync {
    /// Stores `value` under `key`, replacing what was there, and wakes whoever waits for it.
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;

    /// Returns the value of `key`, waiting until somebody sets it.
    ///
    /// # Errors
    /// `Store` when `timeout` passes first, or the store is gone.
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>>;

    /// Adds `delta` to the integer under `key` (0 if absent) and returns the sum. The value is decimal text.
    fn add(&self, key: &str, delta: i64) -> Result<i64>;

    /// Sets `key` to `desired` if it holds `expected` (an absent key counts as empty); returns what it holds after.
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>>;

    /// Waits until every key exists.
    ///
    /// # Errors
    /// `Store` naming the first key that is missing when `timeout` passes.
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()>;

    /// Removes `key`; false if it was not there.
    fn delete(&self, key: &str) -> Result<bool>;

    /// The keys that begin with `prefix`, sorted.
    fn list(&self, prefix: &str) -> Result<Vec<String>>;
}

/// Waits for the keys one after the other under one deadline.
fn wait_for_each(store: &dyn Store, keys: &[&str], timeout: Duration) -> Result<()> {
    let started = Instant::now();
    keys.iter().try_for_each(|key| store.get(key, timeout.saturating_sub(started.elapsed())).map(drop))
}

#[cfg(test)]
mod tests;
