//! Who of the world is still there. One rank's watch over all others; no collective data.
//!
//! A rank is *lost* if its process died, or its thread panicked, before it left. Whoever sees it first records it
//! in the world's segment, so that all ranks name the same one, in every group of that world. A rank that
//! *departed* dropped its last handle: only who still needs it fails.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::ffi::Mapping;
use super::segment::{GroupWord, RankWord};
use crate::Rank;

const DEPARTED: u32 = 1;

/// How old the last look at the peers may be when a collective starts.
const STALE: Duration = Duration::from_millis(100);

/// One rank's view of which ranks of the world live.
pub(super) struct Watch {
    world: Arc<Mapping>,
    rank: Rank,
    /// One for each world rank, readable once that process is gone; none where ranks are threads.
    pidfds: Vec<OwnedFd>,
    origin: Instant,
    looked_ms: AtomicU64,
}

impl Watch {
    pub(super) fn new(world: Arc<Mapping>, rank: Rank, pidfds: Vec<OwnedFd>) -> Self {
        Watch { world, rank, pidfds, origin: Instant::now(), looked_ms: AtomicU64::new(0) }
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    pub(super) fn world_size(&self) -> usize {
        self.world.geometry().ranks()
    }

    /// The rank that was lost first, as far as anyone has recorded.
    pub(super) fn recorded(&self) -> Option<Rank> {
        let word = self.world.group_word(GroupWord::Lost).load(Ordering::Acquire);
        (word as usize).checked_sub(1).map(Rank)
    }

    /// The rank that was lost first, after a look at the processes unless one was made a moment ago.
    pub(super) fn recent(&self) -> Option<Rank> {
        let last = Duration::from_millis(self.looked_ms.load(Ordering::Relaxed));
        let stale = self.origin.elapsed().saturating_sub(last) > STALE;
        if stale { self.look() } else { self.recorded() }
    }

    /// The rank that was lost first, after a look at the processes.
    pub(super) fn look(&self) -> Option<Rank> {
        self.looked_ms.store(self.origin.elapsed().as_millis() as u64, Ordering::Relaxed);
        if self.recorded().is_none() {
            self.dead().into_iter().filter(|rank| !self.has_departed(*rank)).for_each(|rank| self.lose(rank));
        }
        self.recorded()
    }

    /// Whether `rank` left in good order.
    pub(super) fn has_departed(&self, rank: Rank) -> bool {
        self.world.rank_word(rank.0, RankWord::Membership).load(Ordering::Acquire) == DEPARTED
    }

    /// Whether `rank` departed or was lost first.
    pub(super) fn is_gone(&self, rank: Rank) -> bool {
        self.has_departed(rank) || self.recorded() == Some(rank)
    }

    /// Leaves the world: departed, or lost if a panic is what takes this rank away.
    pub(super) fn leave(&self, panicking: bool) {
        if panicking {
            self.lose(self.rank);
        } else {
            self.world.rank_word(self.rank.0, RankWord::Membership).store(DEPARTED, Ordering::Release);
        }
    }

    /// Records a loss unless another one came first.
    fn lose(&self, rank: Rank) {
        let lost = self.world.group_word(GroupWord::Lost);
        let _first = lost.compare_exchange(0, rank.0 as u32 + 1, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Ranks whose process has ended. A poll that fails sees none: the next one comes in a moment.
    fn dead(&self) -> Vec<Rank> {
        let mut polled: Vec<_> = self.pidfds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if polled.is_empty() || poll(&mut polled, Some(&now)).is_err() {
            return Vec::new();
        }
        let ended = polled.iter().enumerate().filter(|(_, fd)| !fd.revents().is_empty());
        ended.map(|(rank, _)| Rank(rank)).collect()
    }
}
