//! Wire: one rank's messages to the other ranks of its world, under a deadline, and the notices that may end a wait.
//!
//! MPI's own collectives are not used: they can be neither given up nor told which rank is missing, they reduce in an
//! order of their own, and they know no bf16.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::block::Block;
use super::ffi::{Fault, Joining, Mpi, Receiving, Sending};
use super::notice::{Cause, NOTICE_BYTES, Notice};
use crate::backend::local::LocalWorld;
use crate::{Error, Rank};

/// Tag of notices. Those of groups are above.
const NOTICE_TAG: usize = 0;
/// Looks at requests before the first pause; a message between processes of one host takes about as long.
const LOOKS: u32 = 200;
/// Longest pause between two looks.
const LONGEST_PAUSE: Duration = Duration::from_micros(500);
/// How long what a rank sent before it left may take to arrive after its notice.
const LATE: Duration = Duration::from_millis(200);
/// How long a rank that leaves waits for its notices to go out.
const FLUSH: Duration = Duration::from_millis(500);

/// What all groups of one rank's world share.
pub(super) struct Wire {
    mpi: Mpi,
    /// The ranks of this host in shared memory, and their ranks in the world; absent where this rank is alone.
    host: Option<(LocalWorld, Vec<Rank>)>,
    notices: Mutex<Notices>,
}

#[derive(Default)]
struct Notices {
    /// The next one to come; absent if MPI refuses.
    next: Option<Receiving>,
    going_out: Vec<Sending>,
    board: Board,
}

/// What this rank has been told.
#[derive(Default)]
struct Board {
    lost: Option<Rank>,
    left: HashMap<usize, Instant>,
    failed: HashMap<u64, Cause>,
}

/// One message to a rank of the world and one from it; an empty one is not sent.
pub(super) struct Parcel {
    pub(super) peer: usize,
    pub(super) out: Option<Arc<Block>>,
    pub(super) len_in: usize,
}

/// The tags of a group's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tags {
    pub(super) send: usize,
    pub(super) receive: usize,
}

/// Why an exchange ended early.
pub(super) enum Stop {
    /// Because of a rank.
    Cause(Cause),
    /// The deadline passed; these ranks of the world are still waited for.
    Deadline(Vec<usize>),
    /// MPI failed.
    Fault(Error),
}

/// Waits for the communicator of a new world.
pub(super) fn join(timeout: Duration) -> Result<Mpi, Stop> {
    let mut joining = Joining::start().map_err(Stop::Fault)?;
    let (started, mut pace) = (Instant::now(), Pace::default());
    loop {
        match joining.test() {
            Ok(Some(mpi)) => return Ok(mpi),
            Ok(None) if started.elapsed() >= timeout => return Err(Stop::Deadline(Vec::new())),
            Ok(None) => pace.wait(),
            Err(Fault::Call(error)) => return Err(Stop::Fault(error)),
            Err(Fault::PeerDied | Fault::SomebodyDied) => return Err(Stop::Deadline(Vec::new())),
        }
    }
}

impl Wire {
    pub(super) fn new(mpi: Mpi) -> Wire {
        Wire { mpi, host: None, notices: Mutex::default() }
    }

    /// The same with the ranks of this host.
    pub(super) fn with_host(mut self, world: LocalWorld, ranks: Vec<Rank>) -> Wire {
        self.host = Some((world, ranks));
        self
    }

    pub(super) fn rank(&self) -> Rank {
        Rank(self.mpi.rank())
    }

    pub(super) fn size(&self) -> usize {
        self.mpi.size()
    }

    pub(super) fn largest_tag(&self) -> usize {
        self.mpi.largest_tag()
    }

    pub(super) fn host(&self) -> Option<&(LocalWorld, Vec<Rank>)> {
        self.host.as_ref()
    }

    /// Why the group of `key` must fail, as far as this rank has been told.
    pub(super) fn cause(&self, key: u64) -> Option<Cause> {
        let notices = self.stir();
        notices.board.lost.map(Cause::Lost).or_else(|| notices.board.failed.get(&key).cloned())
    }

