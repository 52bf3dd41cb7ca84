//! Which progress threads wait for which: a circle of them would wait forever, so that whoever would close it is told.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use crate::{Error, Result};

/// A wait of the job of one progress thread for jobs of another.
struct Wait {
    waiter: ThreadId,
    runner: ThreadId,
    /// Whether the waiter has only to wake up.
    is_over: Box<dyn Fn() -> bool + Send>,
}

/// Of all groups of this process: as many as there are progress threads at most.
static WAITS: Mutex<Vec<Wait>> = Mutex::new(Vec::new());

/// This thread's wait, until it is dropped.
#[must_use]
pub(super) struct Waiting(ThreadId);

impl Waiting {
    /// Notes that this progress thread waits for jobs of `runner`, which come after the one that runs there or are it.
    ///
    /// # Errors
    /// `InvalidArgument` if that thread waits for this one, by others or not.
    pub(super) fn of_this_thread(
        runner: ThreadId,
        is_over: impl Fn() -> bool + Send + 'static,
    ) -> Result<Waiting> {
        let (waiter, mut waits) = (thread::current().id(), waits());
        let mut next = Some(runner);
        while let Some(thread) = next {
            if thread == waiter {
                return Err(Error::InvalidArgument {
                    op: "wait",
                    what: "works of several groups".to_owned(),
                    expected: "none that wait for each other's turns".to_owned(),
                    got: "a work that waits, by those of other groups, for its own end".to_owned(),
                });
            }
            next =
                waits.iter().find(|wait| wait.waiter == thread && !(wait.is_over)()).map(|wait| wait.runner);
        }
        waits.push(Wait { waiter, runner, is_over: Box::new(is_over) });
        Ok(Waiting(waiter))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        waits().retain(|wait| wait.waiter != self.0);
    }
}

fn waits() -> MutexGuard<'static, Vec<Wait>> {
    WAITS.lock().unwrap_or_else(PoisonError::into_inner)
}
