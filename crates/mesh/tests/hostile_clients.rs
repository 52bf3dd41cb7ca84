//! Who can reach the store's port without its token: what they may cost, and that ranks do not notice them.

#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sconce_mesh::{Store as _, TcpStore, TcpStoreServer};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
/// What a rank may wait for a request or a connection on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(3);
/// Strangers whose connections the server keeps, as `SECURITY.md` says, and descriptors of the test's own.
const KEPT: usize = 1024 + 100;
/// Memory that the server may take for them.
const MEMORY_KIB: usize = 32 << 10;

/// One test at a time: they count the descriptors and the memory of this process.
static ALONE: Mutex<()> = Mutex::new(());

fn server() -> TcpStoreServer {
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits }).unwrap();
    TcpStoreServer::bind("127.0.0.1:0".parse().unwrap(), TOKEN).unwrap()
}

fn join(server: &TcpStoreServer) -> TcpStore {
    TcpStore::connect(&server.addr().to_string(), TOKEN, PATIENCE).unwrap()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Resident memory of this process (proc(5)).
fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Runs `attack` while a rank works on the store, and new ranks join; returns the longest that any of it took.
fn beside_ranks(server: &TcpStoreServer, attack: impl FnOnce()) -> Duration {
    let rank = join(server);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            for nth in 0.. {
                let started = Instant::now();
                rank.set("step", b"here").unwrap();
                assert_eq!(rank.get("step", PATIENCE).unwrap(), b"here");
                if nth % 100 == 0 {
                    join(server).add("joined", 1).unwrap();
                }
                longest = longest.max(started.elapsed());
                if over.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            longest
        });
        attack();
        over.store(true, Ordering::Relaxed);
        work.join().unwrap()
    })
}

/// Whether the other side has ended the connection.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

#[test]
fn ten_thousand_silent_connections_cost_a_bounded_part_and_disturb_no_rank() {
    const CLIENTS: usize = 10_000;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let server = server();
    let (memory, open) = (resident_kib(), descriptors());
    let mut strangers = Vec::with_capacity(CLIENTS);
    let longest = beside_ranks(&server, || {
        strangers.extend((0..CLIENTS).map(|_| TcpStream::connect(server.addr()).unwrap()));
        // The server has met them all once it serves whom it met last.
        join(&server);
        let held = descriptors() - open - CLIENTS;
        assert!(held <= KEPT, "the server holds {held} connections of strangers");
        let grown = resident_kib().saturating_sub(memory);
        assert!(grown <= MEMORY_KIB, "the server grew by {grown} KiB");
    });
    assert!(longest < PATIENCE, "a rank waited {longest:?}");
    let closed = strangers.iter_mut().filter_map(|stranger| is_closed(stranger).then_some(())).count();
    assert!(closed >= CLIENTS - KEPT, "{closed} of {CLIENTS} were turned out");
}

#[test]
fn garbage_costs_nothing_and_disturbs_no_rank() {
    const CLIENTS: u32 = 2000;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let server = server();
    let memory = resident_kib();
    let longest = beside_ranks(&server, || {
        for nth in 0..CLIENTS {
            let mut client = TcpStream::connect(server.addr()).unwrap();
            // Lengths up to 4 GiB, then bytes of no meaning, as much as the server takes.
            let len = nth.wrapping_mul(2_654_435_761);
            let noise: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(len) >> 13) as u8).collect();
            let _refused = client.write_all(&[&len.to_le_bytes()[..], &noise].concat());
        }
    });
    let grown = resident_kib().saturating_sub(memory);
    assert!(grown <= MEMORY_KIB, "the server grew by {grown} KiB");
    assert!(longest < PATIENCE, "a rank waited {longest:?}");
}

#[test]
fn a_token_that_trickles_in_is_cut_off() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let server = server();
    let started = Instant::now();
    let longest = beside_ranks(&server, || {
        let mut slow: Vec<_> = (0..200).map(|_| TcpStream::connect(server.addr()).unwrap()).collect();
        let frame = [&(TOKEN.len() as u32).to_le_bytes()[..], TOKEN.as_bytes()].concat();
        for byte in &frame[..frame.len() - 1] {
            for client in &mut slow {
                let _cut = client.write_all(&[*byte]);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        assert!(started.elapsed() > Duration::from_secs(6));
        assert!(slow.iter_mut().all(is_closed), "a client is let talk for over 5 seconds");
    });
    assert!(longest < PATIENCE, "a rank waited {longest:?}");
}
