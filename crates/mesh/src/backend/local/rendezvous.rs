//! Rendezvous: the world's by store, a group's by its parent; both end in a mapping and in errors that name ranks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::bootstrap::{Guest, Offer, Patience, Stop, fetch, fetch_when_open};
use super::ffi::Mapping;
use super::identity::{self, Identity};
use super::liveness::Watch;
use super::{Membership, memfd, system};
use crate::{Error, Rank, Result, Store};

/// What a process gets when it joins its world.
pub(super) struct Joined {
    pub(super) mapping: Arc<Mapping>,
    /// One for each rank, in rank order.
    pub(super) pidfds: Vec<OwnedFd>,
    /// The leader's address, which only members know: name and token of the doors to come.
    pub(super) secret: String,
}

/// Maps the world's segment and gathers one pidfd for each rank, in rank order.
///
/// Every rank holds as many file descriptors as the world has ranks.
///
/// # Errors
/// `Timeout`, `PeerLost` if the leader went away, `Store`, `Backend`.
pub(super) fn join(store: &dyn Store, world: &Membership) -> Result<Joined> {
    let (started, own) = (Instant::now(), Identity::own()?);
    let prefix = prefix(store, world, &own)?;
    let roll = Roll { store, world, prefix, started };
    roll.sign(&own)?;
    let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|errno| system("pidfd_open", errno))?;
    if world.group_rank == 0 { roll.lead(own) } else { roll.follow(own) }
}

/// Where this world's keys lie: worlds made one after the other from one store do not meet.
///
/// # Errors
/// `InvalidArgument` if another process, which still runs, has joined as this rank; `Store`.
fn prefix(store: &dyn Store, world: &Membership, own: &Identity) -> Result<String> {
    let place = |n_worlds: i64| format!("sconce/{}/{n_worlds}", world.group);
    let n_worlds = store.add(&format!("sconce/{}/joins/{}", world.group, world.group_rank), 1)?;
    let before = signed_at(store, &signature(&place(n_worlds - 1), world.group_rank));
    match before.and_then(|text| Identity::parse(&text)).filter(|before| before.is_rival_of(own)) {
        None => Ok(place(n_worlds)),
        Some(rival) => Err(Error::InvalidArgument {
            op: "joining the world",
            what: format!("rank {}", world.ranks[world.group_rank]),
            expected: "each rank to be started once".into(),
            got: format!("a second process; process {} has joined as this rank", rival.pid()),
        }),
    }
}

/// Where a rank signs.
fn signature(prefix: &str, group_rank: usize) -> String {
    format!("{prefix}/here/{group_rank}")
}

/// What is signed there. An absent key counts as empty, so asking does not wait.
fn signed_at(store: &dyn Store, key: &str) -> Option<String> {
    let held = store.compare_set(key, b"", b"").ok().filter(|held| !held.is_empty())?;
    Some(String::from_utf8_lossy(&held).into_owned())
}

/// The store's side of a world's rendezvous: each rank signs when it comes.
struct Roll<'a> {
    store: &'a dyn Store,
    world: &'a Membership,
    prefix: String,
    started: Instant,
}

