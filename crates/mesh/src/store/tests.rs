//! The contract of every store, and what only the TCP store can get wrong.

use std::sync::Arc;
use std::time::Duration;

use super::*;

const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(20);

/// What every store must do. Two handles of one store.
fn check_contract(a: Arc<dyn Store>, b: Arc<dyn Store>) {
    a.set("k", b"v").unwrap();
    assert_eq!(b.get("k", SHORT).unwrap(), b"v");
    a.set("k", b"").unwrap();
    assert_eq!(b.get("k", SHORT).unwrap(), b"");

    let late = b.get("absent", SHORT).unwrap_err().to_string();
    assert_eq!(late, "store: get \"absent\": nobody set it within 30ms");
    let missing = a.wait(&["k", "absent"], SHORT).unwrap_err().to_string();
    assert!(missing.contains("\"absent\""), "{missing}");

    assert_eq!(a.compare_set("c", b"", b"1").unwrap(), b"1");
    assert_eq!(b.compare_set("c", b"2", b"3").unwrap(), b"1");
    assert_eq!(b.compare_set("c", b"1", b"3").unwrap(), b"3");
    assert!(a.delete("c").unwrap() && !b.delete("c").unwrap());

    a.set("word", b"word").unwrap();
    assert!(a.add("word", 1).unwrap_err().to_string().contains("no decimal number"));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| b.get("later", LONG));
        let adders: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (0..50).try_for_each(|_| a.add("n", 2).map(drop)))).collect();
        adders.into_iter().for_each(|adder| adder.join().unwrap().unwrap());
        a.set("later", b"now").unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), b"now");
    });
    for key in ["list/b", "list/a", "list"] {
        a.set(key, b"").unwrap();
    }
    assert_eq!(b.list("list/").unwrap(), ["list/a", "list/b"]);
    assert!(b.list("nothing").unwrap().is_empty());
    assert_eq!(b.add("n", -400).unwrap(), 0);
    assert_eq!(b.get("n", SHORT).unwrap(), b"0");
}

#[test]
fn a_store_in_memory_keeps_the_contract() {
    let store = MemoryStore::new();
    check_contract(Arc::new(store.clone()), Arc::new(store));
}

#[test]
fn a_store_in_a_directory_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Arc::new(FileStore::open(dir.path().join("store")).unwrap());
    check_contract(open(), open());
}

#[test]
fn a_directory_that_cannot_be_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = FileStore::open(file.path().join("store")).unwrap_err().to_string();
    assert!(error.contains(&*file.path().to_string_lossy()), "{error}");
}

#[cfg(feature = "tcp-store")]
mod tcp {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::Instant;

    use super::*;
    use crate::{TcpStore, TcpStoreServer};

    fn server() -> TcpStoreServer {
        TcpStoreServer::bind("127.0.0.1:0".parse().unwrap(), "secret").unwrap()
    }

    fn client(server: &TcpStoreServer) -> TcpStore {
        TcpStore::connect(&server.addr().to_string(), "secret", LONG).unwrap()
    }

    #[test]
    fn a_store_over_tcp_keeps_the_contract() {
        let server = server();
        check_contract(Arc::new(client(&server)), Arc::new(client(&server)));
    }

    #[test]
    fn a_thread_that_waits_for_a_key_is_not_in_the_way_of_the_one_that_sets_it() {
        let server = server();
        let store = client(&server);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| store.get("late", LONG));
            std::thread::sleep(Duration::from_millis(50));
            store.set("late", b"here").unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), b"here");
        });
        assert_eq!(store.get("late", Duration::MAX).unwrap(), b"here");
    }

    #[test]
    fn what_is_too_long_for_the_server_is_not_sent() {
        let server = server();
        let store = client(&server);
        let error = store.set("long", &vec![0; 17 << 20]).unwrap_err().to_string();
        assert!(error.contains("17825") && error.contains("16777216"), "{error}");
        store.set("short", b"x").unwrap();
        let token = "t".repeat(300);
        let error = TcpStore::connect(&server.addr().to_string(), &token, LONG).unwrap_err().to_string();
        assert!(error.contains("300 bytes"), "{error}");
    }

    #[test]
    fn a_wrong_token_is_refused_by_name() {
        let server = server();
        let refused = TcpStore::connect(&server.addr().to_string(), "guess", LONG).unwrap_err().to_string();
        assert!(refused.ends_with("the token was refused"), "{refused}");
    }

    #[test]
    fn garbage_and_absurd_lengths_end_their_own_connection_only() {
        let server = server();
        let good = client(&server);
        for bytes in [&[0xff; 64][..], b"GET / HTTP/1.1\r\n\r\n", &[6, 0, 0, 0, b's', b'e']] {
            let mut bad = TcpStream::connect(server.addr()).unwrap();
            bad.set_read_timeout(Some(LONG)).unwrap();
            // The server may end the connection at any byte, and a reset is as good an end as a close.
            let mut answer = vec![];
            let ended = bad
                .write_all(bytes)
                .and_then(|()| bad.shutdown(std::net::Shutdown::Write))
                .and_then(|()| bad.read_to_end(&mut answer));
            if let Err(error) = ended {
                assert_ne!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock,
                    "still open after {LONG:?}: {bytes:?}"
                );
            }
            assert!(answer.is_empty(), "{bytes:?}");
        }
        good.set("k", b"v").unwrap();
    }

    #[test]
    fn the_death_of_the_server_is_an_error_not_a_hang() {
        let server = server();
        let waiting = client(&server);
        let started = Instant::now();
        let outcome = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| waiting.get("never", LONG));
            client(&server).set("k", b"v").unwrap();
            drop(server);
            waiter.join().unwrap()
        });
        assert!(outcome.unwrap_err().to_string().contains("is gone"));
        assert!(started.elapsed() < LONG);
    }

    #[test]
    fn a_thousand_clients_meet() {
        const CLIENTS: i64 = 1000;
        // Both ends of each connection are in this process.
        let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let all = rustix::process::Rlimit { current: limits.maximum, ..limits };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, all).unwrap();

        let server = server();
        let stores: Vec<TcpStore> = (0..CLIENTS).map(|_| client(&server)).collect();
        std::thread::scope(|scope| {
            for store in &stores {
                let meet = || {
                    if store.add("here", 1).unwrap() == CLIENTS {
                        store.set("all", b"").unwrap();
                    }
                    store.get("all", LONG).unwrap();
                };
                std::thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, meet).unwrap();
            }
        });
    }

    #[test]
    fn a_port_in_use_is_named() {
        let first = server();
        let refused = TcpStoreServer::bind(first.addr(), "secret").unwrap_err().to_string();
        assert!(refused.starts_with(&format!("store: bind \"{}\"", first.addr())), "{refused}");
    }
}
