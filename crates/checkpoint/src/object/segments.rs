//! Reading ahead: what is going to be read of a file, cut into ranges that are got before somebody waits for them.
//!
//! ```text
//! expected    |####################|   |###########|     what the load said it reads
//! segments    | 8 MiB | 8 MiB |    |   | 8 MiB | 3 |
//!               being    got    got
//!               read
//! ```
//!
//! A segment stays in memory until all of it was read. Over all files of a reader as many are got ahead as its window has
//! places, and as many again because somebody waits for them, so that one thread's reading ahead does not keep others from
//! theirs. A read that finds no place gets its bytes by itself, and no read waits for a place.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::prefix::Request;
use crate::{Error, Result};

/// How many segments a reader may hold.
#[derive(Debug)]
pub(super) struct Window {
    places: usize,
    taken: AtomicUsize,
}

/// The segments of one file, in order.
pub(super) struct Segments {
    window: Arc<Window>,
    all: Mutex<Vec<Arc<Segment>>>,
}

struct Segment {
    range: Range<u64>,
    state: Mutex<State>,
}

enum State {
    Ahead,
    /// With the length of the object.
    Requested(Request<(Bytes, u64)>),
    /// And how many of its bytes were not read yet.
    Here(Bytes, usize),
    /// What it was requested for failed.
    Failed(Error),
    /// All of it was read.
    Read,
}

/// The object that segments are of.
pub(super) trait Source {
    /// Begins to get a range; with it comes the length of the whole object.
    fn get(&self, range: Range<u64>) -> Request<(Bytes, u64)>;

    /// The bytes that came, if they are as many as wanted and the object is as long as its file.
    fn accept(&self, wanted: u64, came: (Bytes, u64)) -> Result<Bytes>;
}

impl Window {
    pub(super) fn new(places: usize) -> Self {
        Self { places: places.max(1), taken: AtomicUsize::new(0) }
    }

    /// A place for what is got ahead.
    fn take_ahead(&self) -> bool {
        self.take(self.places)
    }

    /// A place for what somebody waits for.
    fn take_now(&self) -> bool {
        self.take(2 * self.places)
    }

    fn take(&self, places: usize) -> bool {
        let take = |taken: usize| (taken < places).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn give_back(&self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Segments {
    pub(super) fn new(window: Arc<Window>) -> Self {
        Self { window, all: Mutex::new(Vec::new()) }
    }

    /// Cuts what is going to be read into segments; forgets those of before.
    pub(super) fn expect(&self, ranges: Vec<Range<u64>>, segment_bytes: usize) {
        let cut = ranges.into_iter().flat_map(|range| cut(range, segment_bytes));
        let new = cut.map(|range| Arc::new(Segment { range, state: Mutex::new(State::Ahead) })).collect();
        let old = std::mem::replace(&mut *lock(&self.all), new);
        old.iter().for_each(|segment| segment.forget(&self.window));
    }

    /// Copies the bytes from `offset` on to `to`.
    pub(super) fn read(
        &self,
        offset: u64,
        to: &mut [u8],
        segment_bytes: usize,
        source: &dyn Source,
    ) -> Result<()> {
        let (mut offset, mut to) = (offset, to);
        while !to.is_empty() {
            let (segment, end) = self.find(offset, source);
            let len = end.map_or(to.len(), |end| to.len().min((end - offset) as usize));
            let (now, later) = to.split_at_mut(len);
            let is_copied = match &segment {
                Some(segment) => segment.copy(offset, now, &self.window, source)?,
                None => false,
            };
            if !is_copied {
                read_through(offset, now, segment_bytes, self.window.places, source)?;
            }
            offset += len as u64;
            to = later;
        }
        Ok(())
    }

    /// The segment at an offset, and where it, or the hole between segments that the offset is in, ends. The segments
    /// after it are requested, as many as there are places.
    fn find(&self, offset: u64, source: &dyn Source) -> (Option<Arc<Segment>>, Option<u64>) {
        let all = lock(&self.all);
        let nth = all.partition_point(|segment| segment.range.end <= offset);
        let Some(found) = all.get(nth) else { return (None, None) };
        if offset < found.range.start {
            return (None, Some(found.range.start));
        }
        let mut is_found = true;
        for segment in &all[nth..] {
            // One that another thread copies from was requested long ago.
            let Ok(mut state) = segment.state.try_lock() else { continue };
            if matches!(*state, State::Ahead) {
                let has_place = if is_found { self.window.take_now() } else { self.window.take_ahead() };
                if !has_place {
                    break;
                }
                *state = State::Requested(source.get(segment.range.clone()));
            }
            is_found = false;
        }
        (Some(Arc::clone(found)), Some(found.range.end))
    }
}

impl Segment {
    /// Copies from the segment, if it has a place in the window or gets one.
    fn copy(&self, offset: u64, to: &mut [u8], window: &Window, source: &dyn Source) -> Result<bool> {
        let mut state = lock(&self.state);
        if matches!(*state, State::Ahead) && window.take_now() {
            *state = State::Requested(source.get(self.range.clone()));
        }
        *state = match std::mem::replace(&mut *state, State::Read) {
            State::Requested(request) => {
                match request.wait().and_then(|came| source.accept(self.range.end - self.range.start, came)) {
                    Ok(bytes) => {
                        let len = bytes.len();
                        State::Here(bytes, len)
                    }
                    Err(error) => {
                        window.give_back();
                        State::Failed(error)
                    }
                }
            }
            other => other,
        };
        let unread = match &mut *state {
            State::Here(bytes, unread) => {
                let start = (offset - self.range.start) as usize;
                to.copy_from_slice(&bytes[start..start + to.len()]);
                *unread = unread.saturating_sub(to.len());
                *unread
            }
            State::Failed(error) => return Err(error.clone()),
            _ => return Ok(false),
        };
        if unread == 0 {
            *state = State::Read;
            window.give_back();
        }
        Ok(true)
    }

    fn forget(&self, window: &Window) {
        let old = std::mem::replace(&mut *lock(&self.state), State::Read);
        if matches!(old, State::Requested(_) | State::Here(..)) {
            window.give_back();
        }
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        self.expect(Vec::new(), 1);
    }
}

/// Gets what no segment has, in pieces of which several are under way.
fn read_through(
    offset: u64,
    to: &mut [u8],
    piece_bytes: usize,
    in_flight: usize,
    source: &dyn Source,
) -> Result<()> {
    let end = offset + to.len() as u64;
    let mut ahead = cut(offset..end, piece_bytes);
    let mut under_way: VecDeque<_> = ahead.by_ref().take(in_flight).map(|range| source.get(range)).collect();
    for piece in to.chunks_mut(piece_bytes.max(1)) {
        let Some(request) = under_way.pop_front() else {
            unreachable!("there are as many requests as pieces");
        };
        piece.copy_from_slice(&source.accept(piece.len() as u64, request.wait()?)?);
        under_way.extend(ahead.next().map(|range| source.get(range)));
    }
    Ok(())
}

/// A range in pieces of at most that length.
fn cut(range: Range<u64>, len: usize) -> impl Iterator<Item = Range<u64>> {
    let (end, len) = (range.end, len.max(1));
    range.step_by(len).map(move |start| start..(start + len as u64).min(end))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
