//! What the machine can do at all: plain writes and reads of as many bytes, by whichever way is the fastest here.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that begin on a page, as direct writes need them.
pub(super) struct Pages {
    memory: Vec<u8>,
    start: usize,
}

impl Pages {
    pub(super) fn new(len: usize) -> Self {
        let memory = vec![7; len + 4096];
        let start = memory.as_ptr().align_offset(4096);
        Self { memory, start }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.memory.len() - 4096]
    }
}

const STEP: usize = 1 << 20;
const DIRECT_STEP: usize = 4 << 20;

/// A new file, on the device when this returns. In memory by one thread; on a disk past the page cache by four.
pub(super) fn write(path: &Path, source: &Pages) {
    let bytes = source.bytes();
    let file = OpenOptions::new().write(true).create_new(true).open(path).unwrap();
    if path.starts_with("/dev/shm") {
        for (nth, step) in bytes.chunks(STEP).enumerate() {
            file.write_all_at(step, (nth * STEP) as u64).unwrap();
        }
        return;
    }
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes.len() as u64).unwrap();
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = OpenOptions::new().write(true).custom_flags(direct).open(path).unwrap();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(step) = bytes.chunks(DIRECT_STEP).nth(next.fetch_add(1, Ordering::Relaxed)) {
                    file.write_all_at(step, (step.as_ptr() as usize - bytes.as_ptr() as usize) as u64)
                        .unwrap();
                }
            });
        }
    });
    file.sync_all().unwrap();
}

/// A cached file into memory that was touched before.
pub(super) fn read(path: &Path, to: &mut [u8]) {
    let file = File::open(path).unwrap();
    for (nth, step) in to.chunks_mut(STEP).enumerate() {
        file.read_exact_at(step, (nth * STEP) as u64).unwrap();
    }
}
