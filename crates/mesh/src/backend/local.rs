//! The local backend: ranks of one host, processes or threads, over shared memory and futexes.
//!
//! It needs Linux and nothing installed. Each group has a segment in which every rank owns two halves
//! (`segment.rs`); `ffi.rs` says why its slices are sound, `exchange.rs` runs one collective, `rounds.rs` says what
//! each collective moves.

mod barrier;
mod bootstrap;
mod copy;
mod exchange;
mod failure;
mod fds;
mod ffi;
pub(crate) mod identity;
mod liveness;
mod memfd;
mod rendezvous;
mod rounds;
mod segment;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use self::bootstrap::Offer;
pub use self::copy::copy_past_caches;
pub(crate) use self::exchange::Endpoint;
use self::ffi::Mapping;
pub use self::ffi::prefer_huge_pages;
use self::liveness::Watch;
use self::rendezvous::Joined;
use self::segment::Geometry;
use super::fingerprint::Fingerprint;
use super::{Backend, Call, CallName, Drain, Fill, Invitation, Membership, WorldBackend, text_of};
use crate::{Error, GroupRank, Rank, ReduceOp, Result, Store};

/// One rank's membership of a world of this host. Dropping it leaves the world.
pub(crate) struct LocalWorld {
    watch: Arc<Watch>,
    home: Home,
}

/// How ranks of this world share a new segment.
enum Home {
    /// Segments by group name; they live as long as the world.
    Threads(Arc<Mutex<HashMap<String, Arc<Mapping>>>>),
    /// The world's address, from which those of channels follow.
    Processes(String),
}

impl Membership {
    fn geometry(&self) -> Geometry {
        Geometry::new(self.ranks.len())
    }

    fn endpoint(self, mapping: Arc<Mapping>, watch: Arc<Watch>) -> Result<Endpoint> {
        let Membership { group, ranks, group_rank, timeout } = self;
        let (name, rank) = (group.clone(), ranks[group_rank]);
        Endpoint::new(group, ranks, group_rank, timeout, mapping, watch).ok_or_else(|| {
            Error::InvalidArgument {
                op: "joining a group",
                what: format!("rank {rank} of group {name}"),
                expected: "each rank to join once".into(),
                got: "a second one".into(),
            }
        })
    }
}

impl LocalWorld {
    /// Joins the world as a process.
    ///
    /// # Errors
    /// `Timeout` naming who is missing, `PeerLost`, `Store`, `Backend`.
    pub(crate) fn join(store: &dyn Store, world: Membership) -> Result<(LocalWorld, Endpoint)> {
        let joined = rendezvous::join(store, &world)?;
        Self::of_joined(world, joined)
    }

    /// What the first rank of a host does before the others of that host hear of it.
    #[cfg(feature = "mpi")]
    pub(crate) fn invite() -> Result<Offer> {
        Offer::open()
    }

    /// Joins the ranks of this host that have been told each other's places and the first one's address. The first
    /// passes its offer, all others the address.
    ///
    /// # Errors
    /// `Timeout` on the first, naming who is missing; `PeerLost`, `Backend`.
    #[cfg(feature = "mpi")]
    pub(crate) fn meet(
        host: Membership,
        offer: Option<&Offer>,
        address: &str,
    ) -> Result<(LocalWorld, Endpoint)> {
        let joined = rendezvous::meet(&host, offer, address)?;
        Self::of_joined(host, joined)
    }

    /// The rank of this world that was lost first, after a look unless one was made a moment ago.
    #[cfg(feature = "mpi")]
    pub(crate) fn lost(&self) -> Option<Rank> {
        self.watch.recent()
    }

    fn of_joined(world: Membership, joined: Joined) -> Result<(LocalWorld, Endpoint)> {
        let Joined { mapping, pidfds, secret } = joined;
        let watch = Arc::new(Watch::new(Arc::clone(&mapping), world.ranks[world.group_rank], pidfds));
        let endpoint = world.endpoint(mapping, Arc::clone(&watch))?;
        Ok((LocalWorld { watch, home: Home::Processes(secret) }, endpoint))
    }