impl Roll<'_> {
    fn sign(&self, own: &Identity) -> Result<()> {
        let key = signature(&self.prefix, self.world.group_rank);
        self.store.set(&key, own.to_string().as_bytes())
    }

    fn leader_key(&self) -> String {
        format!("{}/leader", self.prefix)
    }

    fn patience(&self) -> Patience<'_> {
        Patience { deadline: self.started.checked_add(self.world.timeout), watch: None, needed: &[] }
    }

    fn lead(&self, own: OwnedFd) -> Result<Joined> {
        let offer = Offer::open()?;
        self.store.set(&self.leader_key(), offer.address().as_bytes())?;
        let led = lead_world(self.world, &offer, own, &self.patience());
        led.map_err(|error| self.apart().unwrap_or(error))
    }

    fn follow(&self, own: OwnedFd) -> Result<Joined> {
        let patience = self.patience();
        let address = self.store.get(&self.leader_key(), patience.left());
        let address = address.map_err(|error| if self.is_late() { self.late() } else { error })?;
        let address = String::from_utf8_lossy(&address);
        let fds = follow_world(self.world, &address, own, &patience).map_err(|stop| self.stopped(stop))?;
        joined(self.world, fds, &address)
    }

    /// A member's error: if the leader gave up because ranks are missing, it is those that matter.
    fn stopped(&self, stop: Stop) -> Error {
        if let Some(error) = self.apart() {
            return error;
        }
        match stop {
            Stop::Deadline => self.late(),
            Stop::Closed if self.signed().contains(&false) => self.late(),
            stop => stopped(stop, self.world, Vec::new()),
        }
    }

    fn is_late(&self) -> bool {
        // Stores count their deadlines in their own ways.
        self.started.elapsed() + std::time::Duration::from_millis(20) >= self.world.timeout
    }

    fn late(&self) -> Error {
        timeout(self.world, self.signed())
    }

    /// The error of ranks on several hosts, if there are any.
    fn apart(&self) -> Option<Error> {
        let signed: Vec<_> = self.texts().iter().map(|text| Identity::parse(text.as_deref()?)).collect();
        identity::apart(&signed)
    }

    /// Who has signed.
    fn signed(&self) -> Vec<bool> {
        self.texts().iter().map(Option::is_some).collect()
    }

    fn texts(&self) -> Vec<Option<String>> {
        let text = |g| signed_at(self.store, &signature(&self.prefix, g));
        (0..self.world.ranks.len()).map(text).collect()
    }
}

/// Joins a world whose members know the leader's address already; the leader passes the offer behind it.
#[cfg(feature = "mpi")]
pub(super) fn meet(world: &Membership, offer: Option<&Offer>, address: &str) -> Result<Joined> {
    let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|errno| system("pidfd_open", errno))?;
    let deadline = Instant::now().checked_add(world.timeout);
    let patience = Patience { deadline, watch: None, needed: &[] };
    if let Some(offer) = offer {
        return lead_world(world, offer, own, &patience);
    }
    let known = || (0..world.ranks.len()).map(|g| g == 0 || g == world.group_rank).collect();
    let fds = follow_world(world, address, own, &patience).map_err(|stop| stopped(stop, world, known()))?;
    joined(world, fds, address)
}

/// Makes the world's segment, gathers all pidfds, and hands both to the other members.
fn lead_world(world: &Membership, offer: &Offer, own: OwnedFd, patience: &Patience<'_>) -> Result<Joined> {
    let (fd, mapping) = memfd::create(world.geometry())?;
    let mut guests = Vec::new();
    let admitted = offer.admit(world.ranks.len(), patience, &mut guests);
    admitted.map_err(|stop| stopped(stop, world, present(world, &guests)))?;
    guests.sort_by_key(|guest| guest.group_rank);

    let pidfds =
        |guest: &Guest| guest.fds.first().map(AsFd::as_fd).unwrap_or(own.as_fd()).try_clone_to_owned();
    let theirs: std::io::Result<Vec<OwnedFd>> = guests.iter().map(pidfds).collect();
    let theirs = theirs.map_err(|error| system("dup", error))?;
    let all: Vec<OwnedFd> = std::iter::once(own).chain(theirs).collect();
    let given: Vec<BorrowedFd<'_>> = std::iter::once(&fd).chain(&all).map(AsFd::as_fd).collect();
    guests.iter().for_each(|guest| guest.give(&given));
    Ok(Joined { mapping: Arc::new(mapping), pidfds: all, secret: offer.address() })
}

/// Gives this process's pidfd to the leader and waits for the segment and everyone's pidfds.
fn follow_world(
    world: &Membership,
    address: &str,
    own: OwnedFd,
    patience: &Patience<'_>,
) -> Result<Vec<OwnedFd>, Stop> {
    fetch(address, world.group_rank, &[own], world.ranks.len() + 1, patience)
}

