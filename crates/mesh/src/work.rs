//! Work: the result of collectives issued to a progress thread, while the caller goes on.

mod circle;
mod progress;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use self::circle::Waiting;
pub(crate) use self::progress::Progress;
use self::progress::is_progress_thread;
use crate::{Element, Error, GroupRank, ProcessGroup, Result};

/// Collectives under way.
///
/// Dropping it does not call them off: the other ranks need them.
///
/// # Source
/// `torch.distributed.Work`. It owns the buffers meanwhile, so nobody can touch them before [`Work::wait`].
#[derive(Debug)]
pub struct Work<R> {
    slot: Arc<Slot<R>>,
    /// The thread that makes its calls.
    runner: Option<ThreadId>,
}

#[derive(Debug)]
struct Slot<R> {
    result: Mutex<Option<Result<R>>>,
    done: Condvar,
    /// Stays when the result has been taken.
    is_filled: AtomicBool,
}

impl<R: Send + 'static> Work<R> {
    /// Waits for the result. Each collective has its own deadline, which begins when its turn comes.
    ///
    /// # Errors
    /// What the collectives return; `InvalidArgument` inside of a work whose turn would have to end first: one that was
    /// issued before on the same group, or one that works of other groups wait for.
    pub fn wait(self) -> Result<R> {
        if self.runner == Some(thread::current().id()) && !self.is_completed() {
            return Err(Error::InvalidArgument {
                op: "wait",
                what: "work".to_owned(),
                expected: "a work that was issued before this one, or on another group".to_owned(),
                got: "one whose turn comes after this".to_owned(),
            });
        }
        let _waiting = match self.runner {
            Some(runner) if is_progress_thread() && !self.is_completed() => {
                let slot = Arc::clone(&self.slot);
                Some(Waiting::of_this_thread(runner, move || slot.is_filled.load(Ordering::Acquire))?)
            }
            _ => None,
        };
        let mut result = self.slot.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(result) = result.take() {
                return result;
            }
            result = self.slot.done.wait(result).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether there is a result.
    pub fn is_completed(&self) -> bool {
        self.slot.result.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits for the result for `timeout` at most, and tells whether there is one.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        let started = Instant::now();
        let mut result = self.slot.result.lock().unwrap_or_else(PoisonError::into_inner);
        while result.is_none() {
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                return false;
            }
            result = self.slot.done.wait_timeout(result, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl<R> Slot<R> {
    fn fill(&self, result: Result<R>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.is_filled.store(true, Ordering::Release);
        self.done.notify_all();
    }
}

impl ProcessGroup {
    /// Issues collectives on this group without waiting for them: the asynchronous form of each.
    ///
    /// A thread of the group makes the calls of all works in the order in which they were issued. Blocking calls on
    /// the group take their turn after the works issued before.
    /// Ranks:  as the collectives that `call` makes; other ranks may make them blocking.
    ///
    /// ```
    /// use sconce_mesh::{ProcessGroup, ReduceOp};
    ///
    /// let group = ProcessGroup::single();
    /// let mut gradient = vec![1.0f32, 2.0];
    /// let work = group.issue(move |group| {
    ///     group.all_reduce(&mut gradient, ReduceOp::Avg)?;
    ///     Ok(gradient)
    /// });
    /// // … compute …
    /// assert_eq!(work.wait()?, [1.0, 2.0]);
    /// # Ok::<(), sconce_mesh::Error>(())
    /// ```
    ///
    /// # Errors
    /// By [`Work::wait`]: those of `call`; `Aborted` on all ranks if it panics; `Backend` if no thread can be started.
    ///
    /// # Source
    /// `async_op=True` of torch's collectives.
    pub fn issue<R: Send + 'static>(
        &self,
        call: impl FnOnce(&ProcessGroup) -> Result<R> + Send + 'static,
    ) -> Work<R> {
        issue(self.progress(), self.clone(), call)
    }

    /// [`ProcessGroup::send`] without waiting for the receiver; gives the buffer back.
    ///
    /// Each direction between two ranks has an order of its own, so ranks may send to each other and then receive.
    ///
    /// # Source
    /// `torch.distributed.isend`.
    pub fn issue_send<T: Element>(&self, buffer: Vec<T>, to: GroupRank) -> Work<Vec<T>> {
        let send = move |group: &ProcessGroup| group.send(&buffer, to).map(|()| buffer);
        match self.lane(self.group_rank(), to) {
            Some(lane) => issue(lane.progress(), self.clone(), send),
            None => self.issue(send),
        }
    }

    /// [`ProcessGroup::recv`] without waiting for the sender; gives the buffer filled.
    ///
    /// # Source
    /// `torch.distributed.irecv`.
    pub fn issue_recv<T: Element>(&self, mut buffer: Vec<T>, from: GroupRank) -> Work<Vec<T>> {
        let recv = move |group: &ProcessGroup| group.recv(&mut buffer, from).map(|()| buffer);
        match self.lane(from, self.group_rank()) {
            Some(lane) => issue(lane.progress(), self.clone(), recv),
            None => self.issue(recv),
        }
    }
}

fn issue<R: Send + 'static>(
    progress: &Progress,
    group: ProcessGroup,
    call: impl FnOnce(&ProcessGroup) -> Result<R> + Send + 'static,
) -> Work<R> {
    let slot =
        Arc::new(Slot { result: Mutex::new(None), done: Condvar::new(), is_filled: AtomicBool::new(false) });
    let filled = Arc::clone(&slot);
    let started = progress.push(Box::new(move || {
        let result = catch_unwind(AssertUnwindSafe(|| call(&group))).unwrap_or_else(|_| {
            group.abort();
            Err(group.failure().unwrap_or(Error::Aborted { group: group.name().into(), rank: group.rank() }))
        });
        // The rank may leave its world as soon as the result is there, so this handle goes first.
        drop(group);
        filled.fill(result);
    }));
    if let Err(error) = started {
        slot.fill(Err(error));
    }
    Work { slot, runner: progress.thread() }
}

#[cfg(test)]
mod tests;
