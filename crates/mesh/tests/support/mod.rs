//! Ranks as processes: the test binary runs itself again, once a rank, with a store of files.

#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sconce_mesh::{FileStore, GroupOptions, ProcessGroup, Rank, Result, Store};

const RANK: &str = "SCONCE_TEST_RANK";
const DIR: &str = "SCONCE_TEST_DIR";
/// Far longer than any test takes; a rank that hangs is killed then.
const DEADLINE: Duration = Duration::from_secs(60);

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
        let store = Arc::new(file_store(Path::new(&dir)));
        body(RankProcess { rank: Rank(rank.parse().unwrap()), store });
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let start = |rank: &usize| {
        Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture", "--include-ignored", "--quiet"])
            .env(RANK, rank.to_string())
            .env(DIR, dir.path())
            .env("SCONCE_FLIGHT_DIR", dir.path())
            .spawn()
            .unwrap()
    };
    let children = ranks.iter().map(start).collect();
    Some(Procs { children, store: file_store(dir.path()), _dir: dir })
}

fn file_store(dir: &Path) -> FileStore {
    FileStore::open(dir).unwrap()
}
