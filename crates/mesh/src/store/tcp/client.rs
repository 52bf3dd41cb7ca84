//! A rank's client of the TCP store: blocking, each request under a deadline and on a connection of its own meanwhile.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::wire::{DONE, MAX_FRAME, MAX_TOKEN, Op, Request, TIMED_OUT, decode_keys, frame};
use crate::{Error, Result, Store};

/// Deadline of requests that wait for nobody, and what a server may be late with the others.
const PROMPT: Duration = Duration::from_secs(10);

/// Pause between attempts to reach a server that is not up yet.
const RETRY: Duration = Duration::from_millis(20);

/// A client of a [`TcpStoreServer`](crate::TcpStoreServer).
///
/// Threads may share it: one that waits for a key is in nobody's way.
pub struct TcpStore {
    addr: String,
    token: String,
    /// Connections on which no request is under way, and none has failed: a late reply is never taken for another's.
    idle: Mutex<Vec<TcpStream>>,
}

impl fmt::Debug for TcpStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpStore").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl TcpStore {
    /// Connects to the server at `addr` and proves `token`. A server that is not up yet is waited for.
    ///
    /// # Errors
    /// `Store` if nobody answers within `timeout`, or the token is refused.
    pub fn connect(addr: &str, token: &str, timeout: Duration) -> Result<TcpStore> {
        if token.len() > MAX_TOKEN {
            let cause = format!("a token of {} bytes, at most {MAX_TOKEN} are sent", token.len());
            return Err(Error::store("connect", addr, cause));
        }
        let started = Instant::now();
        loop {
            let left = timeout.saturating_sub(started.elapsed()).max(RETRY);
            match try_connect(addr, token, left) {
                Ok(Some(stream)) => {
                    let idle = Mutex::new(vec![stream]);
                    return Ok(TcpStore { addr: addr.to_owned(), token: token.to_owned(), idle });
                }
                Ok(None) => return Err(Error::store("connect", addr, "the token was refused".to_owned())),
                Err(cause) if started.elapsed() + RETRY >= timeout => {
                    let cause = format!("no store within {timeout:?}: {cause}");
                    return Err(Error::store("connect", addr, cause));
                }
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    fn ask(&self, op: &'static str, request: Request) -> Result<Vec<u8>> {
        let failed = |cause: String| Error::store(op, &request.key, cause);
        let encoded = request.encode();
        if encoded.len() > MAX_FRAME {
            return Err(failed(format!(
                "a request of {} bytes, at most {MAX_FRAME} are sent",
                encoded.len()
            )));
        }
        let limit = PROMPT + Duration::from_millis(request.timeout_ms);
        let lost = |cause: io::Error| failed(format!("the server at {} is gone: {cause}", self.addr));
        let mut stream = self.connection().map_err(lost)?;
        let reply = exchange(&mut stream, &encoded, limit).map_err(lost)?;
        self.idle().push(stream);
        match reply.split_first() {
            Some((&DONE, bytes)) => Ok(bytes.to_vec()),
            Some((&TIMED_OUT, _)) => {
                Err(failed(format!("nobody set it within {:?}", Duration::from_millis(request.timeout_ms))))
            }
            Some((_, why)) => Err(failed(String::from_utf8_lossy(why).into_owned())),
            None => Err(failed("an empty reply".to_owned())),
        }
    }
}

impl TcpStore {
    fn connection(&self) -> io::Result<TcpStream> {
        if let Some(stream) = self.idle().pop() {
            return Ok(stream);
        }
        let refused = || io::Error::new(io::ErrorKind::PermissionDenied, "the token was refused");
        try_connect(&self.addr, &self.token, PROMPT)?.ok_or_else(refused)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection whose token was accepted; `None` if it was refused.
fn try_connect(addr: &str, token: &str, limit: Duration) -> io::Result<Option<TcpStream>> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for addr in addr.to_socket_addrs()? {
        match TcpStream::connect_timeout(&addr, limit) {
            Ok(mut stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(limit))?;
                stream.write_all(&frame(token.as_bytes()))?;
                let mut verdict = [0];
                stream.read_exact(&mut verdict)?;
                return Ok((verdict == [1]).then_some(stream));
            }
            Err(cause) => last = cause,
        }
    }
    Err(last)
}

fn exchange(stream: &mut TcpStream, request: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(PROMPT))?;
    stream.write_all(request)?;
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a reply of {len} bytes")));
    }
    let mut reply = vec![0; len];
    stream.read_exact(&mut reply)?;
    Ok(reply)
}

fn request(op: Op, key: &str) -> Request {
    Request { op, timeout_ms: 0, key: key.to_owned(), a: vec![], b: vec![] }
}

impl Store for TcpStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.ask("set", Request { a: value.to_vec(), ..request(Op::Set, key) }).map(drop)
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.ask("get", Request { timeout_ms, ..request(Op::Get, key) })
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        let sum = self.ask("add", Request { a: delta.to_le_bytes().to_vec(), ..request(Op::Add, key) })?;
        let sum = sum.as_slice().try_into().map(i64::from_le_bytes);
        sum.map_err(|_| Error::store("add", key, "a reply that is no number".to_owned()))
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        let (a, b) = (expected.to_vec(), desired.to_vec());
        self.ask("compare_set", Request { a, b, ..request(Op::CompareSet, key) })
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        crate::store::wait_for_each(self, keys, timeout)
    }

    fn delete(&self, key: &str) -> Result<bool> {
        Ok(self.ask("delete", request(Op::Delete, key))? == [1])
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let keys = decode_keys(&self.ask("list", request(Op::List, prefix))?);
        keys.ok_or_else(|| Error::store("list", prefix, "a reply that is no list".to_owned()))
    }
}
