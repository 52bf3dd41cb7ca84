//! How the processes of a group come to map the same segment: one offers it, the others fetch it.
//!
//! ```text
//! leader                                            member
//! listens on an abstract Unix socket
//! address (name and token), by store or group  ──▶  connects
//!                                              ◀──  token, group rank [, pidfd]
//! checks uid, token, rank; when all are there  ──▶  segment [, all pidfds]
//! ```
//!
//! Abstract sockets and memfds have no name in any file system: nothing is left after a crash.

use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;

use super::fds::{receive_fds, send_fds};
use super::liveness::Watch;
use super::system;
use crate::token::{TOKEN_LEN, random_hex, same};
use crate::{Error, Rank};

const HELLO_LEN: usize = TOKEN_LEN + 4;
const SLICE: Duration = Duration::from_millis(20);
/// How long a connection may take to say hello. Members do so at once; a process that only connects must not keep them
/// waiting behind it.
const HELLO: Duration = Duration::from_secs(2);
/// How long the leader of a group that failed waits for members who are still on their way.
const LATE: Duration = Duration::from_millis(300);
/// Pause between two looks whether a door is open.
const RETRY: Duration = Duration::from_millis(1);

/// Why a rendezvous ended early. The caller knows the ranks and the names for an [`Error`].
pub(super) enum Stop {
    /// The deadline passed.
    Deadline,
    /// A rank of the world was lost meanwhile.
    Lost(Rank),
    /// The leader went away.
    Closed,
    /// A system call failed.
    System(Error),
}

/// How long to wait, and whom to watch meanwhile.
pub(super) struct Patience<'a> {
    pub(super) deadline: Option<Instant>,
    pub(super) watch: Option<&'a Watch>,
    /// Ranks without which nothing comes of it; who departed is as good as lost.
    pub(super) needed: &'a [Rank],
}

impl Patience<'_> {
    /// Time until the deadline.
    pub(super) fn left(&self) -> Duration {
        self.deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Fails if somebody that is waited for is gone.
    fn check(&self) -> Result<(), Stop> {
        let Some(watch) = self.watch else { return Ok(()) };
        let departed = || self.needed.iter().copied().find(|rank| watch.has_departed(*rank));
        watch.look().or_else(departed).map_or(Ok(()), |rank| Err(Stop::Lost(rank)))
    }

    /// What a closed connection means: that the leader went away, unless it was the loss of a rank that made it go.
    fn closed(&self) -> Stop {
        self.watch.and_then(Watch::look).map_or(Stop::Closed, Stop::Lost)
    }

    /// Waits until `fd` can be read. What was sent counts, even if who sent it is gone since.
    fn readable(&self, fd: &impl AsFd) -> Result<(), Stop> {
        loop {
            let (gone, left) = (self.check(), self.left());
            let slice = if gone.is_ok() { left.min(SLICE) } else { Duration::ZERO };
            let slice = Timespec { tv_sec: 0, tv_nsec: slice.subsec_nanos().into() };
            match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&slice)) {
                Ok(0) if left.is_zero() => return gone.and(Err(Stop::Deadline)),
                Ok(0) => gone?,
                Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Stop::System(system("poll", errno))),
            }
        }
    }
}

/// The leader's open door.
pub(crate) struct Offer {
    listener: UnixListener,
    name: String,
    token: String,
}

/// A member that has come in.
pub(super) struct Guest {
    pub(super) group_rank: usize,
    pub(super) fds: Vec<OwnedFd>,
    stream: UnixStream,
}

impl Offer {
    pub(super) fn open() -> Result<Self, Error> {
        Self::at(&format!("sconce-mesh-{} {}", random_hex()?, random_hex()?))
    }

    /// Opens the door at an address that the members know already.
    pub(super) fn at(address: &str) -> Result<Self, Error> {
        let (name, token) = split(address);
        let address = SocketAddr::from_abstract_name(name).map_err(|error| system("socket name", error))?;
        let listener = UnixListener::bind_addr(&address).map_err(|error| system("bind", error))?;
        listener.set_nonblocking(true).map_err(|error| system("listen", error))?;
        Ok(Offer { listener, name: name.to_owned(), token: token.to_owned() })
    }

    /// What members need to find the door and to be let in.
    pub(crate) fn address(&self) -> String {
        format!("{} {}", self.name, self.token)
    }

    /// Waits for group ranks 1 to `group_size` − 1 and appends them to `guests`, in order of arrival.
    pub(super) fn admit(
        &self,
        group_size: usize,
        patience: &Patience<'_>,
        guests: &mut Vec<Guest>,
    ) -> Result<(), Stop> {
        while guests.len() + 1 < group_size {
            self.admit_one(group_size, patience, guests)?;
        }
        Ok(())
    }

