//! run_ranks: one thread a rank, one report of what failed.

use std::panic::resume_unwind;
use std::time::Duration;

use sconce_mesh::{GroupOptions, ProcessGroup};

/// Runs `body` on `n` ranks of this process, one thread each, and returns what each returned, by rank.
///
/// `deadline` is that of every collective, so that a rank that fails ends the others.
///
/// # Panics
/// If a rank panics: with the payload of the first one, all others' messages being on standard error.
pub fn run_ranks<R: Send>(n: usize, deadline: Duration, body: impl Fn(ProcessGroup) -> R + Sync) -> Vec<R> {
    let groups = ProcessGroup::threads(n, GroupOptions { timeout: deadline }).expect("a world of threads");
    let body = &body;
    std::thread::scope(|scope| {
        let ranks: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || body(group))).collect();
        let outcomes: Vec<_> = ranks.into_iter().map(|rank| rank.join()).collect();
        outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}
