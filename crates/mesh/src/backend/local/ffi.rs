//! The backend's unsafe file, beside `copy.rs`: a shared mapping, its control words, and the halves as borrowed slices.
//!
//! # Why the slices are sound
//!
//! Every rank owns two halves and fills them in turn: what it passes on at phase p lies in half p % 2. A rank that
//! has crossed phase p reads every rank's half p % 2 and fills its own half (p + 1) % 2.
//!
//! - *Nobody writes what I read.* The half p % 2 of a peer is written again only after that peer crossed p + 1,
//!   which it cannot before I arrive at p + 1. Arriving takes the [`Stage`] by value, so no slice lives then.
//! - *Nobody reads what I write.* My half (p + 1) % 2 was passed on at p − 1. Who reads it has not arrived at p,
//!   but I have crossed p, so all have.
//! - *Memory order.* An arrival is a release and the crossing an acquire of the same counter, see
//!   [`Barrier`]; what a peer wrote before it arrived is visible after. Its tests explore interleavings of small
//!   worlds.
//! - *One writer a half.* A `Stage` is made once for each rank ([`Stage::claim`]) and is not `Clone`.
//! - *After a failure* the stage is gone, consumed by the crossing that failed.
//!
//! It holds between processes as far as all that map the segment run this file; the bootstrap hands it only to
//! processes of the same user that know the world's token.

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::futex;

use super::barrier::Barrier;
use super::segment::{BarrierWord, Geometry, GroupWord, HALF_BYTES, RankWord};

/// Shorter buffers gain nothing that would be worth a system call.
const HUGE_BUFFER: usize = 4 << 20;

/// Asks the kernel for huge pages under a buffer that is about to be filled for the first time.
///
/// Fresh memory is handed out and zeroed a page at a time as it is touched, which for pages of 4 KiB takes longer than
/// moving the data: a gather of 256 MiB on each of 4 ranks spent two thirds of its time there. Short buffers are left
/// alone, and a kernel that does not listen is no failure.
pub fn prefer_huge_pages(buffer: &mut [u8]) {
    if buffer.len() < HUGE_BUFFER {
        return;
    }
    let page = rustix::param::page_size();
    let first = buffer.as_ptr().align_offset(page).min(buffer.len());
    let whole_pages = &mut buffer[first..];
    let len = whole_pages.len() / page * page;
    let start = whole_pages.as_mut_ptr().cast();
    // SAFETY: `len` bytes from `start` are whole pages inside `buffer`, which is borrowed exclusively; this advice
    // changes no content and keeps the pages mapped.
    let _unheeded = unsafe { rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxHugepage) };
}

/// A mapped segment.
pub(super) struct Mapping {
    start: NonNull<u8>,
    geometry: Geometry,
}

// SAFETY: a mapping belongs to the process, not to the thread that made it, and `munmap` may come from any.
unsafe impl Send for Mapping {}
// SAFETY: through `&Mapping` safe code reaches only the control words, which are atomics; the halves are reached
// through `Stage`, which keeps writers and readers apart across threads as it does across processes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a new segment of zeros that this process alone can see.
    pub(super) fn anonymous(geometry: Geometry) -> rustix::io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the address is null, so the kernel chooses one that overlaps no other mapping.
        let start =
            unsafe { rustix::mm::mmap_anonymous(null_mut(), geometry.len_bytes(), prot, MapFlags::SHARED) }?;
        Self::from_raw(start, geometry)
    }

    /// Maps the segment behind `fd`, which the caller has found sealed against shrinking and long enough.
    ///
    /// Were it shorter, touching it would kill the process by SIGBUS; it is no undefined behaviour.
    pub(super) fn of_fd(fd: BorrowedFd<'_>, geometry: Geometry) -> rustix::io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the address is null, so the kernel chooses one that overlaps no other mapping.
        let start =
            unsafe { rustix::mm::mmap(null_mut(), geometry.len_bytes(), prot, MapFlags::SHARED, fd, 0) }?;
        Self::from_raw(start, geometry)
    }

    fn from_raw(start: *mut c_void, geometry: Geometry) -> rustix::io::Result<Self> {
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Mapping { start, geometry })
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// A control word of the group.
    pub(super) fn group_word(&self, word: GroupWord) -> &AtomicU32 {
        &self.control()[self.geometry.group_word(word)]
    }

    /// A control word of group rank `rank`.
    pub(super) fn rank_word(&self, rank: usize, word: RankWord) -> &AtomicU32 {
        &self.control()[self.geometry.rank_word(rank, word)]
    }

    /// The last phase that all ranks reached.
    pub(super) fn phase(&self) -> u32 {
        self.barrier_word(BarrierWord::Phase).load(Ordering::Acquire)
    }

    /// The phase that rank `rank` arrived at last.
    pub(super) fn arrived(&self, rank: usize) -> u32 {
        self.barrier_word(BarrierWord::Arrived(rank)).load(Ordering::Acquire)
    }

    /// Sleeps while the phase is `current`, for `limit` at most; it may wake early.
    pub(super) fn sleep(&self, current: u32, limit: Duration) -> rustix::io::Result<()> {
        let limit = futex::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        futex::wait(self.barrier_word(BarrierWord::Phase), futex::Flags::empty(), current, Some(&limit))
    }

    /// The phase barrier as rank `rank` sees it.
    fn barrier(&self, rank: usize) -> Barrier<'_, AtomicU32> {
        Barrier {
            ranks: self.geometry.ranks() as u32,
            arrivals: self.barrier_word(BarrierWord::Arrivals),
            phase: self.barrier_word(BarrierWord::Phase),
            arrived: self.barrier_word(BarrierWord::Arrived(rank)),
        }
    }

    fn barrier_word(&self, word: BarrierWord) -> &AtomicU32 {
        &self.control()[self.geometry.barrier_word(word)]
    }

    fn control(&self) -> &[AtomicU32] {
        let start = self.start.as_ptr().cast::<AtomicU32>();
        // SAFETY: non-null, and page-aligned as mmap returns it; valid for reads and writes over the control area,
        // which starts the mapping; initialized, since a new segment is zero and any bits are an AtomicU32; never
        // accessed but through this function, so only atomically; mapped until drop, which `&self` outlives.
        unsafe { std::slice::from_raw_parts(start, self.geometry.control_words()) }
    }

    /// Start of a half.
    fn half(&self, rank: usize, parity: usize) -> *mut u8 {
        assert!(rank < self.geometry.ranks() && parity < 2, "no half {parity} of rank {rank}");
        let offset = self.geometry.half_offset(rank, parity);
        // SAFETY: the offset is below the mapping's length for an existing rank (checked above), which fits isize
        // as mmap succeeded, and the result stays inside the mapping.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: address and length are those that mmap was given; `&mut self` in drop means that no slice or
        // word borrowed from the mapping lives.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.geometry.len_bytes()) };
        debug_assert!(unmapped.is_ok());
    }
}