    /// Lets those in who still come to a group that failed, but not for long and not for ranks that are gone.
    pub(super) fn admit_late(&self, size: usize, is_gone: impl Fn(usize) -> bool, guests: &mut Vec<Guest>) {
        let end = Instant::now() + LATE;
        let awaited = |guests: &[Guest]| {
            (1..size).any(|g| !is_gone(g) && guests.iter().all(|guest| guest.group_rank != g))
        };
        while awaited(guests) && Instant::now() < end {
            let patience =
                Patience { deadline: Some(end.min(Instant::now() + SLICE)), watch: None, needed: &[] };
            match self.admit_one(size, &patience, guests) {
                Ok(()) | Err(Stop::Deadline) => {}
                Err(_) => return,
            }
        }
    }

    /// Returns once somebody stands at the door.
    #[cfg(test)]
    pub(super) fn await_knock(&self) {
        let patience = Patience { deadline: None, watch: None, needed: &[] };
        assert!(patience.readable(&self.listener).is_ok());
    }

    /// Waits for one connection, which may be no member's.
    fn admit_one(
        &self,
        group_size: usize,
        patience: &Patience<'_>,
        guests: &mut Vec<Guest>,
    ) -> Result<(), Stop> {
        patience.readable(&self.listener)?;
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if is_passing(&error) => return Ok(()),
            Err(error) => return Err(Stop::System(system("accept", error))),
        };
        // Who does not prove to be a member is sent away; the members are still to come.
        let Some(guest) = self.greet(stream, patience)? else { return Ok(()) };
        let expected = (1..group_size).contains(&guest.group_rank);
        if expected && guests.iter().all(|other| other.group_rank != guest.group_rank) {
            guests.push(guest);
        }
        Ok(())
    }

    /// Reads the hello of one connection; `None` if it is no member's.
    fn greet(&self, stream: UnixStream, patience: &Patience<'_>) -> Result<Option<Guest>, Stop> {
        let peer = socket_peercred(&stream);
        if peer.map(|peer| peer.uid) != Ok(rustix::process::geteuid()) {
            return Ok(None);
        }
        let hello_end = Instant::now() + HELLO;
        let deadline = patience.deadline.map_or(hello_end, |deadline| deadline.min(hello_end));
        let patience = Patience { deadline: Some(deadline), ..*patience };
        let (mut hello, mut filled, mut fds) = ([0; HELLO_LEN], 0, Vec::new());
        while filled < HELLO_LEN {
            match patience.readable(&stream) {
                // The caller has its own look at the deadline.
                Err(Stop::Deadline) => return Ok(None),
                ready => ready?,
            }
            match receive_fds(&stream, &mut hello[filled..], &mut fds) {
                Ok(0) | Err(_) => return Ok(None),
                Ok(len) => filled += len,
            }
            // A member gives one at most.
            if fds.len() > 1 {
                return Ok(None);
            }
        }
        let (token, rank) = hello.split_at(TOKEN_LEN);
        let group_rank = rank.iter().rev().fold(0, |rank, byte| rank << 8 | usize::from(*byte));
        Ok(same(token, self.token.as_bytes()).then_some(Guest { group_rank, fds, stream }))
    }
}

impl Guest {
    /// Hands the group's file descriptors over. A guest that is gone by now is its watchers' matter.
    ///
    /// # Errors
    /// `Stop::System`, if the system does not pass them on.
    pub(super) fn give(&self, fds: &[impl AsFd], patience: &Patience<'_>) -> Result<(), Stop> {
        match send_fds(&self.stream, b"F", fds, || patience.left().is_zero()) {
            Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(errno) => Err(Stop::System(system("sendmsg", errno))),
        }
    }
}

/// A member's side: goes to `address`, gives `own` and waits for `expected` file descriptors.
pub(super) fn fetch(
    address: &str,
    group_rank: usize,
    own: &[impl AsFd],
    expected: usize,
    patience: &Patience<'_>,
) -> Result<Vec<OwnedFd>, Stop> {
    let (name, token) = split(address);
    let address =
        SocketAddr::from_abstract_name(name).map_err(|error| Stop::System(system("socket name", error)))?;
    let stream = UnixStream::connect_addr(&address).map_err(|_| patience.closed())?;
    // Abstract names are anybody's: who took this one first may be another user, who must not learn the token.
    let peer = socket_peercred(&stream).map_err(|errno| Stop::System(system("SO_PEERCRED", errno)))?;
    if peer.uid != rustix::process::geteuid() {
        let whose = format!("the door of group rank 0 is held by user {}", peer.uid.as_raw());
        return Err(Stop::System(system("connect", whose)));
    }
    let hello = [token.as_bytes(), &(group_rank as u32).to_le_bytes()].concat();
    let sent = if own.is_empty() {
        (&stream).write_all(&hello).is_ok()
    } else {
        send_fds(&stream, &hello, own, || patience.left().is_zero()).is_ok()
    };
    if !sent {
        return Err(patience.closed());
    }
    let mut fds = Vec::new();
    while fds.len() < expected {
        patience.readable(&stream)?;
        match receive_fds(&stream, &mut [0; 1], &mut fds) {
            Ok(0) | Err(_) => return Err(patience.closed()),
            Ok(_) => {}
        }
    }
    Ok(fds)
}