    /// A world whose ranks are threads of this process, one entry a rank.
    pub(crate) fn threads(worlds: Vec<Membership>) -> Result<Vec<(LocalWorld, Endpoint)>> {
        let mapping = anonymous(Geometry::new(worlds.len()))?;
        let segments = Arc::new(Mutex::new(HashMap::new()));
        let join = |world: Membership| {
            let watch = Arc::new(Watch::new(Arc::clone(&mapping), world.ranks[world.group_rank], Vec::new()));
            let endpoint = world.endpoint(Arc::clone(&mapping), Arc::clone(&watch))?;
            Ok((LocalWorld { watch, home: Home::Threads(Arc::clone(&segments)) }, endpoint))
        };
        worlds.into_iter().map(join).collect()
    }

    /// Joins a group of this world. The leader passes its offer, all others its address.
    ///
    /// # Errors
    /// `Timeout` on the leader, naming who is missing; `PeerLost`, `Backend`.
    pub(crate) fn group(&self, group: Membership, offer: Option<Offer>, address: &str) -> Result<Endpoint> {
        let mapping = match (&self.home, offer) {
            (Home::Threads(segments), _) => shared(segments, &group)?,
            (Home::Processes(_), Some(offer)) => rendezvous::lead(&offer, &group, &self.watch)?,
            (Home::Processes(_), None) => rendezvous::follow(address, &group, &self.watch)?,
        };
        group.endpoint(mapping, Arc::clone(&self.watch))
    }

    /// Opens the channel between the two ranks of `channel`, of which the first sends.
    ///
    /// # Errors
    /// `Timeout` if the other rank does not come; `PeerLost`, `Backend`.
    pub(crate) fn connect(&self, channel: Membership) -> Result<Endpoint> {
        let mapping = match &self.home {
            Home::Threads(segments) => shared(segments, &channel)?,
            Home::Processes(secret) => {
                let address = channel_address(secret, channel.ranks[0], channel.ranks[1]);
                if channel.group_rank == 0 {
                    rendezvous::lead(&Offer::at(&address)?, &channel, &self.watch)?
                } else {
                    rendezvous::follow_channel(&address, &channel, &self.watch)?
                }
            }
        };
        channel.endpoint(mapping, Arc::clone(&self.watch))
    }
}

impl WorldBackend for LocalWorld {
    fn invite(&self, ranks: Option<&[Rank]>) -> Result<Invitation> {
        let leads = ranks.is_some_and(|ranks| ranks.len() > 1 && ranks[0] == self.watch.rank());
        let offer = match self.home {
            Home::Processes(_) if leads => Some(Offer::open()?),
            _ => None,
        };
        Ok(Invitation { text: offer.as_ref().map_or(String::new(), Offer::address), offer })
    }

    fn open(
        &self,
        group: Option<Membership>,
        invitation: Invitation,
        texts: &[(Rank, String)],
    ) -> Result<Option<Box<dyn Backend>>> {
        let Some(group) = group else { return Ok(None) };
        let address = text_of(texts, group.ranks[0]);
        Ok(Some(Box::new(self.group(group, invitation.offer, address)?)))
    }

    fn channel(&self, channel: Membership) -> Result<Box<dyn Backend>> {
        Ok(Box::new(self.connect(channel)?))
    }
}

/// The world's address with the two ranks in its name.
fn channel_address(secret: &str, from: Rank, to: Rank) -> String {
    let (name, token) = secret.split_once(' ').unwrap_or((secret, ""));
    format!("{name}-{from}-{to} {token}")
}

impl Drop for LocalWorld {
    fn drop(&mut self) {
        self.watch.leave(std::thread::panicking());
    }
}

/// The segment of `group` in this process, made by whoever asks first.
fn shared(segments: &Mutex<HashMap<String, Arc<Mapping>>>, group: &Membership) -> Result<Arc<Mapping>> {
    let mut segments = segments.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(mapping) = segments.get(&group.group) {
        return Ok(Arc::clone(mapping));
    }
    let mapping = anonymous(group.geometry())?;
    segments.insert(group.group.clone(), Arc::clone(&mapping));
    Ok(mapping)
}

