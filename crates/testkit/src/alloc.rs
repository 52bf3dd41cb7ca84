//! A counting allocator, for tests that claim something about memory. Such a test has a binary of its own, which
//! declares it:
//!
//! ```text
//! #[global_allocator]
//! static ALLOCATOR: CountingAllocator = CountingAllocator;
//! ```
//!
//! What is mapped without the allocator (shared memory, files) is not counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counting the bytes that are allocated.
#[derive(Debug)]
pub struct CountingAllocator;

/// Bytes that are allocated now.
pub fn live_bytes() -> usize {
    LIVE.load(Relaxed)
}

/// Runs `f` and returns its result and the most bytes that were allocated at a time meanwhile.
pub fn peak_bytes<R>(f: impl FnOnce() -> R) -> (R, usize) {
    PEAK.store(live_bytes(), Relaxed);
    let result = f();
    (result, PEAK.load(Relaxed))
}

fn allocated(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(live, Relaxed);
}

fn freed(bytes: usize) {
    LIVE.fetch_sub(bytes, Relaxed);
}

// SAFETY: every method hands its arguments, unchanged, to the system's allocator and returns what that returns, so that
// the contract of `GlobalAlloc` holds as it does there. Counting neither allocates nor panics.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout has a size above zero, as `System.alloc` needs.
        let pointer = unsafe { System.alloc(layout) };
        if !pointer.is_null() {
            allocated(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout has a size above zero, as `System.alloc_zeroed` needs.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if !pointer.is_null() {
            allocated(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from this allocator, so from the system's, with this layout.
        unsafe { System.dealloc(pointer, layout) };
        freed(layout.size());
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: `pointer` came from this allocator, so from the system's, with this layout; the caller's `size` is
        // above zero and does not overflow when rounded up to the alignment.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        if !moved.is_null() {
            freed(layout.size());
            allocated(size);
        }
        moved
    }
}
