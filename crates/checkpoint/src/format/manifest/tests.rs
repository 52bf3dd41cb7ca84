//! Manifests: there and back, and every damage noticed.

use std::path::Path;

use proptest::prelude::*;
use sconce_dtensor::{DType, TensorBox};
use zerocopy::IntoBytes;

use super::*;
use crate::Error;
use crate::metadata::{BLOCK_BYTES, ChunkStorageMetadata, FileMetadata, Metadata, TensorStorageMetadata};

fn metadata() -> Metadata {
    let chunk = |offsets: &[usize], sizes: &[usize], file, offset_bytes| ChunkStorageMetadata {
        bounds: TensorBox { offsets: offsets.to_vec(), sizes: sizes.to_vec() },
        file,
        offset_bytes,
    };
    let tensor = |fqn: &str, dtype, shape: &[usize], chunks| TensorStorageMetadata {
        fqn: fqn.to_owned(),
        dtype,
        shape: shape.to_vec(),
        chunks,
    };
    let tensors = vec![
        tensor("empty", DType::F64, &[0, 3], vec![]),
        tensor("größe", DType::BF16, &[], vec![chunk(&[], &[], 1, 4096)]),
        tensor(
            "w",
            DType::F32,
            &[4, 5],
            vec![chunk(&[0, 0], &[3, 5], 0, 4096), chunk(&[3, 0], &[1, 5], 1, 4100)],
        ),
    ];
    let file = |name: &str, len_bytes: u64| FileMetadata {
        name: name.to_owned(),
        len_bytes,
        block_crcs: Some((0..len_bytes.div_ceil(BLOCK_BYTES) as u32).collect()),
    };
    let files = vec![file("a", 5000), file("b", 2 * BLOCK_BYTES + 1)];
    let tree = Node::Map(vec![
        ("nan".to_owned(), Node::Float(0x7ff8_0000_0000_1234)),
        ("more".to_owned(), Node::List(vec![Node::Bytes(vec![0, 255]), Node::None, Node::Bool(true)])),
        ("w".to_owned(), Node::Tensor),
    ]);
    Metadata { tensors, files, tree }
}

fn read(bytes: &[u8]) -> crate::Result<Metadata> {
    decode(Path::new("dir/manifest.sconce"), bytes)
}

#[test]
fn a_manifest_says_what_was_written() {
    assert_eq!(read(&encode(&metadata()).unwrap()).unwrap(), metadata());
}

#[test]
fn every_flipped_bit_and_every_cut_is_an_error() {
    let bytes = encode(&metadata()).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&damaged).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(read(&bytes[..len]).is_err(), "{len} bytes");
    }
    assert!(read(&[&bytes[..], &[0]].concat()).is_err(), "a byte too many");
}

#[test]
fn a_later_version_is_refused_by_number() {
    let mut bytes = encode(&metadata()).unwrap();
    bytes[8] = 2;
    let crc = crc32fast::hash(&bytes[..28]);
    bytes[28..32].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(read(&bytes), Err(Error::Version { supported: 1, got: 2, .. })));
}

/// What an attacker with correct checksums may claim.
#[test]
fn names_that_leave_the_directory_and_boxes_outside_are_refused() {
    let check = |change: &dyn Fn(&mut Metadata)| {
        let mut hostile = metadata();
        change(&mut hostile);
        let refused = read(&encode(&hostile).unwrap());
        assert!(matches!(refused, Err(Error::Corrupt { .. })), "{refused:?}");
    };
    for name in ["../a", "/etc/passwd", "a/b", "..", "", "a\0"] {
        check(&|m| m.files[0].name = name.to_owned());
    }
    check(&|m| m.tensors[2].chunks[0].file = 2);
    check(&|m| m.tensors[2].chunks[0].offset_bytes = u64::MAX);
    check(&|m| m.tensors[2].chunks[0].offset_bytes = 4960);
    check(&|m| m.tensors[2].chunks[0].bounds.offsets[0] = 2);
    check(&|m| m.tensors[2].shape = vec![usize::MAX, usize::MAX]);
    check(&|m| m.tensors.swap(0, 1));
    check(&|m| m.files[1].len_bytes = u64::MAX);
}

