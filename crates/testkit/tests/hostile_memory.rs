//! What files that were made to exhaust memory take, counted: at most 64 MiB beyond their length.

#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::path::Path;
use std::time::{Duration, Instant};

use sconce_checkpoint::{StorageReader, hf, torch};
use sconce_testkit::{CountingAllocator, live_bytes, peak_bytes};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const LEN: usize = 1 << 20;
const LIMIT_BYTES: usize = 64 << 20;

/// One opcode again and again, or a beginning and then one.
fn repeated(head: &[u8], body: &[u8], tail: &[u8]) -> Vec<u8> {
    let count = (LEN - head.len() - tail.len()) / body.len();
    [head, &body.repeat(count), tail].concat()
}

/// A pickled instance of a class of torch's metadata; its state is on the stack after it.
fn instance(class: &str) -> Vec<u8> {
    format!("ctorch.distributed.checkpoint.metadata\n{class}\n)\u{81}").chars().map(|c| c as u8).collect()
}

/// Metadata whose dicts are `state_dict_metadata` and `storage_data`.
fn metadata(tensors: &[u8], places: &[u8]) -> Vec<u8> {
    let name = |name: &str| [&b"X"[..], &(name.len() as u32).to_le_bytes(), name.as_bytes()].concat();
    let head = [b"\x80\x02".to_vec(), instance("Metadata"), b"}(".to_vec()].concat();
    [
        head,
        name("state_dict_metadata"),
        tensors.to_vec(),
        name("storage_data"),
        places.to_vec(),
        b"ub.".to_vec(),
    ]
    .concat()
}

fn pickles() -> Vec<(&'static str, Vec<u8>)> {
    // A place whose offset is a tuple of 100,000 numbers, which the memo gives again for every key.
    let many_dims = [&b"("[..], &b"K\x01".repeat(100_000), b"tr\x00\x00\x00\x00"].concat();
    let index = [
        instance("MetadataIndex"),
        b"}(X\x03\x00\x00\x00fqnX\x01\x00\x00\x00aX\x06\x00\x00\x00offset".to_vec(),
    ]
    .concat();
    let shared: Vec<u8> = (0..4000).flat_map(|_| [&index[..], b"j\x00\x00\x00\x00ubN"].concat()).collect();
    let shared = [&many_dims[..], b"0}(", &shared, b"u"].concat();
    // A state of 50,000 attributes for every key.
    let fields = [&b"}("[..], &b"X\x01\x00\x00\x00aN".repeat(50_000), b"ur\x00\x00\x00\x00"].concat();
    let states: Vec<u8> =
        (0..8000).flat_map(|_| [&instance("MetadataIndex")[..], b"j\x00\x00\x00\x00bN"].concat()).collect();
    let states = [&fields[..], b"0}(", &states, b"u"].concat();
    vec![
        ("lists", repeated(b"\x80\x02", b"]", b".")),
        ("tuples", repeated(b"\x80\x02", b")", b".")),
        ("tuples of tuples", repeated(b"\x80\x02N", b"\x85", b".")),
        ("values", repeated(b"\x80\x02", b"N", b".")),
        ("marks", repeated(b"\x80\x02", b"(", b".")),
        ("copies of the top", repeated(b"\x80\x02]", b"2", b".")),
        ("lists of lists", repeated(b"\x80\x02", b"]Na", b".")),
        ("memo", repeated(b"\x80\x02N", b"r\xff\xff\xff\xff", b".")),
        ("shared offsets", metadata(b"}", &shared)),
        ("shared states", metadata(b"}", &states)),
    ]
}

#[track_caller]
fn check(what: &str, path: &Path, reader: &dyn StorageReader) {
    let len = std::fs::metadata(path).unwrap().len() as usize;
    let (before, started) = (live_bytes(), Instant::now());
    let (outcome, peak) = peak_bytes(|| reader.read_metadata().map(drop));
    let took = started.elapsed();
    assert!(outcome.is_err(), "{what}: it was read");
    let peak = peak.saturating_sub(before);
    assert!(peak <= len + LIMIT_BYTES, "{what}: {peak} bytes for {len}");
    assert!(took < Duration::from_secs(20), "{what}: {took:?}");
}

#[test]
fn pickles_take_at_most_64_mib_beyond_their_length() {
    for (what, pickle) in pickles() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".metadata");
        std::fs::write(&path, &pickle).unwrap();
        check(what, &path, &torch::Reader::new(dir.path()));
    }
}

#[test]
fn headers_take_at_most_64_mib_beyond_their_length() {
    let tensor =
        |shape: &str| format!(r#"{{"w":{{"dtype":"U8","shape":[{shape}0],"data_offsets":[0,0]}}}}x"#);
    let cases = [
        ("dims", tensor(&"0,".repeat(LEN / 2))),
        ("lists of lists", "[".repeat(LEN)),
        ("unknown keys", format!(r#"{{"w":{{"x":[{}0]}}}}"#, "0,".repeat(LEN / 2))),
        ("names", format!("{{{}", r#""":1,"#.repeat(LEN / 5))),
        ("metadata", format!(r#"{{"__metadata__":{{{}"#, r#""a":"","#.repeat(LEN / 7))),
    ];
    for (what, json) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()).unwrap();
        check(what, &path, &hf::Reader::new(&path));
    }
}
