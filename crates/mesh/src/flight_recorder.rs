//! FlightRecorder: the last collectives of a group as one rank saw them, for the person who looks why it hangs.
//!
//! Here: the ring and what is made of it, text and timeline. `backend/recorded.rs` feeds it.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Thread, current};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::backend::Call;
use crate::{Rank, ReduceOp, Result};

/// Collectives kept of each group.
const KEPT: usize = 1024;

/// The last collectives of one group on one rank.
///
/// Its `Display` is a table for people.
///
/// # Source
/// `torch.distributed`'s Flight Recorder (`TORCH_FR_BUFFER_SIZE`, `_dump_nccl_trace`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlightRecord {
    /// Name of the group.
    pub group: String,
    /// The rank that recorded it.
    pub rank: Rank,
    /// The group's ranks.
    pub ranks: Vec<Rank>,
    /// In the order of issue; older ones are gone.
    pub collectives: Vec<CollectiveRecord>,
}

/// One collective on one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectiveRecord {
    /// Sequence number in its group, from 1.
    pub seq: u64,
    /// The call, as in error messages; sizes are those of this rank's longest buffer.
    pub call: String,
    /// Bytes that this rank takes from the others, by an algorithm that moves the fewest: what it lacks of a gather or
    /// an exchange, the others' terms of a reduction, and of an all_reduce their results as well.
    pub received_bytes: usize,
    /// Name of the thread that made the call.
    pub thread: String,
    /// When it was called, since the Unix epoch.
    pub started: Duration,
    /// How long it took, or has been under way.
    pub elapsed: Duration,
    /// What became of it.
    pub state: CollectiveState,
}

/// What became of a collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CollectiveState {
    /// It waits or moves data.
    Running,
    /// It has returned.
    Completed,
    /// It has returned an error.
    Failed,
}

impl CollectiveState {
    const fn name(self) -> &'static str {
        match self {
            CollectiveState::Running => "running",
            CollectiveState::Completed => "completed",
            CollectiveState::Failed => "failed",
        }
    }
}

/// The ring of one group.
pub(crate) struct FlightRecorder {
    group: String,
    ranks: Arc<[Rank]>,
    rank: Rank,
    /// One moment on both clocks.
    origin: (Instant, SystemTime),
    ring: Mutex<Ring>,
}

struct Ring {
    seq: u64,
    entries: VecDeque<Entry>,
}

struct Entry {
    seq: u64,
    call: Described,
    thread: Thread,
    started: Instant,
    ended: Option<(Instant, CollectiveState)>,
}

/// A call with what is shown of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Described {
    pub(crate) call: Option<Call>,
    pub(crate) op: Option<ReduceOp>,
    pub(crate) bytes: usize,
    pub(crate) received: usize,
}

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(call) = self.call else { return f.write_str("barrier()") };
        write!(f, "{}(", call.name.name())?;
        self.op.map_or(Ok(()), |op| write!(f, "{op}, "))?;
        call.root.map_or(Ok(()), |root| write!(f, "root {root}, "))?;
        write!(f, "{}, {} bytes)", call.dtype, self.bytes)
    }
}

impl FlightRecorder {
    pub(crate) fn new(group: String, ranks: Arc<[Rank]>, rank: Rank) -> Self {
        let ring = Mutex::new(Ring { seq: 0, entries: VecDeque::new() });
        FlightRecorder { group, ranks, rank, origin: (Instant::now(), SystemTime::now()), ring }
    }

    /// Ranks of the group.
    pub(crate) fn n_ranks(&self) -> usize {
        self.ranks.len()
    }

    /// This rank in the group.
    pub(crate) fn group_rank(&self) -> usize {
        self.ranks.iter().position(|rank| *rank == self.rank).unwrap_or(0)
    }

    /// Records that a call begins, and returns its number.
    pub(crate) fn begin(&self, call: Described) -> u64 {
        let entry = |seq| Entry { seq, call, thread: current(), started: Instant::now(), ended: None };
        let mut ring = self.lock();
        ring.seq += 1;
        if ring.entries.len() == KEPT {
            ring.entries.pop_front();
        }
        let entry = entry(ring.seq);
        ring.entries.push_back(entry);
        ring.seq
    }