/// [`fetch`] from a door that may not be open yet.
pub(super) fn fetch_when_open(
    address: &str,
    group_rank: usize,
    expected: usize,
    patience: &Patience<'_>,
) -> Result<Vec<OwnedFd>, Stop> {
    let own: [OwnedFd; 0] = [];
    loop {
        match fetch(address, group_rank, &own, expected, patience) {
            Err(Stop::Closed) if patience.left().is_zero() => return Err(Stop::Deadline),
            Err(Stop::Closed) => patience.check().map(|()| std::thread::sleep(RETRY))?,
            done => return done,
        }
    }
}

/// Name and token of an address.
fn split(address: &str) -> (&str, &str) {
    address.split_once(' ').unwrap_or((address, ""))
}

/// Whether accepting may succeed at the next try: the one who knocked has gone again.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patience() -> Patience<'static> {
        Patience { deadline: Instant::now().checked_add(Duration::from_secs(60)), watch: None, needed: &[] }
    }

    #[test]
    fn only_members_with_the_token_and_a_free_rank_are_admitted() {
        let (offer, own) = (
            Offer::open().unwrap(),
            rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        );
        let address = offer.address();
        let wrong_token = format!("{} {}", offer.name, "0".repeat(TOKEN_LEN));
        let nobody: [OwnedFd; 0] = [];
        std::thread::scope(|scope| {
            let leader = scope.spawn(|| {
                let mut guests = Vec::new();
                assert!(offer.admit(3, &patience(), &mut guests).is_ok());
                guests.iter().for_each(|guest| assert!(guest.give(&[&own, &own], &patience()).is_ok()));
                guests.iter().map(|guest| (guest.group_rank, guest.fds.len())).collect::<Vec<_>>()
            });
            for (address, rank) in [(&wrong_token, 1), (&address, 0), (&address, 3)] {
                assert!(matches!(fetch(address, rank, &nobody, 1, &patience()), Err(Stop::Closed)), "{rank}");
            }
            let first = scope.spawn(|| fetch(&address, 1, &[&own], 2, &patience()).is_ok());
            assert!(fetch(&address, 2, &nobody, 2, &patience()).is_ok());
            assert!(first.join().unwrap());
            let mut guests = leader.join().unwrap();
            guests.sort();
            assert_eq!(guests, [(1, 1), (2, 0)]);
        });
    }

    #[test]
    fn who_only_connects_does_not_keep_members_waiting_for_long() {
        let offer = Offer::open().unwrap();
        let address = offer.address();
        let name = SocketAddr::from_abstract_name(&offer.name).unwrap();
        let silent = UnixStream::connect_addr(&name).unwrap();
        std::thread::scope(|scope| {
            let leader = scope.spawn(|| {
                let (started, mut guests) = (Instant::now(), Vec::new());
                assert!(offer.admit(2, &patience(), &mut guests).is_ok());
                started.elapsed()
            });
            let own: [OwnedFd; 0] = [];
            // The leader gives nothing; its end closes the connection.
            assert!(matches!(fetch(&address, 1, &own, 1, &patience()), Err(Stop::Closed)));
            assert!(leader.join().unwrap() < 5 * HELLO);
        });
        drop(silent);
    }

    #[test]
    fn more_descriptors_than_fit_one_message_arrive_in_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let fds: Vec<OwnedFd> = (0..450)
            .map(|i| {
                let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
                rustix::fs::ftruncate(&fd, i).unwrap();
                fd
            })
            .collect();
        send_fds(&a, b"F", &fds, || true).unwrap();
        let mut got = Vec::new();
        while got.len() < fds.len() {
            assert_eq!(receive_fds(&b, &mut [0; 1], &mut got), Ok(1));
        }
        let lens: Vec<i64> = got.iter().map(|fd| rustix::fs::fstat(fd).unwrap().st_size).collect();
        assert!(lens.into_iter().eq(0..450));
    }
}
