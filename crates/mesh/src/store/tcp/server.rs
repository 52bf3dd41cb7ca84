//! The server of the TCP store: one thread, one task a client.
//!
//! Who has not proved the token yet is a [`Stranger`](strangers::Stranger): few at a time, of few bytes, not for long.

mod strangers;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio::task::LocalSet;
use tokio::time::timeout;

use super::wire::{DONE, MAX_FRAME, MAX_TOKEN, Op, REFUSED, Request, TIMED_OUT, encode_keys, frame};
use crate::store::entries::{add, compare_set, list};
use crate::token::same;
use crate::{Error, Result};
use strangers::{Stranger, Strangers};

/// How long a client may take to prove the token.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Clients that may knock at the same time; the system's `somaxconn` may allow fewer.
const BACKLOG: i32 = 1 << 14;

/// The rendezvous store that ranks connect to. It serves until it is dropped.
#[derive(Debug)]
pub struct TcpStoreServer {
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What all connections share; everything runs on one thread.
#[derive(Default)]
struct Shared {
    token: Vec<u8>,
    entries: RefCell<HashMap<String, Vec<u8>>>,
    /// Who waits for a key. One for all keys would wake ten thousand waiting clients for each that arrives.
    waiting: RefCell<HashMap<String, Rc<Notify>>>,
    strangers: Strangers,
}

impl TcpStoreServer {
    /// Serves at `addr`; port 0 takes a free one. Only clients that prove `token` are served.
    ///
    /// # Errors
    /// `Store` if the address cannot be bound, a port in use included.
    pub fn bind(addr: SocketAddr, token: &str) -> Result<TcpStoreServer> {
        let failed = |cause: std::io::Error| Error::store("bind", &addr.to_string(), cause.to_string());
        let listener = TcpListener::bind(addr).map_err(failed)?;
        // std asks for 128; connections beyond it are dropped and come again after a second.
        rustix::net::listen(&listener, BACKLOG).map_err(|errno| failed(errno.into()))?;
        listener.set_nonblocking(true).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(failed)?;
        let (stop, stopped) = oneshot::channel();
        let token = token.as_bytes().to_vec();
        let serve = move || {
            let shared = Rc::new(Shared { token, ..Shared::default() });
            let tasks = LocalSet::new();
            tasks.block_on(&runtime, async {
                tokio::task::spawn_local(accept(listener, shared));
                // The sender's drop is the stop; the tasks end with the set.
                let _ = stopped.await;
            });
        };
        let thread =
            std::thread::Builder::new().name("sconce-store".to_owned()).spawn(serve).map_err(failed)?;
        Ok(TcpStoreServer { addr: bound, stop: Some(stop), thread: Some(thread) })
    }

    /// Serves at `host:port`, at the first address of that name.
    ///
    /// # Errors
    /// `Store` if the name has no address, or as [`TcpStoreServer::bind`].
    pub fn bind_to(addr: &str, token: &str) -> Result<TcpStoreServer> {
        let failed = |cause: String| Error::store("bind", addr, cause);
        let mut addrs = addr.to_socket_addrs().map_err(|cause| failed(cause.to_string()))?;
        let first = addrs.next().ok_or_else(|| failed("the name has no address".to_owned()))?;
        Self::bind(first, token)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for TcpStoreServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A server that panicked has nothing left to stop.
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, shared: Rc<Shared>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                let nth = shared.strangers.next();
                let task = tokio::task::spawn_local(serve(client, shared.clone(), nth));
                shared.strangers.admit(nth, task.abort_handle());
            }
            // Out of descriptors: some in use must close first, and a stranger's is the least loss.
            Err(_) => {
                shared.strangers.turn_out_the_oldest();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// One client until it closes, or sends what is no request.
async fn serve(mut client: TcpStream, shared: Rc<Shared>, nth: u64) {
    let stranger = Stranger::new(&shared.strangers, nth);
    // Replies are one write each; waiting to fill a packet would only delay them.
    let _ = client.set_nodelay(true);
    if !matches!(timeout(HANDSHAKE, handshake(&mut client, &shared.token)).await, Ok(Some(()))) {
        return;
    }
    drop(stranger);
    while let Some(body) = read_frame(&mut client, MAX_FRAME).await {
        let Some(request) = Request::decode(&body) else { return };
        let (status, bytes) = answer(&shared, request).await;
        if client.write_all(&frame(&[&[status], &bytes[..]].concat())).await.is_err() {
            return;
        }
    }
}

async fn handshake(client: &mut TcpStream, token: &[u8]) -> Option<()> {
    let proof = read_frame(client, MAX_TOKEN).await?;
    let accepted = same(&proof, token);
    client.write_all(&[u8::from(accepted)]).await.ok()?;
    accepted.then_some(())
}

async fn read_frame(client: &mut TcpStream, max: usize) -> Option<Vec<u8>> {
    let len = client.read_u32_le().await.ok()? as usize;
    if len > max {
        return None;
    }
    let mut body = vec![0; len];
    client.read_exact(&mut body).await.ok()?;
    Some(body)
}

async fn answer(shared: &Shared, request: Request) -> (u8, Vec<u8>) {
    let Request { op, timeout_ms, key, a, b } = request;
    if op == Op::Get {
        let value = timeout(Duration::from_millis(timeout_ms), value_of(shared, &key)).await;
        return value.map_or((TIMED_OUT, vec![]), |value| (DONE, value));
    }
    let waiting = shared.waiting.borrow().get(&key).cloned();
    let reply = change(&mut shared.entries.borrow_mut(), op, key, a, b);
    waiting.iter().for_each(|waiting| waiting.notify_waiters());
    reply
}

async fn value_of(shared: &Shared, key: &str) -> Vec<u8> {
    if let Some(value) = shared.entries.borrow().get(key) {
        return value.clone();
    }
    let waiting = Waiting::new(shared, key);
    loop {
        let changed = waiting.notify.notified();
        if let Some(value) = shared.entries.borrow().get(key) {
            return value.clone();
        }
        changed.await;
    }
}

/// A client that waits for a key. The last to go takes the key's entry along, also at its deadline.
struct Waiting<'a> {
    shared: &'a Shared,
    key: &'a str,
    notify: Rc<Notify>,
}

impl<'a> Waiting<'a> {
    fn new(shared: &'a Shared, key: &'a str) -> Self {
        let notify = Rc::clone(shared.waiting.borrow_mut().entry(key.to_owned()).or_default());
        Waiting { shared, key, notify }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // One is the map's, one is this.
        if Rc::strong_count(&self.notify) == 2 {
            self.shared.waiting.borrow_mut().remove(self.key);
        }
    }
}

fn change(
    entries: &mut HashMap<String, Vec<u8>>,
    op: Op,
    key: String,
    a: Vec<u8>,
    b: Vec<u8>,
) -> (u8, Vec<u8>) {
    match op {
        Op::Set => {
            entries.insert(key, a);
            (DONE, vec![])
        }
        Op::Add => {
            let delta = a.as_slice().try_into().map_or(0, i64::from_le_bytes);
            match add(entries, &key, delta) {
                Ok(sum) => (DONE, sum.to_le_bytes().to_vec()),
                Err(error) => (REFUSED, error.to_string().into_bytes()),
            }
        }
        Op::CompareSet => (DONE, compare_set(entries, &key, &a, &b)),
        Op::Delete => (DONE, vec![u8::from(entries.remove(&key).is_some())]),
        Op::List => (DONE, encode_keys(&list(entries, &key))),
        Op::Get => unreachable!("a get is answered before, as it may wait"),
    }
}