    /// Tells `ranks` that a group failed, and keeps it in mind.
    pub(super) fn announce(&self, ranks: &[Rank], key: u64, cause: &Cause) {
        let mut notices = self.stir();
        let notice = match cause {
            Cause::Lost(rank) => Notice::Lost(*rank),
            cause => Notice::Failed(key, cause.clone()),
        };
        notices.board.file(notice.clone());
        let others = ranks.iter().map(|rank| rank.0).filter(|rank| *rank != self.mpi.rank());
        others.for_each(|rank| notices.post(&self.mpi, rank, &notice));
    }

    /// Sends and receives all parcels, and returns what came, in their order.
    pub(super) fn exchange(
        &self,
        parcels: Vec<Parcel>,
        tags: Tags,
        patience: Duration,
        key: u64,
    ) -> Result<Vec<Block>, Stop> {
        let mut moves = self.start(&parcels, tags)?;
        let (started, mut pace) = (Instant::now(), Pace::default());
        loop {
            let waiting = moves.waiting()?;
            if waiting.is_empty() {
                return Ok(moves.received());
            }
            if pace.is_slow() {
                if let Some(cause) = self.cause(key).or_else(|| self.gone(&waiting)) {
                    return Err(Stop::Cause(cause));
                }
                if started.elapsed() >= patience {
                    return Err(Stop::Deadline(waiting));
                }
            }
            pace.wait();
        }
    }

    /// Receives are posted first, so that no message comes unexpected.
    fn start(&self, parcels: &[Parcel], tags: Tags) -> Result<Moves, Stop> {
        let mut moves = Moves { ins: Vec::new(), outs: Vec::new() };
        for parcel in parcels {
            let fault = |fault| stop_of(fault, parcel.peer);
            let receive = || self.mpi.receive(Some(parcel.peer), tags.receive, parcel.len_in).map_err(fault);
            let incoming = if parcel.len_in > 0 { Some(receive()?) } else { None };
            moves.ins.push((parcel.peer, incoming));
        }
        for parcel in parcels {
            let out = parcel.out.as_ref().filter(|out| !out.bytes().is_empty());
            if let Some(out) = out {
                let sent = self.mpi.send(parcel.peer, tags.send, Arc::clone(out));
                moves.outs.push((parcel.peer, sent.map_err(|fault| stop_of(fault, parcel.peer))?));
            }
        }
        Ok(moves)
    }

    /// A rank among `waiting` that has left; its last messages would be here by now.
    fn gone(&self, waiting: &[usize]) -> Option<Cause> {
        let notices = self.lock();
        let left = |rank: &usize| notices.board.left.get(rank).is_some_and(|seen| seen.elapsed() > LATE);
        waiting.iter().copied().find(left).map(|rank| Cause::Left(Rank(rank)))
    }

    /// Takes in what has come, and looks at the processes of this host and, with ULFM, at all.
    fn stir(&self) -> MutexGuard<'_, Notices> {
        let mut notices = self.lock();
        notices.take_in(&self.mpi);
        notices.going_out.retain_mut(|sending| matches!(sending.test(), Ok(false)));
        if notices.board.lost.is_none()
            && let Some((world, ranks)) = &self.host
            && let Some(lost) = world.lost()
        {
            let notice = Notice::Lost(ranks[lost.0]);
            notices.board.file(notice.clone());
            let elsewhere = (0..self.mpi.size()).filter(|rank| !ranks.contains(&Rank(*rank)));
            elsewhere.for_each(|rank| notices.post(&self.mpi, rank, &notice));
        }
        notices
    }

    fn lock(&self) -> MutexGuard<'_, Notices> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Wire {
    /// Leaves the world and says so to all.
    fn drop(&mut self) {
        let rank = self.rank();
        let mut notices = self.stir();
        let panicking = std::thread::panicking();
        let notice = if panicking { Notice::Lost(rank) } else { Notice::Leaving(rank) };
        let others = (0..self.mpi.size()).filter(|other| *other != rank.0);
        others.for_each(|other| notices.post(&self.mpi, other, &notice));
        let (started, mut pace) = (Instant::now(), Pace::default());
        while !notices.going_out.is_empty() && started.elapsed() < FLUSH {
            notices.going_out.retain_mut(|sending| matches!(sending.test(), Ok(false)));
            pace.wait();
        }
        let board = &notices.board;
        let missing = |cause: &Cause| matches!(cause, Cause::Lost(_) | Cause::Timeout(_));
        let broken = panicking || board.lost.is_some() || board.failed.values().any(missing);
        notices.next = None;
        self.mpi.leave(broken);
    }
}