    /// Records how call `seq` ended.
    pub(crate) fn end(&self, seq: u64, state: CollectiveState) {
        let mut ring = self.lock();
        // It is among the last, unless other threads have made a thousand calls meanwhile.
        if let Some(entry) = ring.entries.iter_mut().rev().find(|entry| entry.seq == seq) {
            entry.ended = Some((Instant::now(), state));
        }
    }

    /// Runs call `seq` in a span of `tracing`, and makes its error an event.
    #[cfg(feature = "tracing")]
    pub(crate) fn in_span(&self, seq: u64, call: &Described, run: impl FnOnce() -> Result<()>) -> Result<()> {
        let (group, rank) = (self.group.as_str(), self.rank.0);
        let name = call.call.map_or("barrier", |call| call.name.name());
        let span = tracing::debug_span!(target: "sconce_mesh", "collective", name, group, rank, seq, %call);
        span.in_scope(run).inspect_err(|error| tracing::error!(target: "sconce_mesh", parent: &span, %error))
    }

    #[cfg(not(feature = "tracing"))]
    pub(crate) fn in_span(
        &self,
        _seq: u64,
        _call: &Described,
        run: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        run()
    }

    pub(crate) fn snapshot(&self) -> FlightRecord {
        let collectives = self.lock().entries.iter().map(|entry| self.record(entry)).collect();
        FlightRecord { group: self.group.clone(), rank: self.rank, ranks: self.ranks.to_vec(), collectives }
    }

