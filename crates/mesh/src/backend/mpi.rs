//! The MPI backend: ranks of one host or many, by the site's own MPI and, on each host, by shared memory.
//!
//! `MpiWorld` is here: who is on which host, and how groups come to be. `group.rs` is the backend of one group, `turn.rs`
//! one collective, `wire.rs` messages under a deadline, `ffi.rs` the calls. Ranks are those of `MPI_COMM_WORLD`. MPI
//! is initialized by the first world, unless the program has done so, and ends with the process.
//!
//! # When a process dies
//!
//! With ULFM (`mpirun --with-ft ulfm` of Open MPI 5) every survivor gets `PeerLost`. Without it the launcher ends the
//! whole job, survivors included, which is what Open MPI 4 does; some may return `PeerLost` before.

mod block;
mod ffi;
mod group;
mod notice;
mod placement;
mod turn;
mod wire;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use self::block::Block;
pub(crate) use self::group::MpiGroup;
use self::placement::Placement;
use self::wire::{Parcel, Stop, Tags, Wire};
use super::local::{Endpoint, LocalWorld, Offer, identity};
use super::{Backend, Invitation, Membership, WorldBackend, text_of};
use crate::{Error, Rank, Result};

/// Ranks with the same value share a host's memory; set by hand where what the system says is not enough.
const HOST_ID: &str = "SCONCE_HOST_ID";
/// Length of a host's name or of an address in a message.
const RECORD_BYTES: usize = 256;

/// Tags of a channel: what its sender sends, and what its receiver does.
const CHANNEL_TAGS: [usize; 2] = [1, 2];
const FIRST_GROUP_TAG: usize = 16;
/// Keys of channels have this bit; those of groups count from 0, the world's.
const CHANNEL_KEY: u64 = 1 << 63;

/// One rank's membership of an MPI job. Dropping it and its groups leaves the world.
pub(crate) struct MpiWorld {
    wire: Arc<Wire>,
    /// For each rank, the first rank of its host.
    host_of: Vec<usize>,
    next_key: Mutex<u64>,
}

impl MpiWorld {
    /// Joins the world of all processes of the MPI job.
    ///
    /// # Errors
    /// `Timeout`, `PeerLost`, `Backend`.
    pub(crate) fn join(timeout: Duration) -> Result<(MpiWorld, MpiGroup)> {
        let wire = wire::join(timeout).map(Wire::new);
        let wire = wire.map_err(|stop| bootstrap_error(stop, timeout))?;
        let host_of = find_hosts(&wire, timeout)?;
        let (me, ranks): (usize, Arc<[Rank]>) = (wire.rank().0, (0..wire.size()).map(Rank).collect());
        let (wire, inner) = meet_host(wire, &host_of, timeout)?;
        let world = MpiWorld { wire: Arc::new(wire), host_of, next_key: Mutex::new(1) };
        let membership = Membership { group: "world".into(), ranks, group_rank: me, timeout };
        let group = world.assemble(membership, inner, 0, tags(0));
        Ok((world, group))
    }

    pub(crate) fn rank(&self) -> Rank {
        self.wire.rank()
    }

    pub(crate) fn size(&self) -> usize {
        self.wire.size()
    }

    /// The ranks of this host among those of `group`, in shared memory; `None` if this rank is alone there.
    ///
    /// `join` joins them, counted by their places on the host.
    fn on_host(
        &self,
        group: &Membership,
        join: impl FnOnce(&LocalWorld, Membership, Rank) -> Result<Endpoint>,
    ) -> Result<Option<Endpoint>> {
        let mates = self.mates(&group.ranks);
        let Some((local, host)) = self.wire.host().filter(|_| mates.len() > 1) else { return Ok(None) };
        let place = |rank: &Rank| Rank(host.iter().position(|mate| mate == rank).unwrap_or(0));
        let on_host = Membership {
            group: group.group.clone(),
            ranks: mates.iter().map(place).collect(),
            group_rank: mates.iter().position(|rank| *rank == self.rank()).unwrap_or(0),
            timeout: group.timeout,
        };
        join(local, on_host, mates[0]).map(Some).map_err(|error| of_host(error, host))
    }

