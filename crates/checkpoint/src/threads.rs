//! Work dealt out to threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Error, Result};

/// Threads that one of `n_ranks` may keep busy: its share of the cores, as if all of them were on this host.
pub(crate) fn share_of_cores(n_ranks: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / n_ranks.max(1)).clamp(1, 8)
}

/// Calls `act` with each position below `n_jobs` and returns what it returned, in that order. Up to `n_threads` threads,
/// this one among them, take the next position whenever they are done with one.
///
/// # Errors
/// The first one by position of those that there were before the threads stopped.
pub(crate) fn deal<T: Send>(
    n_jobs: usize,
    n_threads: usize,
    act: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            if nth >= n_jobs {
                return done;
            }
            let outcome = act(nth);
            if outcome.is_err() {
                // Nobody begins another.
                next.store(n_jobs, Ordering::Relaxed);
            }
            done.push((nth, outcome));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..n_threads.min(n_jobs)).map(|_| scope.spawn(work)).collect();
        let mut done = work();
        for other in others {
            // What a thread that panicked was to do comes after everything that is known to have failed.
            done.extend(other.join().unwrap_or_else(|_| vec![(n_jobs, Err(died()))]));
        }
        done
    });
    done.sort_unstable_by_key(|(nth, _)| *nth);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

fn died() -> Error {
    Error::Tensor { fqn: String::new(), cause: "a thread panicked".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_whoever_made_them() {
        for (n_jobs, n_threads) in [(0, 4), (1, 4), (100, 1), (100, 3)] {
            let squares = deal(n_jobs, n_threads, |nth| Ok(nth * nth)).unwrap();
            assert_eq!(squares, (0..n_jobs).map(|nth| nth * nth).collect::<Vec<_>>());
        }
    }

    #[test]
    fn after_a_failure_nobody_begins_another_job() {
        let begun = AtomicUsize::new(0);
        let failed = deal(1_000_000, 2, |nth| {
            begun.fetch_add(1, Ordering::Relaxed);
            if nth == 7 { Err(died()) } else { Ok(()) }
        });
        assert_eq!(failed, Err(died()));
        assert!(begun.into_inner() < 1_000_000);
    }

    #[test]
    fn a_panic_is_an_error() {
        let failed = deal(64, 2, |nth| {
            let is_other = std::thread::current().name().is_none();
            assert!(!is_other || nth == usize::MAX, "as expected");
            std::thread::sleep(std::time::Duration::from_millis(1));
            Ok(())
        });
        assert_eq!(failed, Err(died()));
    }
}
