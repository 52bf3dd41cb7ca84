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

proptest! {
    #[test]
    fn bytes_of_any_kind_are_an_error_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(read(&bytes).is_err());
        let begun = [&MAGIC[..], &bytes].concat();
        prop_assert!(read(&begun).is_err());
    }
}
