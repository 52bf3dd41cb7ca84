//! Strangers: clients that have not proved the token yet. How many there may be, and who goes when there are more.
//!
//! The oldest goes. A rank sends its token with its first packet, so whoever has been silent longest is the least likely
//! to be one; a rank that is turned out by mistake tries again until its own deadline.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use rustix::process::{Resource, getrlimit};
use tokio::task::AbortHandle;

/// Most strangers at a time: what they hold stays far below the memory and the descriptors of one process.
const MOST: u64 = 1024;

/// All strangers, by age.
pub(super) struct Strangers {
    limit: usize,
    next: Cell<u64>,
    tasks: RefCell<BTreeMap<u64, AbortHandle>>,
}

impl Default for Strangers {
    fn default() -> Self {
        // A quarter of the descriptors that this process may open; the others are for ranks.
        let limit = getrlimit(Resource::Nofile).current.map_or(MOST, |files| MOST.min(files / 4)) as usize;
        Strangers { limit, next: Cell::new(0), tasks: RefCell::default() }
    }
}

impl Strangers {
    /// The number of the next client.
    pub(super) fn next(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }

    /// Takes a client in, whose task has not begun yet.
    pub(super) fn admit(&self, nth: u64, task: AbortHandle) {
        self.tasks.borrow_mut().insert(nth, task);
        if self.tasks.borrow().len() > self.limit {
            self.turn_out_the_oldest();
        }
    }

    /// Ends the connection of the one that has been silent longest.
    pub(super) fn turn_out_the_oldest(&self) {
        if let Some((_, task)) = self.tasks.borrow_mut().pop_first() {
            task.abort();
        }
    }
}

/// A client as long as it is a stranger.
pub(super) struct Stranger<'a> {
    strangers: &'a Strangers,
    nth: u64,
}

impl<'a> Stranger<'a> {
    pub(super) fn new(strangers: &'a Strangers, nth: u64) -> Self {
        Stranger { strangers, nth }
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        self.strangers.tasks.borrow_mut().remove(&self.nth);
    }
}