impl Notices {
    /// Files every notice that has come.
    fn take_in(&mut self, mpi: &Mpi) {
        loop {
            if self.next.is_none() {
                self.next = mpi.receive(None, NOTICE_TAG, NOTICE_BYTES).ok();
            }
            match self.next.as_mut().map(Receiving::test) {
                Some(Ok(true)) => {
                    let bytes = self.next.take().and_then(Receiving::take);
                    let notice = bytes.and_then(|bytes| Notice::decode(bytes.bytes()));
                    notice.into_iter().for_each(|notice| self.board.file(notice));
                }
                Some(Err(Fault::SomebodyDied | Fault::PeerDied)) => {
                    let dead = mpi.dead().unwrap_or_default();
                    return dead.into_iter().for_each(|rank| self.board.file(Notice::Lost(Rank(rank))));
                }
                Some(Ok(false) | Err(Fault::Call(_))) | None => return,
            }
        }
    }

    /// Who cannot be told is gone, or finds out at the deadline.
    fn post(&mut self, mpi: &Mpi, rank: usize, notice: &Notice) {
        self.going_out.extend(mpi.send(rank, NOTICE_TAG, Arc::new(Block::of(&notice.encode()))));
    }
}

impl Board {
    /// The first cause counts. A rank that left in good order is not lost when its process ends.
    fn file(&mut self, notice: Notice) {
        match notice {
            Notice::Leaving(rank) => drop(self.left.entry(rank.0).or_insert_with(Instant::now)),
            Notice::Lost(rank) if self.left.contains_key(&rank.0) => {}
            Notice::Lost(rank) => drop(self.lost.get_or_insert(rank)),
            Notice::Failed(key, cause) => drop(self.failed.entry(key).or_insert(cause)),
        }
    }
}

/// The messages of one exchange.
struct Moves {
    ins: Vec<(usize, Option<Receiving>)>,
    outs: Vec<(usize, Sending)>,
}

impl Moves {
    /// The ranks whose messages are still under way.
    fn waiting(&mut self) -> Result<Vec<usize>, Stop> {
        let mut waiting = Vec::new();
        for (peer, incoming) in &mut self.ins {
            let Some(incoming) = incoming else { continue };
            if !incoming.test().map_err(|fault| stop_of(fault, *peer))? {
                waiting.push(*peer);
            }
        }
        for (peer, out) in &mut self.outs {
            if !out.test().map_err(|fault| stop_of(fault, *peer))? && !waiting.contains(peer) {
                waiting.push(*peer);
            }
        }
        Ok(waiting)
    }

    fn received(self) -> Vec<Block> {
        let block = |incoming: Option<Receiving>| incoming.and_then(Receiving::take);
        self.ins
            .into_iter()
            .map(|(_, incoming)| block(incoming).unwrap_or_else(|| Block::zeroed(0)))
            .collect()
    }
}

fn stop_of(fault: Fault, peer: usize) -> Stop {
    match fault {
        Fault::PeerDied | Fault::SomebodyDied => Stop::Cause(Cause::Lost(Rank(peer))),
        Fault::Call(error) => Stop::Fault(error),
    }
}

/// How often to look: at once, then giving way, then with pauses that grow.
#[derive(Default)]
struct Pace {
    looks: u32,
}

impl Pace {
    fn is_slow(&self) -> bool {
        self.looks >= LOOKS
    }

    fn wait(&mut self) {
        self.looks += 1;
        if self.looks < LOOKS {
            return std::thread::yield_now();
        }
        std::thread::sleep((Duration::from_micros(10) * (self.looks - LOOKS + 1)).min(LONGEST_PAUSE));
    }
}