    fn record(&self, entry: &Entry) -> CollectiveRecord {
        let (ended, state) = entry.ended.unwrap_or((Instant::now(), CollectiveState::Running));
        let started = self.origin.1 + entry.started.duration_since(self.origin.0);
        CollectiveRecord {
            seq: entry.seq,
            call: entry.call.to_string(),
            received_bytes: entry.call.received,
            thread: entry.thread.name().unwrap_or("unnamed").to_owned(),
            started: started.duration_since(UNIX_EPOCH).unwrap_or_default(),
            elapsed: ended.duration_since(entry.started),
            state,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FlightRecord {
    /// The collectives in Chrome's trace event format, which Perfetto shows: a process a rank, a row a thread.
    ///
    /// Records of several groups or ranks may be passed, whose clocks must agree.
    ///
    /// # Source
    /// "Trace Event Format", JSON array format, complete events (`ph: "X"`); microseconds.
    pub fn timeline(records: &[FlightRecord]) -> String {
        let events = records.iter().flat_map(|record| record.collectives.iter().map(|c| record.event(c)));
        format!("[\n{}\n]\n", events.collect::<Vec<_>>().join(",\n"))
    }

    fn event(&self, collective: &CollectiveRecord) -> String {
        let CollectiveRecord { seq, call, received_bytes, thread, started, elapsed, state } = collective;
        let name = call.split('(').next().unwrap_or(call);
        format!(
            "{{\"name\":{},\"cat\":\"collective\",\"ph\":\"X\",\"ts\":{},\"dur\":{},\"pid\":{},\"tid\":{},\
             \"args\":{{\"group\":{},\"seq\":{seq},\"call\":{},\"received_bytes\":{received_bytes},\"state\":\"{}\"}}}}",
            json(name),
            micros(*started),
            micros(*elapsed),
            self.rank,
            json(thread),
            json(&self.group),
            json(call),
            state.name()
        )
    }
}

impl fmt::Display for FlightRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks: Vec<usize> = self.ranks.iter().map(|rank| rank.0).collect();
        writeln!(f, "group {} of ranks {ranks:?}, as rank {} saw it", self.group, self.rank)?;
        writeln!(f, "{:>8}  {:<9}  {:>17}  {:>12}  call", "seq", "state", "started, Unix s", "elapsed")?;
        self.collectives.iter().try_for_each(|c| {
            let (started, elapsed) = (c.started.as_secs_f64(), format!("{:.1?}", c.elapsed));
            writeln!(f, "{:>8}  {:<9}  {started:>17.6}  {elapsed:>12}  {}", c.seq, c.state.name(), c.call)
        })
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e3
}

/// A JSON string (RFC 8259, section 7).
fn json(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            // Writing to a String cannot fail.
            c if c < ' ' => drop(write!(quoted, "\\u{:04x}", c as u32)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::CallName;
    use crate::{DType, GroupRank};

    fn call(bytes: usize) -> Described {
        let call = Call::rooted(CallName::Reduce, DType::F32, GroupRank(1));
        Described { call: Some(call), op: Some(ReduceOp::Sum), bytes, received: 0 }
    }

    fn recorder() -> FlightRecorder {
        FlightRecorder::new("a \"group\"".into(), [Rank(0), Rank(3)].into(), Rank(3))
    }

    #[test]
    fn the_last_collectives_are_kept_with_their_state() {
        let recorder = recorder();
        for bytes in 0..KEPT + 10 {
            let seq = recorder.begin(call(bytes));
            if bytes % 2 == 0 {
                recorder.end(seq, CollectiveState::Completed);
            }
        }
        let record = recorder.snapshot();
        assert_eq!(record.collectives.len(), KEPT);
        let first = &record.collectives[0];
        assert_eq!((first.seq, &*first.call), (11, "reduce(sum, root 1, f32, 10 bytes)"));
        assert_eq!(first.state, CollectiveState::Completed);
        assert_eq!(record.collectives[KEPT - 1].state, CollectiveState::Running);
        let text = record.to_string();
        assert!(text.starts_with("group a \"group\" of ranks [0, 3], as rank 3 saw it\n"), "{text}");
        assert_eq!(text.lines().count(), KEPT + 2);
    }

    #[cfg(feature = "tracing")]
    #[test]
    fn a_collective_is_a_span_and_its_error_an_event_in_it() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        use tracing::{Event, Metadata, Subscriber, span};

        #[derive(Clone, Default)]
        struct Heard(Arc<[AtomicUsize; 3]>);

        impl Subscriber for Heard {
            fn enabled(&self, metadata: &Metadata<'_>) -> bool {
                metadata.target() == "sconce_mesh"
            }
            fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
                assert_eq!(attributes.metadata().name(), "collective");
                self.0[0].fetch_add(1, Ordering::Relaxed);
                span::Id::from_u64(1)
            }
            fn event(&self, event: &Event<'_>) {
                assert_eq!(event.parent(), Some(&span::Id::from_u64(1)));
                self.0[1].fetch_add(1, Ordering::Relaxed);
            }
            fn enter(&self, _span: &span::Id) {
                self.0[2].fetch_add(1, Ordering::Relaxed);
            }
            fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}
            fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}
            fn exit(&self, _span: &span::Id) {}
        }

        let heard = Heard::default();
        tracing::subscriber::with_default(heard.clone(), || {
            let groups = crate::ProcessGroup::threads(1, crate::GroupOptions::default()).unwrap();
            groups[0].barrier().unwrap();
            groups[0].abort();
            assert!(groups[0].all_reduce(&mut [1f32], ReduceOp::Sum).is_err());
        });
        let counts: Vec<usize> = heard.0.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        assert_eq!(counts, [2, 1, 2]);
    }

    #[test]
    fn a_timeline_is_a_list_of_complete_events() {
        let recorder = recorder();
        recorder.end(recorder.begin(call(4)), CollectiveState::Failed);
        let timeline = FlightRecord::timeline(&[recorder.snapshot(), recorder.snapshot()]);
        assert_eq!(timeline.matches("\"ph\":\"X\"").count(), 2);
        let expected = r#""args":{"group":"a \"group\"","seq":1,"call":"reduce(sum, root 1, f32, 4 bytes)","received_bytes":0,"state":"failed"}}"#;
        assert!(timeline.contains(expected), "{timeline}");
        assert_eq!(json("a\n"), "\"a\\u000a\"");
    }
}
