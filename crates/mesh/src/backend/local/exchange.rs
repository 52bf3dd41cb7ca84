//! Endpoint and Exchange: how one rank carries one collective through its phases, with deadline and watch.
//!
//! An exchange fills its half, crosses a phase, reads the peers' halves, and so on. At the first phase it also
//! compares fingerprints, so that no rank acts on data of another collective.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::failure::{self, Cause};
use super::ffi::{Mapping, Stage};
use super::liveness::Watch;
use super::segment::HEADER_BYTES;
use crate::backend::fingerprint::Fingerprint;
use crate::{Error, Rank, Result};

/// Looks at the phase before sleeping where ranks outnumber cores. With 4 ranks on 2 cores, 4 KiB all_reduces in a row
/// took 16 µs each with 200 looks and 24 with 0 or 20; 20,000 starve the peer that is waited for and made a barrier 638 µs.
const SPINS: usize = 200;
/// Looks where every rank has a core: longer than waking up takes. With 2 ranks on 2 cores, 1 MiB all_to_alls took 40 µs
/// instead of 76 with 200, and 64 MiB all_reduces 11.1 ms instead of 13.9.
const SPINS_ON_OWN_CORE: usize = 5_000;

/// Times that a rank then offers its core to others before it sleeps, where ranks outnumber cores: the peer that is waited
/// for may want that very core, and need not be woken. 4 ranks on 2 cores moved 4 MiB all_to_alls in 0.84 ms instead of
/// 1.2. Where every rank could have a core it would keep two on one, since only who sleeps is moved to an idle core.
const YIELDS: usize = 20;

/// Longest sleep between two looks at the peers.
const SLICE: Duration = Duration::from_millis(20);

/// One rank's end of one group's segment.
pub(crate) struct Endpoint {
    group: String,
    ranks: Arc<[Rank]>,
    pub(super) me: usize,
    timeout: Duration,
    spins: usize,
    yields: usize,
    mapping: Arc<Mapping>,
    watch: Arc<Watch>,
    progress: Mutex<Progress>,
    failure: OnceLock<Error>,
    outside: Outside,
}

/// What a group that is part of a larger one obeys besides its own rules.
#[derive(Default)]
struct Outside {
    /// Nanoseconds that a call may take; 0 stands for the group's timeout.
    patience: AtomicU64,
    /// Whether to give up, asked now and then while waiting.
    stop: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

/// What moves on with each collective.
struct Progress {
    /// Absent while a collective runs, and for good once one failed.
    stage: Option<Stage>,
    seq: u64,
}

impl Endpoint {
    /// The endpoint of group rank `me`; `None` if that rank's place in the segment is taken.
    pub(super) fn new(
        group: String,
        ranks: Arc<[Rank]>,
        me: usize,
        timeout: Duration,
        mapping: Arc<Mapping>,
        watch: Arc<Watch>,
    ) -> Option<Self> {
        let stage = Stage::claim(Arc::clone(&mapping), me)?;
        let progress = Mutex::new(Progress { stage: Some(stage), seq: 0 });
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (spins, yields) =
            if watch.world_size() <= cores { (SPINS_ON_OWN_CORE, 0) } else { (SPINS, YIELDS) };
        Some(Endpoint {
            group,
            ranks,
            me,
            timeout,
            spins,
            yields,
            mapping,
            watch,
            progress,
            failure: OnceLock::new(),
            outside: Outside::default(),
        })
    }

    /// Lets calls give up with `Aborted` once `stop` says so.
    #[cfg(feature = "mpi")]
    pub(crate) fn stop_when(&self, stop: impl Fn() -> bool + Send + Sync + 'static) {
        let _set_before = self.outside.stop.set(Box::new(stop));
    }

    /// How long the calls that follow may take.
    #[cfg(feature = "mpi")]
    pub(crate) fn set_patience(&self, patience: Duration) {
        let nanos = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        self.outside.patience.store(nanos, Ordering::Relaxed);
    }

    fn patience(&self) -> Duration {
        match self.outside.patience.load(Ordering::Relaxed) {
            0 => self.timeout,
            nanos => Duration::from_nanos(nanos),
        }
    }

    fn is_stopped(&self) -> bool {
        self.outside.stop.get().is_some_and(|stop| stop())
    }

