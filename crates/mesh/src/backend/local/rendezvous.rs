//! Rendezvous: the world's by store, a group's by its parent; both end in a mapping and in errors that name ranks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::bootstrap::{Guest, Offer, Patience, Stop, fetch, fetch_when_open};
use super::failure::{self, Cause};
use super::ffi::Mapping;
use super::identity::{self, Identity};
use super::liveness::Watch;
use super::{Membership, memfd, system};
use crate::{Error, Rank, Result, Store};

/// How much longer than the leader of a group its members wait: for what it says on the way, however late both wake.
const LEADERS_WORD: Duration = Duration::from_secs(1);

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
    let before = signed_at(store, &signature(&place(n_worlds - 1), world.group_rank))?;
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

/// What is signed there, if anything. An absent key counts as empty, so asking does not wait.
fn signed_at(store: &dyn Store, key: &str) -> Result<Option<String>> {
    let held = store.compare_set(key, b"", b"")?;
    Ok((!held.is_empty()).then(|| String::from_utf8_lossy(&held).into_owned()))
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
            Stop::Closed if self.signed().is_some_and(|signed| signed.contains(&false)) => self.late(),
            stop => stopped(stop, self.world, Vec::new()),
        }
    }

    fn is_late(&self) -> bool {
        // Stores count their deadlines in their own ways.
        self.started.elapsed() + Duration::from_millis(20) >= self.world.timeout
    }

    fn late(&self) -> Error {
        // Without the store nobody knows of others.
        let own = || (0..self.world.ranks.len()).map(|g| g == self.world.group_rank).collect();
        timed_out(self.world, self.signed().unwrap_or_else(own))
    }

    /// The error of ranks on several hosts, if there are any.
    fn apart(&self) -> Option<Error> {
        let signed: Vec<_> = self.texts()?.iter().map(|text| Identity::parse(text.as_deref()?)).collect();
        identity::apart(&signed)
    }

    /// Who has signed; `None` if the store is gone, with the rank that hosted it.
    fn signed(&self) -> Option<Vec<bool>> {
        Some(self.texts()?.iter().map(Option::is_some).collect())
    }

    fn texts(&self) -> Option<Vec<Option<String>>> {
        let text = |g| signed_at(self.store, &signature(&self.prefix, g));
        (0..self.world.ranks.len()).map(text).collect::<Result<_>>().ok()
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
    let handed = guests.iter().try_for_each(|guest| guest.give(&given, patience));
    handed.map_err(|stop| stopped(stop, world, present(world, &guests)))?;
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
///
/// Where nothing comes of the group, the segment says why: members return the leader's error, whatever they would have
/// found out by themselves.
pub(super) fn lead(offer: &Offer, group: &Membership, watch: &Watch) -> Result<Arc<Mapping>> {
    let (fd, mapping) = memfd::create(group.geometry())?;
    let (mut guests, size) = (Vec::new(), group.ranks.len());
    let needed = &group.ranks;
    let patience =
        Patience { deadline: Instant::now().checked_add(group.timeout), watch: Some(watch), needed };
    let admitted = offer.admit(size, &patience, &mut guests).map_err(|stop| {
        let present = present(group, &guests);
        failure::record(&mapping, cause(&stop, group, &present));
        if let Stop::Lost(_) = stop {
            offer.admit_late(size, |g| watch.is_gone(group.ranks[g]), &mut guests);
        }
        stopped(stop, group, present)
    });
    // To all of them, whatever becomes of one.
    let handed: Vec<_> = guests.iter().map(|guest| guest.give(&[&fd], &patience)).collect();
    let handed: Result<(), Stop> = handed.into_iter().collect();
    admitted.and(handed.map_err(|stop| stopped(stop, group, present(group, &guests))))?;
    Ok(Arc::new(mapping))
}

/// What the leader records for the other members.
fn cause(stop: &Stop, group: &Membership, present: &[bool]) -> Cause {
    match stop {
        Stop::Deadline => Cause::Timeout(present.to_vec()),
        Stop::Lost(rank) => {
            group.ranks.iter().position(|other| other == rank).map_or(Cause::Aborted(0), Cause::Departed)
        }
        Stop::Closed | Stop::System(_) => Cause::Aborted(0),
    }
}

/// Fetches a group's segment from its leader.
pub(super) fn follow(address: &str, group: &Membership, watch: &Watch) -> Result<Arc<Mapping>> {
    let own: [OwnedFd; 0] = [];
    let needed = &group.ranks[..1];
    let fetched = fetch(address, group.group_rank, &own, 1, &patience_of_member(group, watch, needed));
    followed(fetched, group, watch)
}

/// Fetches a channel's segment from its sender, who may not have come yet.
pub(super) fn follow_channel(address: &str, channel: &Membership, watch: &Watch) -> Result<Arc<Mapping>> {
    let needed = &channel.ranks[..1];
    let patience = patience_of_member(channel, watch, needed);
    followed(fetch_when_open(address, channel.group_rank, 1, &patience), channel, watch)
}

/// A member waits a little longer than the leader, whose word on who is missing it would rather have.
fn patience_of_member<'a>(group: &Membership, watch: &'a Watch, needed: &'a [Rank]) -> Patience<'a> {
    let deadline = Instant::now().checked_add(group.timeout.saturating_add(LEADERS_WORD));
    Patience { deadline, watch: Some(watch), needed }
}

/// The segment that a member was given, or why there is none.
fn followed(fetched: Result<Vec<OwnedFd>, Stop>, group: &Membership, watch: &Watch) -> Result<Arc<Mapping>> {
    let fds = fetched.map_err(|stop| match stop {
        // The leader would have said so if it were another.
        Stop::Deadline => timeout(group, vec![group.ranks[group.group_rank]], vec![group.ranks[0]]),
        stop => stopped(stop, group, Vec::new()),
    })?;
    let segment = fds.first().ok_or_else(|| system("recvmsg", "no segment"))?;
    let mapping = memfd::open(segment, group.geometry())?;
    match failure::read(&mapping) {
        None => Ok(Arc::new(mapping)),
        Some(cause) => Err(told(cause, group, watch)),
    }
}

/// The leader's word as this member's error.
fn told(cause: Cause, group: &Membership, watch: &Watch) -> Error {
    match cause {
        Cause::Timeout(present) => timed_out(group, present),
        Cause::Departed(g) => lost(group, group.ranks[g]),
        // Also where a rank outside the group was lost.
        Cause::Aborted(g) => watch.look().map_or_else(
            || Error::Aborted { group: group.group.clone(), rank: group.ranks[g] },
            |rank| lost(group, rank),
        ),
    }
}

/// Which group ranks have come to the leader.
fn present(group: &Membership, guests: &[Guest]) -> Vec<bool> {
    (0..group.ranks.len()).map(|g| g == 0 || guests.iter().any(|guest| guest.group_rank == g)).collect()
}

fn stopped(stop: Stop, group: &Membership, present: Vec<bool>) -> Error {
    match stop {
        Stop::Deadline => timed_out(group, present),
        Stop::Lost(rank) => lost(group, rank),
        Stop::Closed => lost(group, group.ranks[0]),
        Stop::System(error) => error,
    }
}

fn lost(group: &Membership, rank: Rank) -> Error {
    let reporter = group.ranks[group.group_rank];
    Error::PeerLost { group: group.group.clone(), rank, reporter, op: "rendezvous".into(), seq: 0 }
}

fn timed_out(group: &Membership, present: Vec<bool>) -> Error {
    let (arrived, missing): (Vec<_>, Vec<_>) =
        group.ranks.iter().zip(present).partition(|(_, present)| *present);
    let name = |ranks: Vec<(&Rank, bool)>| ranks.into_iter().map(|(rank, _)| *rank).collect();
    timeout(group, name(arrived), name(missing))
}

fn timeout(group: &Membership, arrived: Vec<Rank>, missing: Vec<Rank>) -> Error {
    Error::Timeout {
        group: group.group.clone(),
        op: "rendezvous".into(),
        seq: 0,
        timeout: group.timeout,
        arrived,
        missing,
    }
}

#[cfg(test)]
mod tests {
    use super::super::segment::Geometry;
    use super::*;

    const RANKS: usize = 3;

    fn member(group_rank: usize) -> Membership {
        let ranks = (0..RANKS).map(Rank).collect();
        Membership { group: "g".into(), ranks, group_rank, timeout: Duration::from_millis(200) }
    }

    fn watches() -> Vec<Watch> {
        let world = Arc::new(Mapping::anonymous(Geometry::new(RANKS)).unwrap());
        (0..RANKS).map(|rank| Watch::new(Arc::clone(&world), Rank(rank), Vec::new())).collect()
    }

    /// What the leader and rank 1 say of a group to which rank 2 does not come. `before_leading` runs first, and
    /// `before_following` on rank 1.
    fn without_rank_2(
        watches: &[Watch],
        before_leading: impl FnOnce(&Offer),
        before_following: impl FnOnce() + Send,
    ) -> [Error; 2] {
        let offer = Offer::open().unwrap();
        let address = offer.address();
        std::thread::scope(|scope| {
            let follower = scope.spawn(|| {
                before_following();
                follow(&address, &member(1), &watches[1]).map(drop).unwrap_err()
            });
            before_leading(&offer);
            let leader = lead(&offer, &member(0), &watches[0]).map(drop).unwrap_err();
            [leader, follower.join().unwrap()]
        })
    }

    #[test]
    fn leader_and_member_name_the_same_missing_rank() {
        for error in without_rank_2(&watches(), Offer::await_knock, || {}) {
            let Error::Timeout { arrived, missing, .. } = error else { panic!("{error}") };
            assert_eq!((arrived, missing), (vec![Rank(0), Rank(1)], vec![Rank(2)]));
        }
    }

    #[test]
    fn a_member_who_comes_after_the_leader_gave_up_names_the_same_departed_rank() {
        let watches = watches();
        watches[2].leave(false);
        let late = || std::thread::sleep(Duration::from_millis(100));
        for error in without_rank_2(&watches, |_| {}, late) {
            assert!(matches!(error, Error::PeerLost { rank: Rank(2), .. }), "{error}");
        }
    }

    #[test]
    fn who_hears_nothing_from_the_leader_misses_the_leader() {
        let offer = Offer::open().unwrap();
        let error = follow(&offer.address(), &member(1), &watches()[1]).map(drop).unwrap_err();
        let Error::Timeout { arrived, missing, .. } = error else { panic!("{error}") };
        assert_eq!((arrived, missing), (vec![Rank(1)], vec![Rank(0)]));
    }
}