#[test]
fn a_head_that_claims_more_than_there_is_allocates_nothing() {
    let mut bytes = encode(&metadata()).unwrap();
    bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..28]);
    bytes[28..32].copy_from_slice(crc.as_bytes());
    assert!(matches!(read(&bytes), Err(Error::Corrupt { .. })));
}

/// The manifest with other bytes from `at` on in the section of that position, and right checksums.
fn forged(section: usize, at: usize, bytes: &[u8]) -> Vec<u8> {
    let good = encode(&metadata()).unwrap();
    let head_len = u64::from_le_bytes(good[16..24].try_into().unwrap()) as usize;
    let mut head: Head = serde_json::from_slice(&good[32..32 + head_len]).unwrap();
    let mut columns = good[32 + head_len..].to_vec();
    let s = &mut head.sections;
    let all = [&mut s.tensors, &mut s.chunks, &mut s.dims, &mut s.files, &mut s.blocks, &mut s.names];
    let mut start = 0;
    for (nth, of) in all.into_iter().enumerate() {
        let end = start + of.len_bytes as usize;
        if nth == section {
            columns[start + at..start + at + bytes.len()].copy_from_slice(bytes);
            of.crc32 = crc32fast::hash(&columns[start..end]);
        }
        start = end;
    }
    let head = serde_json::to_vec(&head).unwrap();
    let mut prelude = good[..32].to_vec();
    prelude[16..24].copy_from_slice(&(head.len() as u64).to_le_bytes());
    prelude[24..28].copy_from_slice(&crc32fast::hash(&head).to_le_bytes());
    let crc = crc32fast::hash(&prelude[..28]);
    prelude[28..].copy_from_slice(&crc.to_le_bytes());
    [prelude, head, columns].concat()
}

#[test]
fn counts_and_offsets_of_any_size_are_refused_before_anything_is_allocated() {
    let (tensors, chunks, dims, files, names) = (0, 1, 2, 3, 5);
    assert_eq!(read(&forged(tensors, 0, &[])).unwrap(), metadata());
    let number = |n: u64| n.to_le_bytes();
    let third = 2 * size_of::<rows::TensorRow>();
    for (section, at, bytes) in [
        (tensors, third + 32, number(1_000_000_000)), // the number of chunks
        (tensors, third + 32, number(u64::MAX)),
        (tensors, 32, number(1)),       // a chunk that another tensor has
        (tensors, 16, number(1 << 63)), // where the shape begins
        (tensors, 0, number(1 << 63)),  // where the name begins
        (chunks, 8, number(u64::MAX)),  // the offset in the file
        (chunks, 16, number(1 << 63)),  // the file
        (chunks, 0, number(1 << 62)),   // where the bounds begin
        (dims, 0, number(1 << 63)),     // a size
        (files, 16, number(1 << 63)),   // a length
        (files, 24, number(1 << 63)),   // where the checksums begin
        (tensors, 12, number(0xff)),    // a dtype that there is not
        (names, 0, number(0xff)),       // what is no UTF-8
    ] {
        let refused = read(&forged(section, at, &bytes));
        assert!(matches!(refused, Err(Error::Corrupt { .. })), "{section} {at}: {refused:?}");
    }
}

#[test]
fn a_state_nested_too_deep_to_be_read_back_is_not_written() {
    let nested = |depth: usize| {
        let tree = (0..depth).fold(Node::Int(1), |node, _| Node::Map(vec![("k".to_owned(), node)]));
        Metadata { tree: Node::Map(vec![("root".to_owned(), tree)]), ..metadata() }
    };
    let deepest = (0..100).rev().find(|depth| encode(&nested(*depth)).is_ok()).unwrap();
    assert!(deepest >= 30, "{deepest}");
    assert_eq!(read(&encode(&nested(deepest)).unwrap()).unwrap(), nested(deepest));
    assert!(matches!(encode(&nested(deepest + 1)), Err(Error::ValueMismatch { .. })));
}

proptest! {
    #[test]
    fn bytes_of_any_kind_are_an_error_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(read(&bytes).is_err());
        let begun = [&MAGIC[..], &bytes].concat();
        prop_assert!(read(&begun).is_err());
    }
}