    /// Carries out one collective. `fingerprint` gets its sequence number; `body` crosses at least one phase.
    pub(super) fn run(
        &self,
        fingerprint: impl FnOnce(u64) -> Fingerprint,
        body: impl FnOnce(Exchange<'_>) -> Result<Exchange<'_>>,
    ) -> Result<()> {
        let mut progress = self.lock();
        progress.seq += 1;
        let call = fingerprint(progress.seq);
        let result = self.begin(&mut progress, call).and_then(body);
        match result {
            Ok(exchange) => progress.stage = Some(exchange.stage),
            Err(error) => return Err(self.failure.get_or_init(|| error).clone()),
        }
        Ok(())
    }

    /// Fails the group for all ranks.
    pub(super) fn abort(&self) {
        let cause = failure::record(&self.mapping, Cause::Aborted(self.me));
        self.failure.get_or_init(|| self.error(cause, &Fingerprint::barrier(0)));
    }

    /// What a call would find before it began, without a call.
    #[cfg(feature = "nccl")]
    pub(super) fn watch(&self) -> Result<()> {
        let call = Fingerprint::barrier(0);
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if let Some(rank) = self.watch.look() {
            return Err(self.failure.get_or_init(|| self.lost(rank, &call)).clone());
        }
        match failure::read(&self.mapping) {
            Some(cause) => Err(self.failure.get_or_init(|| self.error(cause, &call)).clone()),
            None => Ok(()),
        }
    }

    pub(super) fn failure(&self) -> Option<Error> {
        let aborted = || match failure::read(&self.mapping) {
            // Another rank's, of which no collective has told this one yet.
            Some(Cause::Aborted(g)) => Some(self.aborted(g)),
            _ => None,
        };
        self.failure.get().cloned().or_else(aborted)
    }

    fn aborted(&self, g: usize) -> Error {
        Error::Aborted { group: self.group.clone(), rank: self.ranks[g] }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        // A panic inside a collective leaves no stage, which `begin` turns into an error.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, progress: &mut Progress, call: Fingerprint) -> Result<Exchange<'_>> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if let Some(rank) = self.watch.recent() {
            return Err(self.lost(rank, &call));
        }
        if let Some(cause) = failure::read(&self.mapping) {
            return Err(self.error(cause, &call));
        }
        let Some(stage) = progress.stage.take() else {
            return Err(self.error(failure::record(&self.mapping, Cause::Aborted(self.me)), &call));
        };
        let deadline = Instant::now().checked_add(self.patience());
        Ok(Exchange { endpoint: self, stage, call, deadline, compared: false })
    }

    /// Waits for phase `target` a little: spins, yields, then sleeps for a slice, then looks whether to give up.
    fn wait(&self, target: u32, call: &Fingerprint, deadline: Option<Instant>) -> Result<()> {
        for _ in 0..self.spins {
            if self.mapping.phase() == target {
                return Ok(());
            }
            spin_loop();
        }
        for _ in 0..self.yields {
            std::thread::yield_now();
            if self.mapping.phase() == target {
                return Ok(());
            }
        }
        let left =
            deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()));
        match self.mapping.sleep(target.wrapping_sub(1), left.min(SLICE)) {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR) if !left.is_zero() => Ok(()),
            Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => self.look(target, call, left),
            Err(errno) => Err(super::system("futex", errno)),
        }
    }

    /// Fails if the phase can no more be reached, or not in time.
    fn look(&self, target: u32, call: &Fingerprint, left: Duration) -> Result<()> {
        if self.mapping.phase() == target {
            return Ok(());
        }
        if let Some(rank) = self.watch.look() {
            return Err(self.lost(rank, call));
        }
        if let Some(cause) = failure::read(&self.mapping) {
            return Err(self.error(cause, call));
        }
        if self.is_stopped() {
            return Err(self.error(Cause::Aborted(self.me), call));
        }
        let cause = match self.departed(target) {
            Some(rank) => Cause::Departed(rank),
            None if left <= SLICE && self.mapping.phase() != target => Cause::Timeout(self.arrived(target)),
            None => return Ok(()),
        };
        Err(self.error(failure::record(&self.mapping, cause), call))
    }

    /// The first group rank that left without arriving at phase `target`.
    fn departed(&self, target: u32) -> Option<usize> {
        // A rank departs after its last arrival, so once it is seen departed its arrivals are final.
        (0..self.ranks.len())
            .find(|g| self.watch.has_departed(self.ranks[*g]) && self.mapping.arrived(*g) != target)
    }

    fn arrived(&self, target: u32) -> Vec<bool> {
        (0..self.ranks.len()).map(|g| self.mapping.arrived(g) == target).collect()
    }

    fn lost(&self, rank: Rank, call: &Fingerprint) -> Error {
        Error::PeerLost {
            group: self.group.clone(),
            rank,
            reporter: self.ranks[self.me],
            op: call.describe(),
            seq: call.seq(),
        }
    }

    fn error(&self, cause: Cause, call: &Fingerprint) -> Error {
        match cause {
            Cause::Departed(g) => self.lost(self.ranks[g], call),
            Cause::Aborted(g) => self.aborted(g),
            Cause::Timeout(arrived) => {
                let (arrived, missing): (Vec<_>, Vec<_>) = (0..arrived.len()).partition(|g| arrived[*g]);
                let name = |group_ranks: Vec<usize>| group_ranks.iter().map(|g| self.ranks[*g]).collect();
                Error::Timeout {
                    group: self.group.clone(),
                    op: call.describe(),
                    seq: call.seq(),
                    timeout: self.timeout,
                    arrived: name(arrived),
                    missing: name(missing),
                }
            }
        }
    }
}