    fn assemble(&self, group: Membership, inner: Option<Endpoint>, key: u64, tags: Tags) -> MpiGroup {
        let host_of: Vec<usize> = group.ranks.iter().map(|rank| self.host_of[rank.0]).collect();
        let placement = Placement::new(&host_of, group.group_rank);
        MpiGroup::new(group, placement, inner, Arc::clone(&self.wire), (key, tags))
    }

    /// Those of `ranks` that are on this host.
    fn mates(&self, ranks: &[Rank]) -> Vec<Rank> {
        let host = self.host_of[self.rank().0];
        ranks.iter().copied().filter(|rank| self.host_of[rank.0] == host).collect()
    }

    fn check_key(&self, key: u64) -> Result<()> {
        let limit = self.wire.largest_tag() - FIRST_GROUP_TAG;
        if key <= limit as u64 {
            return Ok(());
        }
        Err(Error::InvalidArgument {
            op: "subgroups",
            what: "number of groups made so far".into(),
            expected: format!("at most {limit}, the tags of this MPI"),
            got: key.to_string(),
        })
    }

    fn keys(&self) -> std::sync::MutexGuard<'_, u64> {
        self.next_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WorldBackend for MpiWorld {
    /// The text is the first key that this rank has not used, and the address of its door.
    fn invite(&self, ranks: Option<&[Rank]>) -> Result<Invitation> {
        let mates = ranks.map_or(Vec::new(), |ranks| self.mates(ranks));
        let leads = mates.len() > 1 && mates[0] == self.rank();
        let offer = if leads { Some(LocalWorld::invite()?) } else { None };
        let address = offer.as_ref().map_or(String::new(), Offer::address);
        Ok(Invitation { text: format!("{} {address}", self.keys()), offer })
    }

    /// The groups' key is one that no rank of the parent has used, so that two groups with two ranks in common have
    /// different ones.
    fn open(
        &self,
        group: Option<Membership>,
        invitation: Invitation,
        texts: &[(Rank, String)],
    ) -> Result<Option<Box<dyn Backend>>> {
        let first = |text: &str| text.split(' ').next().and_then(|key| key.parse().ok()).unwrap_or(0);
        let key: u64 = texts.iter().map(|(_, text)| first(text)).max().unwrap_or(0);
        let mut next_key = self.keys();
        *next_key = key + 1;
        drop(next_key);
        let Some(group) = group else { return Ok(None) };
        self.check_key(key)?;
        let inner = self.on_host(&group, |local, on_host, leader| {
            let address = text_of(texts, leader).split_once(' ').map_or("", |(_, address)| address);
            local.group(on_host, invitation.offer, address)
        })?;
        Ok(Some(Box::new(self.assemble(group, inner, key, tags(key)))))
    }

    fn channel(&self, channel: Membership) -> Result<Box<dyn Backend>> {
        let key = CHANNEL_KEY | (channel.ranks[0].0 as u64) << 31 | channel.ranks[1].0 as u64;
        let [ours, theirs] = CHANNEL_TAGS;
        let sends = channel.group_rank == 0;
        let tags =
            if sends { Tags { send: ours, receive: theirs } } else { Tags { send: theirs, receive: ours } };
        let inner = if self.mates(&channel.ranks).len() == 2 {
            self.on_host(&channel, |local, on_host, _| local.connect(on_host))?
        } else {
            None
        };
        Ok(Box::new(self.assemble(channel, inner, key, tags)))
    }
}

fn tags(key: u64) -> Tags {
    let tag = FIRST_GROUP_TAG + key as usize;
    Tags { send: tag, receive: tag }
}

/// For each rank, the first rank of its host.
fn find_hosts(wire: &Wire, timeout: Duration) -> Result<Vec<usize>> {
    let own = Arc::new(record(&host_id()?)?);
    let others: Vec<usize> = (0..wire.size()).filter(|rank| *rank != wire.rank().0).collect();
    let parcel = |peer: &usize| Parcel { peer: *peer, out: Some(Arc::clone(&own)), len_in: RECORD_BYTES };
    let exchanged = wire.exchange(others.iter().map(parcel).collect(), tags(0), timeout, 0);
    let mut ids = exchanged.map_err(|stop| bootstrap_error(stop, timeout))?;
    ids.insert(wire.rank().0, Block::of(own.bytes()));
    let first = |id: &Block| ids.iter().position(|other| other.bytes() == id.bytes()).unwrap_or(0);
    Ok(ids.iter().map(first).collect())
}

/// Brings the ranks of this host together in shared memory, if there are several.
fn meet_host(wire: Wire, host_of: &[usize], timeout: Duration) -> Result<(Wire, Option<Endpoint>)> {
    let (me, leader) = (wire.rank().0, host_of[wire.rank().0]);
    let mates: Vec<Rank> = (0..wire.size()).filter(|rank| host_of[*rank] == leader).map(Rank).collect();
    if mates.len() == 1 {
        return Ok((wire, None));
    }
    let offer = if me == leader { Some(LocalWorld::invite()?) } else { None };
    let address = offer.as_ref().map_or(String::new(), Offer::address);
    let block = Arc::new(record(&address)?);
    let parcels = if me == leader {
        let members = mates.iter().filter(|rank| rank.0 != me);
        members.map(|rank| Parcel { peer: rank.0, out: Some(Arc::clone(&block)), len_in: 0 }).collect()
    } else {
        vec![Parcel { peer: leader, out: None, len_in: RECORD_BYTES }]
    };
    let came = wire.exchange(parcels, tags(0), timeout, 0);
    let came = came.map_err(|stop| bootstrap_error(stop, timeout))?;
    let address = if me == leader { address } else { text(&came[0]) };
    let group_rank = mates.iter().position(|rank| rank.0 == me).unwrap_or(0);
    let ranks = (0..mates.len()).map(Rank).collect();
    let host = Membership { group: "world".into(), ranks, group_rank, timeout };
    let met = LocalWorld::meet(host, offer.as_ref(), &address);
    let (local, endpoint) = met.map_err(|error| of_host(error, &mates))?;
    Ok((wire.with_host(local, mates), Some(endpoint)))
}

/// What tells this rank's host from others.
fn host_id() -> Result<String> {
    std::env::var(HOST_ID).or_else(|_| identity::host_id())
}

/// A text as messages carry it, filled up with zeros.
fn record(text: &str) -> Result<Block> {
    let mut bytes = text.as_bytes().to_vec();
    if bytes.len() > RECORD_BYTES {
        let expected = "at most 256 bytes";
        return Err(Error::Environment { name: HOST_ID.into(), expected, got: Some(text.to_owned()) });
    }
    bytes.resize(RECORD_BYTES, 0);
    Ok(Block::of(&bytes))
}

fn text(record: &Block) -> String {
    String::from_utf8_lossy(record.bytes()).trim_end_matches('\0').to_owned()
}

/// An error of this host's ranks, which counts them by their place in `host`.
fn of_host(error: Error, host: &[Rank]) -> Error {
    let world = |rank: Rank| host.get(rank.0).copied().unwrap_or(rank);
    let all = |ranks: Vec<Rank>| ranks.into_iter().map(world).collect();
    match error {
        Error::PeerLost { group, rank, reporter, op, seq } => {
            Error::PeerLost { group, rank: world(rank), reporter: world(reporter), op, seq }
        }
        Error::Timeout { group, op, seq, timeout, arrived, missing } => {
            Error::Timeout { group, op, seq, timeout, arrived: all(arrived), missing: all(missing) }
        }
        other => other,
    }
}

/// What ended the world's rendezvous.
fn bootstrap_error(stop: Stop, timeout: Duration) -> Error {
    use self::notice::Cause;
    let (group, op) = ("world".to_owned(), "rendezvous".to_owned());
    match stop {
        Stop::Fault(error) => error,
        Stop::Cause(Cause::Lost(rank) | Cause::Left(rank)) => {
            Error::PeerLost { group, rank, reporter: rank, op, seq: 0 }
        }
        Stop::Cause(Cause::Aborted(rank)) => Error::Aborted { group, rank },
        Stop::Cause(Cause::Timeout(missing)) => {
            Error::Timeout { group, op, seq: 0, timeout, arrived: Vec::new(), missing }
        }
        Stop::Deadline(missing) => {
            let missing = missing.into_iter().map(Rank).collect();
            Error::Timeout { group, op, seq: 0, timeout, arrived: Vec::new(), missing }
        }
    }
}