/// One rank's right to fill its own halves and to read the others', between two phases.
pub(super) struct Stage {
    mapping: Arc<Mapping>,
    me: usize,
    phase: u32,
}

impl Stage {
    /// The stage of rank `me`; `None` if it was given out before or there is no such rank.
    pub(super) fn claim(mapping: Arc<Mapping>, me: usize) -> Option<Stage> {
        if me >= mapping.geometry.ranks() {
            return None;
        }
        let first = mapping.barrier_word(BarrierWord::Claimed(me)).swap(1, Ordering::AcqRel) == 0;
        first.then_some(Stage { mapping, me, phase: 0 })
    }

    /// What rank `rank` passed on at the phase crossed last.
    pub(super) fn peer(&self, rank: usize) -> &[u8] {
        let start = self.mapping.half(rank, (self.phase % 2) as usize);
        // SAFETY: non-null, aligned for u8, and valid for HALF_BYTES inside the mapping, which `self` keeps; zeroed
        // or written bytes are initialized; not written while the slice lives: see "nobody writes what I read"
        // above, and own `fill` slices are of the other half.
        unsafe { std::slice::from_raw_parts(start, HALF_BYTES) }
    }

    /// The half to be passed on at the next phase.
    pub(super) fn fill(&mut self) -> &mut [u8] {
        self.views().1
    }

    /// [`Stage::peer`] and [`Stage::fill`] at the same time.
    pub(super) fn views(&mut self) -> (&Stage, &mut [u8]) {
        let start = self.mapping.half(self.me, (self.phase.wrapping_add(1) % 2) as usize);
        // SAFETY: non-null, aligned for u8, and valid for HALF_BYTES inside the mapping, which `self` keeps;
        // initialized as above; not accessed by others while the slice lives: see "nobody reads what I write", and
        // not through this stage: `fill` and `views` need `&mut self`, and `peer` is of the other half.
        let fill = unsafe { std::slice::from_raw_parts_mut(start, HALF_BYTES) };
        (self, fill)
    }

    /// Arrives at the next phase and returns once all ranks have, or with the error of `wait`.
    ///
    /// `wait` is called with the number of the phase as long as it is not reached. It may return early.
    pub(super) fn cross<E>(mut self, mut wait: impl FnMut(u32) -> Result<(), E>) -> Result<Stage, E> {
        let target = self.phase.wrapping_add(1);
        let barrier = self.mapping.barrier(self.me);
        barrier.arrive(target);
        while !barrier.is_open(target) {
            wait(target)?;
        }
        self.phase = target;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn a_stage_is_given_out_once() {
        let mapping = Arc::new(Mapping::anonymous(Geometry::new(2)).unwrap());
        assert!(Stage::claim(Arc::clone(&mapping), 0).is_some());
        assert!(Stage::claim(Arc::clone(&mapping), 0).is_none());
        assert!(Stage::claim(mapping, 2).is_none());
    }

    #[test]
    fn what_one_rank_fills_all_see_after_the_crossing_and_until_the_next() {
        let mapping = Arc::new(Mapping::anonymous(Geometry::new(2)).unwrap());
        let rank = |me: usize| {
            let mut stage = Stage::claim(Arc::clone(&mapping), me).unwrap();
            for phase in 0..1000u32 {
                stage.fill()[me * 8..][..4].copy_from_slice(&phase.to_ne_bytes());
                let wait = |_| {
                    std::thread::yield_now();
                    Ok::<_, Infallible>(())
                };
                let Ok(crossed) = stage.cross(wait);
                stage = crossed;
                let (stage, fill) = stage.views();
                fill[me * 8..][..4].fill(0xff);
                for g in 0..2 {
                    assert_eq!(stage.peer(g)[g * 8..][..4], phase.to_ne_bytes(), "rank {g}, phase {phase}");
                }
            }
        };
        std::thread::scope(|scope| {
            (0..2).for_each(|me| {
                drop(scope.spawn({
                    let rank = &rank;
                    move || rank(me)
                }))
            });
        });
    }
}
