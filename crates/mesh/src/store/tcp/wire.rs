//! Frames of the TCP store. Pure: bytes in, bytes out.
//!
//! ```text
//! client → server, first    | len u32 | token |                                   len ≤ MAX_TOKEN
//! server → client           | 1 | accepted, or | 0 | refused and closed
//! client → server           | len u32 | op u8 | timeout_ms u64 | len u32 | key | len u32 | a | len u32 | b |
//! server → client           | len u32 | status u8 | bytes |
//! ```
//!
//! All numbers little-endian. A length is checked before anything is allocated for it.

/// Longest token in bytes.
pub(super) const MAX_TOKEN: usize = 256;
/// Longest frame in bytes.
pub(super) const MAX_FRAME: usize = 16 << 20;

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Op {
    Set,
    Get,
    Add,
    CompareSet,
    Delete,
    List,
}

/// One request; `a` and `b` are the operation's values, empty if it has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) op: Op,
    pub(super) timeout_ms: u64,
    pub(super) key: String,
    pub(super) a: Vec<u8>,
    pub(super) b: Vec<u8>,
}

/// Outcome of a request, the first byte of a reply.
pub(super) const DONE: u8 = 0;
/// The deadline of a `Get` passed.
pub(super) const TIMED_OUT: u8 = 1;
/// The request was understood but cannot be done; the bytes say why.
pub(super) const REFUSED: u8 = 2;

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = vec![self.op as u8];
        body.extend_from_slice(&self.timeout_ms.to_le_bytes());
        for part in [self.key.as_bytes(), &self.a, &self.b] {
            body.extend_from_slice(&(part.len() as u32).to_le_bytes());
            body.extend_from_slice(part);
        }
        frame(&body)
    }

    /// The request in a frame's body; `None` if it is not one.
    pub(super) fn decode(body: &[u8]) -> Option<Request> {
        let (op, body) = body.split_first()?;
        let op = [Op::Set, Op::Get, Op::Add, Op::CompareSet, Op::Delete, Op::List]
            .into_iter()
            .find(|o| *o as u8 == *op)?;
        let (timeout, body) = body.split_first_chunk::<8>()?;
        let (key, body) = part(body)?;
        let (a, body) = part(body)?;
        let (b, body) = part(body)?;
        let key = std::str::from_utf8(key).ok()?.to_owned();
        let request =
            Request { op, timeout_ms: u64::from_le_bytes(*timeout), key, a: a.to_vec(), b: b.to_vec() };
        body.is_empty().then_some(request)
    }
}

/// A list of keys in a reply: each behind its length.
pub(super) fn encode_keys(keys: &[String]) -> Vec<u8> {
    keys.iter().flat_map(|key| frame(key.as_bytes())).collect()
}

/// The keys of [`encode_keys`]; `None` if the bytes are not such a list.
pub(super) fn decode_keys(mut bytes: &[u8]) -> Option<Vec<String>> {
    let mut keys = Vec::new();
    while !bytes.is_empty() {
        let (key, rest) = part(bytes)?;
        keys.push(std::str::from_utf8(key).ok()?.to_owned());
        bytes = rest;
    }
    Some(keys)
}

/// A body behind its length.
pub(super) fn frame(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_le_bytes()[..], body].concat()
}

fn part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, bytes) = bytes.split_first_chunk::<4>()?;
    bytes.split_at_checked(u32::from_le_bytes(*len) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_wire_and_a_cut_one_is_refused() {
        let request =
            Request { op: Op::CompareSet, timeout_ms: 7, key: "k".into(), a: vec![1], b: vec![2, 3] };
        let body = &request.encode()[4..];
        assert_eq!(Request::decode(body), Some(request));
        for cut in 0..body.len() {
            assert_eq!(Request::decode(&body[..cut]), None, "{cut} bytes");
        }
        assert_eq!(Request::decode(&[body, &[0]].concat()), None, "a byte too many");
    }

    #[test]
    fn a_list_of_keys_survives_the_wire_and_a_cut_one_is_refused() {
        let keys = ["", "a", "größe"].map(str::to_owned);
        let bytes = encode_keys(&keys);
        assert_eq!(decode_keys(&bytes).as_deref(), Some(&keys[..]));
        assert_eq!(decode_keys(&bytes[..bytes.len() - 1]), None);
    }
}
