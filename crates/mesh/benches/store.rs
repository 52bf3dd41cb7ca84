//! 10,000 clients meet at one store: each connects, counts itself in and waits for the last one's word. The server runs
//! in this process and the clients, a thread each, in another. Prints one line:
//!
//! ```text
//! clients TAB seconds until all had met TAB bytes that the server's memory grew by
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sconce_mesh::{Store as _, TcpStore, TcpStoreServer};

const CLIENTS: usize = 10_000;
const TOKEN: &str = "secret";
const SERVER: &str = "SCONCE_BENCH_SERVER";

fn main() {
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits }).unwrap();
    if let Ok(addr) = std::env::var(SERVER) {
        return clients(&addr);
    }
    let server = TcpStoreServer::bind("127.0.0.1:0".parse().unwrap(), TOKEN).unwrap();
    let before = peak_kib();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let clients = command.env(SERVER, server.addr().to_string()).output().unwrap();
    assert!(clients.status.success(), "{}", String::from_utf8_lossy(&clients.stderr));
    let seconds = String::from_utf8_lossy(&clients.stdout);
    println!("{CLIENTS}\t{}\t{}", seconds.trim(), (peak_kib() - before) * 1024);
}

fn clients(addr: &str) {
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            let meet = || {
                let store = TcpStore::connect(addr, TOKEN, Duration::from_secs(60)).unwrap();
                if store.add("here", 1).unwrap() == CLIENTS as i64 {
                    store.set("all", b"").unwrap();
                }
                store.get("all", Duration::from_secs(60)).unwrap();
            };
            std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, meet).unwrap();
        }
    });
    println!("{}", started.elapsed().as_secs_f64());
}

/// Peak resident memory of this process (proc(5), VmHWM).
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