fn anonymous(geometry: Geometry) -> Result<Arc<Mapping>> {
    Mapping::anonymous(geometry).map(Arc::new).map_err(|errno| system("mmap", errno))
}

/// A system call's failure.
fn system(call: &str, cause: impl std::fmt::Display) -> Error {
    Error::Backend { backend: "local", call: call.into(), cause: cause.to_string() }
}

impl Backend for Endpoint {
    fn barrier(&self) -> Result<()> {
        self.run(Fingerprint::barrier, |x| x.cross())
    }

    fn broadcast(&self, call: Call, buffer: &mut [u8], root: GroupRank) -> Result<()> {
        let bytes = buffer.len();
        self.run(|seq| Fingerprint::new(seq, call, bytes), |x| rounds::broadcast(x, buffer, root.0))
    }

    fn all_reduce(&self, call: Call, buffer: &mut [u8], op: ReduceOp) -> Result<()> {
        let bytes = buffer.len();
        self.run(
            |seq| Fingerprint::new(seq, call, bytes).with_op(op),
            |x| rounds::all_reduce(x, buffer, call.dtype, op),
        )
    }

    fn all_gather(&self, call: Call, input: &[u8], counts: &[usize], output: &mut [&mut [u8]]) -> Result<()> {
        self.run(
            |seq| Fingerprint::counted(seq, call, counts),
            |x| rounds::all_gather(x, input, counts, output),
        )
    }

    fn reduce_scatter(
        &self,
        call: Call,
        op: ReduceOp,
        input: &[&[u8]],
        counts: &[usize],
        output: &mut [u8],
    ) -> Result<()> {
        self.run(
            |seq| Fingerprint::counted(seq, call, counts).with_op(op),
            |x| rounds::reduce_scatter(x, (call.dtype, op), input, counts, output),
        )
    }

    fn all_to_all(
        &self,
        call: Call,
        input: &[u8],
        send: &[usize],
        output: &mut [u8],
        receive: &[usize],
    ) -> Result<()> {
        let even = call.name == CallName::AllToAll;
        let bytes = if even { send[self.me] } else { 0 };
        self.run(
            |seq| Fingerprint::new(seq, call, bytes),
            |x| {
                let (x, longest) = if even { (x, bytes) } else { rounds::agree_on_counts(x, send, receive)? };
                rounds::all_to_all(x, input, send, output, receive, longest)
            },
        )
    }

    fn all_gather_streamed(
        &self,
        call: Call,
        input: &[u8],
        counts: &[usize],
        drain: &mut Drain<'_>,
    ) -> Result<()> {
        self.run(
            |seq| Fingerprint::counted(seq, call, counts),
            |x| rounds::all_gather_streamed(x, input, counts, drain),
        )
    }

    fn all_to_all_streamed(
        &self,
        call: Call,
        send: &[usize],
        receive: &[usize],
        fill: &mut Fill<'_>,
        drain: &mut Drain<'_>,
    ) -> Result<()> {
        self.run(
            |seq| Fingerprint::new(seq, call, 0),
            |x| {
                let (x, longest) = rounds::agree_on_counts(x, send, receive)?;
                rounds::all_to_all_streamed(x, send, receive, (fill, drain), longest)
            },
        )
    }

    #[cfg(feature = "nccl")]
    fn roll_call(&self, call: Call, op: Option<ReduceOp>, counts: &[usize]) -> Result<()> {
        let fingerprint = |seq| {
            let fingerprint = Fingerprint::counted(seq, call, counts).on_device();
            op.map_or(fingerprint, |op| fingerprint.with_op(op))
        };
        self.run(fingerprint, |x| x.cross())
    }

    #[cfg(feature = "nccl")]
    fn watch(&self) -> Result<()> {
        Endpoint::watch(self)
    }

    fn abort(&self) {
        Endpoint::abort(self);
    }

    fn failure(&self) -> Option<Error> {
        Endpoint::failure(self)
    }
}
