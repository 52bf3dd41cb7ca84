//! Faults around the collectives of this process, through the hook that feature `test-faults` of sconce-mesh opens; and
//! a store that obeys a plan.

use std::time::Duration;

use sconce_mesh::{Error, FaultSite, Result, Store, set_fault_hook};

use crate::faults::{Faults, Verdict};

/// Strikes before and after collectives: operations `before all_reduce`, `after all_reduce` and so on.
///
/// It holds for all groups of the process and for its whole life, so it is for ranks that are processes.
///
/// # Panics
/// If the process has such faults already.
pub fn strike_collectives(faults: &Faults) {
    let faults = faults.clone();
    let is_first = set_fault_hook(Box::new(move |site: &FaultSite| {
        let moment = if site.is_before { "before" } else { "after" };
        match faults.at(&format!("{moment} {}", site.op)) {
            Verdict::Fail => Err(injected(site.op)),
            Verdict::GoOn | Verdict::Corrupt => Ok(()),
        }
    }));
    assert!(is_first, "the collectives of this process obey another plan already");
}

fn injected(call: &str) -> Error {
    Error::Backend { backend: "fault", call: call.to_owned(), cause: "injected".to_owned() }
}

/// A store that obeys a plan: operations `store set`, `store get` and so on.
pub struct FaultyStore<S> {
    inner: S,
    faults: Faults,
}

impl<S: Store> FaultyStore<S> {
    /// Decorates `inner`.
    pub fn new(inner: S, faults: Faults) -> Self {
        Self { inner, faults }
    }

    fn around<R>(&self, op: &'static str, key: &str, run: impl FnOnce(&S) -> Result<R>) -> Result<(R, bool)> {
        let verdict = self.faults.at(&format!("store {op}"));
        if verdict == Verdict::Fail {
            return Err(Error::Store { op, key: key.to_owned(), cause: "injected".to_owned() });
        }
        run(&self.inner).map(|answer| (answer, verdict == Verdict::Corrupt))
    }
}

/// A value with a bit flipped, if it is to be.
fn flipped((mut value, is_corrupt): (Vec<u8>, bool)) -> Vec<u8> {
    if let Some(first) = value.first_mut().filter(|_| is_corrupt) {
        *first ^= 1;
    }
    value
}

impl<S: Store> Store for FaultyStore<S> {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.around("set", key, |inner| inner.set(key, value)).map(drop)
    }
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        self.around("get", key, |inner| inner.get(key, timeout)).map(flipped)
    }
    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        self.around("add", key, |inner| inner.add(key, delta)).map(|(sum, _)| sum)
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        self.around("compare_set", key, |inner| inner.compare_set(key, expected, desired)).map(flipped)
    }
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        self.around("wait", &keys.join(" "), |inner| inner.wait(keys, timeout)).map(drop)
    }
    fn delete(&self, key: &str) -> Result<bool> {
        self.around("delete", key, |inner| inner.delete(key)).map(|(was_there, _)| was_there)
    }
    fn list(&self, prefix: &str) -> Result<Vec<String>> {
        self.around("list", prefix, |inner| inner.list(prefix)).map(|(keys, _)| keys)
    }
}
