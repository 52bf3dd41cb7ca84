//! Ranks as processes: the test binary runs itself again, once a rank, with a store of files.

#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sconce_mesh::{Error, GroupOptions, ProcessGroup, Rank, Result, Store};

const RANK: &str = "SCONCE_TEST_RANK";
const DIR: &str = "SCONCE_TEST_DIR";
/// Far longer than any test takes; a rank that hangs is killed then.
const DEADLINE: Duration = Duration::from_secs(60);

/// A store in a directory: one file a key.
pub(crate) struct FileStore {
    dir: PathBuf,
}

impl FileStore {
    pub(crate) fn new(dir: &Path) -> Self {
        FileStore { dir: dir.to_owned() }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(key.replace('/', "+"))
    }

    fn read(&self, key: &str) -> Option<Vec<u8>> {
        fs::read(self.path(key)).ok()
    }

    fn write(&self, key: &str, value: &[u8]) {
        let beside = self.dir.join(format!("{}.{}", key.replace('/', "+"), std::process::id()));
        fs::write(&beside, value).unwrap();
        fs::rename(beside, self.path(key)).unwrap();
    }

    fn locked<R>(&self, body: impl FnOnce() -> R) -> R {
        let lock = File::create(self.dir.join("lock")).unwrap();
        lock.lock().unwrap();
        body()
    }
}

impl Store for FileStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.write(key, value);
        Ok(())
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let started = Instant::now();
        loop {
            if let Some(value) = self.read(key) {
                return Ok(value);
            }
            if started.elapsed() >= timeout {
                return Err(Error::Store { op: "get", key: key.into(), cause: "timed out".into() });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        Ok(self.locked(|| {
            let old = self.read(key).map_or(0, |value| String::from_utf8(value).unwrap().parse().unwrap());
            self.write(key, (old + delta).to_string().as_bytes());
            old + delta
        }))
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        Ok(self.locked(|| {
            let held = self.read(key).unwrap_or_default();
            if held == expected {
                self.write(key, desired);
                return desired.to_vec();
            }
            held
        }))
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        keys.iter().try_for_each(|key| self.get(key, timeout).map(drop))
    }

    fn delete(&self, key: &str) -> Result<bool> {
        Ok(fs::remove_file(self.path(key)).is_ok())
    }
}

/// What a rank's body gets.
pub(crate) struct RankProcess {
    pub(crate) rank: Rank,
    pub(crate) store: Arc<FileStore>,
}

impl RankProcess {
    pub(crate) fn join(&self, world_size: usize, timeout: Duration) -> Result<ProcessGroup> {
        ProcessGroup::new(self.store.clone(), self.rank, world_size, GroupOptions { timeout })
    }

    /// Tells the test that this rank has come to a point.
    pub(crate) fn signal(&self, key: &str) {
        self.store.set(key, b"").unwrap();
    }
}

/// The processes of a test, killed when it ends.
pub(crate) struct Procs {
    children: Vec<Child>,
    pub(crate) store: FileStore,
    _dir: tempfile::TempDir,
}

impl Procs {
    pub(crate) fn kill(&mut self, rank: usize) {
        self.children[rank].kill().unwrap();
    }

    pub(crate) fn pid(&self, rank: usize) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.children[rank])
    }

    /// Waits until a rank has signalled.
    pub(crate) fn await_signal(&self, key: &str) {
        self.store.get(key, DEADLINE).unwrap();
    }

    /// Waits for the end of a rank.
    #[track_caller]
    pub(crate) fn status(&mut self, rank: usize) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.children[rank].try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < DEADLINE, "rank {rank} hangs");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    pub(crate) fn assert_success(&mut self, ranks: &[usize]) {
        for rank in ranks {
            let status = self.status(*rank);
            assert!(status.success(), "rank {rank}: {status}");
        }
    }
}

impl Drop for Procs {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ended_already = child.kill();
            let _ended_already = child.wait();
        }
    }
}

/// In a rank's process runs `body`; in the test itself starts one process for each of `ranks`.
///
/// `name` is the test's own name, by which the processes find their way back here.
pub(crate) fn procs(name: &str, ranks: &[usize], body: impl FnOnce(RankProcess)) -> Option<Procs> {
    if let (Ok(rank), Ok(dir)) = (std::env::var(RANK), std::env::var(DIR)) {
        let store = Arc::new(FileStore::new(Path::new(&dir)));
        body(RankProcess { rank: Rank(rank.parse().unwrap()), store });
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let start = |rank: &usize| {
        Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture", "--include-ignored", "--quiet"])
            .env(RANK, rank.to_string())
            .env(DIR, dir.path())
            .spawn()
            .unwrap()
    };
    let children = ranks.iter().map(start).collect();
    Some(Procs { children, store: FileStore::new(dir.path()), _dir: dir })
}
