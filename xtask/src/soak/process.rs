//! What the system says of processes (proc(5)): memory, descriptors, whether they live, and what they left.

use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

/// What one process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) resident_kib: u64,
    pub(super) descriptors: usize,
}

impl Sample {
    /// Of a process that lives.
    pub(super) fn of(pid: u32) -> Option<Sample> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let resident_kib = line.trim().trim_end_matches(" kB").parse().ok()?;
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
        Some(Sample { resident_kib, descriptors })
    }
}

/// Whether a process of this number runs; one that only waits to be reaped does not.
pub(super) fn lives(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

/// Waits for a child.
pub(super) fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus, String> {
    let started = Instant::now();
    while started.elapsed() < limit {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => return Ok(status),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    Err(format!("still running after {limit:?}"))
}

/// Nothing of ours has a name in shared memory.
pub(super) fn no_shared_memory_left() -> Result<(), String> {
    let entries = std::fs::read_dir("/dev/shm").map_err(|e| format!("/dev/shm: {e}"))?;
    let names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
    match names.into_iter().find(|name| name.contains("sconce")) {
        Some(name) => Err(format!("/dev/shm/{name} is left")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_holds_something() {
        let pid = std::process::id();
        let sample = Sample::of(pid).unwrap();
        assert!(lives(pid) && sample.resident_kib > 100 && sample.descriptors > 2, "{sample:?}");
        assert_eq!((Sample::of(u32::MAX), lives(u32::MAX)), (None, false));
    }
}
