//! Files come out as their contents, with the checksums of their blocks, however they are written.

use sconce_dtensor::{DType, TensorBuf};

use super::*;
use crate::metadata::BLOCK_BYTES;

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * i) >> 7) as u8).collect()
}

/// A header and boxes of the given sizes, one after the other; what the file must hold.
fn check(dir: &Path, header: usize, sizes: &[usize], threads: usize) {
    let tensors: Vec<TensorBuf> =
        sizes.iter().map(|len| TensorBuf::new(DType::U8, &[*len], bytes(*len)).unwrap()).collect();
    let mut end = header as u64;
    let mut pieces = Vec::new();
    for tensor in &tensors {
        let start = end;
        end += tensor.bytes().len() as u64;
        pieces.push(Piece { fqn: "t", tensor, index: 0, bytes: start..end });
    }
    let contents = Contents { header: bytes(header), pieces };
    let all: Vec<u8> = [bytes(header)].into_iter().chain(sizes.iter().map(|n| bytes(*n))).flatten().collect();
    let path = dir.join("f");
    let (len_bytes, crcs) = write_file(&path, &contents, threads, true).unwrap();
    assert_eq!(len_bytes, all.len() as u64);
    assert!(std::fs::read(&path).unwrap() == all, "{header}, {} boxes, {threads} threads", sizes.len());
    assert_eq!(crcs, all.chunks(BLOCK_BYTES as usize).map(crc32fast::hash).collect::<Vec<_>>());
    std::fs::remove_file(&path).unwrap();
}

/// The build directory is on a disk, `/dev/shm` is memory: direct and buffered writes, where the machine has both.
#[test]
fn files_hold_their_contents_and_every_block_its_checksum() {
    const MIB: usize = 1 << 20;
    for base in [Path::new(env!("CARGO_MANIFEST_DIR")), Path::new("/dev/shm")] {
        let dir = tempfile::Builder::new().prefix(".sconce-test-").tempdir_in(base).unwrap();
        for threads in [1, 3] {
            check(dir.path(), 0, &[], threads);
            check(dir.path(), 17, &[], threads);
            check(dir.path(), 4096, &[0, 1, 0, 4095, MIB], threads);
            check(dir.path(), 4096, &vec![999; 3000], threads);
            check(dir.path(), 4096, &[17 * MIB + 5, 3, 9 * MIB, 70_000, 65_536, 1], threads);
            check(dir.path(), 4096, &[20 * MIB - 4096], threads);
        }
    }
}

#[test]
fn an_existing_file_is_never_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, "old").unwrap();
    let contents = Contents { header: vec![1], pieces: Vec::new() };
    let refused = write_file(&path, &contents, 1, false);
    assert!(matches!(refused, Err(Error::Io { op, .. }) if op == "create"));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}
