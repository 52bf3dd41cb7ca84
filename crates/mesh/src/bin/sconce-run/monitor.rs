//! What the ranks do, every few seconds, on standard error.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sconce_mesh::{Rank, RankProcesses};

/// Prints until it is dropped.
pub(crate) struct Monitor {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    pub(crate) fn start(ranks: &RankProcesses, every: Duration) -> Monitor {
        let (stop, stopped) = channel();
        let pids = ranks.pids();
        let started = Instant::now();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                let states: Vec<String> = pids.iter().map(|(rank, pid)| state(*rank, *pid)).collect();
                eprintln!("sconce-run: {:.0?}: {}", started.elapsed(), states.join(", "));
            }
        });
        Monitor { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        drop(self.stop.take());
        // A monitor that panicked has nothing more to show.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// `rank 2 S 153 MiB`: the state as `ps` shows it (R runs, S sleeps, T is stopped), and resident memory (proc(5)).
fn state(rank: Rank, pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()).map(str::to_owned)
    };
    match (field("State:"), field("VmRSS:").and_then(|kib| kib.parse::<u64>().ok())) {
        (Some(state), Some(kib)) => format!("rank {rank} {state} {} MiB", kib / 1024),
        _ => format!("rank {rank} has ended"),
    }
}
