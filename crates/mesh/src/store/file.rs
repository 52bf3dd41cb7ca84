//! FileStore: a store in a directory that the ranks share, one file a key. It needs no server and no port.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::entries::sum;
use crate::{Error, Result, Store};

/// How long another rank may hold the lock; it does so for a read and a write.
const LOCK: Duration = Duration::from_secs(10);
/// Pauses between two looks at a file begin with the first and double up to the second.
const PAUSES: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(10)];
/// Name of the lock; no encoded key begins with a point.
const LOCK_FILE: &str = ".lock";

/// A store in a directory.
///
/// Values appear by rename, so a reader sees one whole value or another. What changes a value under a condition holds
/// the directory's lock (`flock`), which the file system must offer; NFS before version 4 does not.
///
/// # Source
/// `torch.distributed.FileStore`, which keeps all keys in one file.
#[derive(Debug)]
pub struct FileStore {
    dir: PathBuf,
    writes: AtomicU64,
}

impl FileStore {
    /// The store in `dir`, which is made if it is not there. A new world needs an empty one.
    ///
    /// # Errors
    /// `Store` if the directory cannot be made.
    pub fn open(dir: impl Into<PathBuf>) -> Result<FileStore> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(|e| Error::store("open", &dir.to_string_lossy(), e.to_string()))?;
        Ok(FileStore { dir, writes: AtomicU64::new(0) })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(encode(key))
    }

    fn read(&self, op: &'static str, key: &str) -> Result<Option<Vec<u8>>> {
        present(fs::read(self.path(key))).map_err(|e| Error::store(op, key, e.to_string()))
    }

    fn write(&self, op: &'static str, key: &str, value: &[u8]) -> Result<()> {
        let nth = self.writes.fetch_add(1, Ordering::Relaxed);
        // Unlike in other processes, in other stores of this one, and in other writes of this store.
        let beside = self.dir.join(format!(".{}-{:p}-{nth}", std::process::id(), self));
        let written = fs::write(&beside, value).and_then(|()| fs::rename(&beside, self.path(key)));
        written.map_err(|e| Error::store(op, key, e.to_string()))
    }

    fn locked<R>(&self, op: &'static str, key: &str, body: impl FnOnce() -> Result<R>) -> Result<R> {
        let failed = |e: io::Error| Error::store(op, key, e.to_string());
        let lock = File::create(self.dir.join(LOCK_FILE)).map_err(failed)?;
        let mut pauses = Pauses::new(LOCK);
        loop {
            match lock.try_lock() {
                Ok(()) => return body(),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
                Err(TryLockError::WouldBlock) if pauses.pause() => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::store(op, key, format!("the lock was not free within {LOCK:?}")));
                }
            }
        }
    }
}

impl Store for FileStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.locked("set", key, || self.write("set", key, value))
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let mut pauses = Pauses::new(timeout);
        loop {
            if let Some(value) = self.read("get", key)? {
                return Ok(value);
            }
            if !pauses.pause() {
                return Err(Error::store("get", key, format!("nobody set it within {timeout:?}")));
            }
        }
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        self.locked("add", key, || {
            let sum = sum(self.read("add", key)?.as_deref(), key, delta)?;
            self.write("add", key, sum.to_string().as_bytes())?;
            Ok(sum)
        })
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        const OP: &str = "compare_set";
        self.locked(OP, key, || {
            let held = self.read(OP, key)?.unwrap_or_default();
            if held != expected {
                return Ok(held);
            }
            self.write(OP, key, desired)?;
            Ok(desired.to_vec())
        })
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        super::wait_for_each(self, keys, timeout)
    }

    fn delete(&self, key: &str) -> Result<bool> {
        let removed = self.locked("delete", key, || Ok(present(fs::remove_file(self.path(key)))))?;
        removed.map(|gone| gone.is_some()).map_err(|e| Error::store("delete", key, e.to_string()))
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let failed = |e: io::Error| Error::store("list", prefix, e.to_string());
        let names = fs::read_dir(&self.dir).map_err(failed)?.map(|entry| entry.map(|e| e.file_name()));
        let names: io::Result<Vec<_>> = names.collect();
        let keys = names.map_err(failed)?.into_iter().filter_map(|name| decode(name.to_str()?));
        let mut keys: Vec<String> = keys.filter(|key| key.starts_with(prefix)).collect();
        keys.sort();
        Ok(keys)
    }
}

/// Waits between looks, longer each time.
struct Pauses {
    started: Instant,
    limit: Duration,
    next: Duration,
}

impl Pauses {
    fn new(limit: Duration) -> Self {
        Pauses { started: Instant::now(), limit, next: PAUSES[0] }
    }

    /// Sleeps, or tells that the time is over.
    fn pause(&mut self) -> bool {
        let left = self.limit.saturating_sub(self.started.elapsed());
        sleep(self.next.min(left));
        self.next = (self.next * 2).min(PAUSES[1]);
        !left.is_zero()
    }
}

/// `None` where the file is not there.
fn present<R>(outcome: io::Result<R>) -> io::Result<Option<R>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A key as a file's name: letters, digits, `-` and `_` as they are, other bytes as `%xx`, the whole behind a `k`.
fn encode(key: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02x}"),
    };
    std::iter::once("k".to_owned()).chain(key.bytes().map(byte)).collect()
}

fn decode(name: &str) -> Option<String> {
    let (mut rest, mut bytes) = (name.strip_prefix('k')?, Vec::new());
    while let Some(first) = rest.chars().next() {
        if first == '%' {
            bytes.push(u8::from_str_radix(rest.get(1..3)?, 16).ok()?);
            rest = &rest[3..];
        } else {
            bytes.extend_from_slice(first.to_string().as_bytes());
            rest = &rest[first.len_utf8()..];
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_as_names_of_one_file_each() {
        for key in ["", "a", "a/b", "../up", "%2f", "rank 0\n", "größe", "."] {
            let name = encode(key);
            assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
            assert_eq!(decode(&name).as_deref(), Some(key));
        }
        for name in [".lock", "other", "k%", "k%zz", "k%ff"] {
            assert_eq!(decode(name), None, "{name}");
        }
    }
}