fn joined(world: &Membership, fds: Vec<OwnedFd>, address: &str) -> Result<Joined> {
    let mut fds = fds.into_iter();
    let segment = fds.next().ok_or_else(|| system("recvmsg", "no segment"))?;
    let mapping = Arc::new(memfd::open(&segment, world.geometry())?);
    Ok(Joined { mapping, pidfds: fds.collect(), secret: address.to_owned() })
}

/// Makes a group's segment and hands it to the other members.
pub(super) fn lead(offer: &Offer, group: &Membership, watch: &Watch) -> Result<Arc<Mapping>> {
    let (fd, mapping) = memfd::create(group.geometry())?;
    let mut guests = Vec::new();
    let admitted = offer.admit(group.ranks.len(), &patience(group, watch), &mut guests);
    admitted.map_err(|stop| stopped(stop, group, present(group, &guests)))?;
    guests.iter().for_each(|guest| guest.give(&[&fd]));
    Ok(Arc::new(mapping))
}

/// Fetches a group's segment from its leader.
pub(super) fn follow(address: &str, group: &Membership, watch: &Watch) -> Result<Arc<Mapping>> {
    let own: [OwnedFd; 0] = [];
    let fds = fetch(address, group.group_rank, &own, 1, &patience(group, watch));
    let fds = fds.map_err(|stop| {
        // All that a member knows is itself and the leader, whose door was open.
        let known = (0..group.ranks.len()).map(|g| g == 0 || g == group.group_rank).collect();
        stopped(stop, group, known)
    })?;
    let segment = fds.first().ok_or_else(|| system("recvmsg", "no segment"))?;
    Ok(Arc::new(memfd::open(segment, group.geometry())?))
}

/// Fetches a channel's segment from its sender, who may not have come yet.
pub(super) fn follow_channel(address: &str, channel: &Membership, watch: &Watch) -> Result<Arc<Mapping>> {
    let fds = fetch_when_open(address, channel.group_rank, 1, &patience(channel, watch));
    let fds = fds.map_err(|stop| stopped(stop, channel, vec![false, true]))?;
    let segment = fds.first().ok_or_else(|| system("recvmsg", "no segment"))?;
    Ok(Arc::new(memfd::open(segment, channel.geometry())?))
}

fn patience<'a>(group: &'a Membership, watch: &'a Watch) -> Patience<'a> {
    let deadline = Instant::now().checked_add(group.timeout);
    Patience { deadline, watch: Some(watch), needed: &group.ranks }
}

/// Which group ranks have come to the leader.
fn present(group: &Membership, guests: &[Guest]) -> Vec<bool> {
    (0..group.ranks.len()).map(|g| g == 0 || guests.iter().any(|guest| guest.group_rank == g)).collect()
}

fn stopped(stop: Stop, group: &Membership, present: Vec<bool>) -> Error {
    match stop {
        Stop::Deadline => timeout(group, present),
        Stop::Lost(rank) => lost(group, rank),
        Stop::Closed => lost(group, group.ranks[0]),
        Stop::System(error) => error,
    }
}

fn lost(group: &Membership, rank: Rank) -> Error {
    let reporter = group.ranks[group.group_rank];
    Error::PeerLost { group: group.group.clone(), rank, reporter, op: "rendezvous".into(), seq: 0 }
}

fn timeout(group: &Membership, present: Vec<bool>) -> Error {
    let (arrived, missing): (Vec<_>, Vec<_>) =
        group.ranks.iter().zip(present).partition(|(_, present)| *present);
    let name = |ranks: Vec<(&Rank, bool)>| ranks.into_iter().map(|(rank, _)| *rank).collect();
    Error::Timeout {
        group: group.group.clone(),
        op: "rendezvous".into(),
        seq: 0,
        timeout: group.timeout,
        arrived: name(arrived),
        missing: name(missing),
    }
}
