//! Progress: one thread that runs jobs in the order in which they were pushed. It starts with the first.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use super::circle::Waiting;
use crate::{Error, Result};

thread_local! {
    static IS_PROGRESS: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread runs jobs.
pub(super) fn is_progress_thread() -> bool {
    IS_PROGRESS.get()
}

pub(super) type Job = Box<dyn FnOnce() + Send>;

/// A queue of jobs and its thread, which ends once the queue is dropped and empty.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    running: OnceLock<Running>,
}

#[derive(Debug)]
struct Running {
    jobs: Mutex<Sender<Job>>,
    thread: ThreadId,
    pending: Arc<Pending>,
}

/// How many jobs were queued, and how many of them are done.
#[derive(Debug, Default)]
struct Pending {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    pushed: u64,
    done: u64,
}

impl Progress {
    /// Queues a job.
    ///
    /// # Errors
    /// `Backend` if the thread cannot be started.
    pub(super) fn push(&self, job: Job) -> Result<()> {
        let running = match self.running.get() {
            Some(running) => running,
            None => {
                let started = Running::start()?;
                // Of two that start at the same time one is kept; the other's thread ends with its queue.
                self.running.get_or_init(|| started)
            }
        };
        running.pending.change(|counts| counts.pushed += 1);
        let jobs = running.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.send(job).map_err(|_| {
            running.pending.change(|counts| counts.done += 1);
            failed("its queue is closed".to_owned())
        })
    }

    /// The thread that runs the jobs, once there was one.
    pub(super) fn thread(&self) -> Option<ThreadId> {
        self.running.get().map(|running| running.thread)
    }

    /// Waits until all jobs pushed so far are done. A job itself does not wait: it is its turn.
    ///
    /// # Errors
    /// `InvalidArgument` in a job of another queue that one of these jobs waits for.
    pub(crate) fn settle(&self) -> Result<()> {
        let Some(running) = self.running.get() else { return Ok(()) };
        if thread::current().id() == running.thread {
            return Ok(());
        }
        let pushed = running.pending.counts().pushed;
        let _waiting = if is_progress_thread() && !running.pending.has_done(pushed) {
            let pending = Arc::clone(&running.pending);
            Some(Waiting::of_this_thread(running.thread, move || pending.has_done(pushed))?)
        } else {
            None
        };
        running.pending.wait_for(pushed);
        Ok(())
    }
}

impl Running {
    fn start() -> Result<Running> {
        let (jobs, queue) = channel();
        let pending = Arc::new(Pending::default());
        let counted = Arc::clone(&pending);
        let thread = thread::Builder::new().name("sconce-progress".to_owned());
        let thread = thread.spawn(move || run(&queue, &counted)).map_err(|e| failed(e.to_string()))?;
        Ok(Running { jobs: Mutex::new(jobs), thread: thread.thread().id(), pending })
    }
}

fn run(queue: &Receiver<Job>, pending: &Pending) {
    IS_PROGRESS.set(true);
    while let Ok(job) = queue.recv() {
        job();
        pending.change(|counts| counts.done += 1);
    }
}

impl Pending {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts());
        self.changed.notify_all();
    }

    fn has_done(&self, pushed: u64) -> bool {
        self.counts().done >= pushed
    }

    /// Waits for the first `pushed` jobs, whatever comes after them.
    fn wait_for(&self, pushed: u64) {
        let mut counts = self.counts();
        while counts.done < pushed {
            counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn failed(cause: String) -> Error {
    Error::Backend { backend: "progress thread", call: "spawn".into(), cause }
}