/// One collective under way.
pub(super) struct Exchange<'a> {
    endpoint: &'a Endpoint,
    stage: Stage,
    call: Fingerprint,
    /// `None` if it is too far away to be represented.
    deadline: Option<Instant>,
    compared: bool,
}

impl<'a> Exchange<'a> {
    pub(super) fn ranks(&self) -> usize {
        self.endpoint.ranks.len()
    }

    /// The collective's name.
    pub(super) fn name(&self) -> &'static str {
        self.call.name()
    }

    pub(super) fn me(&self) -> usize {
        self.endpoint.me
    }

    /// Group ranks other than this one, beginning with the next, so that ranks do not all read the same half.
    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (me, ranks) = (self.me(), self.ranks());
        (me + 1..me + ranks).map(move |g| g % ranks)
    }

    /// The data to pass on at the next crossing.
    pub(super) fn fill(&mut self) -> &mut [u8] {
        &mut self.stage.fill()[HEADER_BYTES..]
    }

    /// The data that group rank `rank` passed on at the last crossing.
    pub(super) fn peer(&self, rank: usize) -> &[u8] {
        &self.stage.peer(rank)[HEADER_BYTES..]
    }

    /// The data of all ranks, in rank order, and what to fill meanwhile.
    pub(super) fn views(&mut self) -> (Vec<&[u8]>, &mut [u8]) {
        let ranks = self.ranks();
        let (stage, fill) = self.stage.views();
        ((0..ranks).map(|g| &stage.peer(g)[HEADER_BYTES..]).collect(), &mut fill[HEADER_BYTES..])
    }

    /// Passes on what was filled and waits for all ranks.
    ///
    /// # Errors
    /// `PeerLost`, `Timeout`, `Aborted`; the first time also `Mismatch`, the same on every rank.
    pub(super) fn cross(mut self) -> Result<Self> {
        if !self.compared {
            self.call.write(self.stage.fill());
        }
        let Exchange { endpoint, stage, call, deadline, compared } = self;
        let stage = stage.cross(|target| endpoint.wait(target, &call, deadline))?;
        let crossed = Exchange { endpoint, stage, call, deadline, compared: true };
        if !compared {
            crossed.compare()?;
        }
        Ok(crossed)
    }

    /// Compares all ranks' fingerprints with the first rank's.
    fn compare(&self) -> Result<()> {
        let expected = Fingerprint::read(self.stage.peer(0));
        for g in 1..self.ranks() {
            let got = Fingerprint::read(self.stage.peer(g));
            if got != expected {
                return Err(self.mismatch(0, expected.describe(), g, got.describe()));
            }
        }
        Ok(())
    }

    /// A mismatch between two group ranks; `seq` is equal on all, since they count the same phases.
    pub(super) fn mismatch(
        &self,
        expected_rank: usize,
        expected: String,
        got_rank: usize,
        got: String,
    ) -> Error {
        Error::Mismatch {
            group: self.endpoint.group.clone(),
            seq: Fingerprint::read(self.stage.peer(0)).seq(),
            expected_rank: self.endpoint.ranks[expected_rank],
            expected,
            got_rank: self.endpoint.ranks[got_rank],
            got,
        }
    }
}
