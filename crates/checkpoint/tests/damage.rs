//! Every byte counts: flipped bits and cut files are noticed, or were never read.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::path::{Path, PathBuf};

use sconce_checkpoint::{Error, SaveOptions, load, save, save_with};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value, run_boxes};

/// Two boxes of one tensor, so that there are two files; small tensors, an empty one, plain values.
fn state(seed: u8, size: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    let shape = [size, 7];
    let (cut, numel) = (size * 7 / 2 + 3, size * 7);
    let boxes: Vec<TensorBox> = [run_boxes(&shape, 0, cut), run_boxes(&shape, cut, numel - cut)].concat();
    let bytes = (0..numel * 4).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
    state.insert_tensor("large", TensorBuf::from_boxes(DType::F32, &shape, boxes, bytes).unwrap());
    for nth in 0..5u8 {
        let tensor = TensorBuf::new(DType::U8, &[3], vec![nth ^ seed; 3]).unwrap();
        state.insert_tensor(format!("small.{nth}"), tensor);
    }
    state.insert_tensor("empty", TensorBuf::new(DType::F64, &[0], vec![]).unwrap());
    state.insert("step", i64::from(seed));
    state.insert("names", vec![Value::Str("a".to_owned()), Value::Bytes(vec![seed])]);
    state
}

fn contents(state: &StateDict<'_>) -> (String, Vec<u8>) {
    let mut bytes = Vec::new();
    for (_, tensor) in state.flat_tensors().unwrap() {
        for index in 0..tensor.local_boxes().len() {
            tensor.read_box(index, &mut |lent| bytes.extend_from_slice(lent)).unwrap();
        }
    }
    (format!("{state:?}"), bytes)
}

fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(&path).unwrap())).collect()
}

/// A load of damaged files fails, or everything is as it was saved.
#[track_caller]
fn check(path: &Path, size: usize, what: &dyn Fn() -> String) -> bool {
    let mut loaded = state(2, size);
    match load(path, &mut loaded) {
        Ok(_) => {
            assert!(contents(&loaded) == contents(&state(1, size)), "{} was loaded", what());
            false
        }
        Err(Error::Ranks { .. } | Error::Mesh(_)) => panic!("one process has no ranks"),
        Err(_) => true,
    }
}

/// Raise with `SCONCE_FLIPS`.
fn n_flips() -> usize {
    std::env::var("SCONCE_FLIPS").map_or(10_000, |n| n.parse().unwrap())
}

#[test]
fn a_flipped_bit_anywhere_is_noticed_or_in_bytes_that_are_not_read() {
    let (dir, size) = (tempfile::tempdir_in(memory_or_disk()).unwrap(), 50);
    let path = dir.path().join("c");
    save(&path, &state(1, size)).unwrap();
    let files = files(&path);
    assert!(files.len() > 2, "boxes in several files, and a manifest");
    let total: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    let (mut random, mut noticed) = (0x9e37_79b9_7f4a_7c15u64, 0);
    for _ in 0..n_flips() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut at = (random >> 20) as usize % total;
        let (file, bytes) = files
            .iter()
            .find(|(_, bytes)| {
                at < bytes.len() || {
                    at -= bytes.len();
                    false
                }
            })
            .unwrap();
        let bit = (random >> 9) % 8;
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << bit;
        std::fs::write(file, damaged).unwrap();
        let what = || format!("bit {bit} of byte {at} of {}", file.display());
        noticed += usize::from(check(&path, size, &what));
        std::fs::write(file, bytes).unwrap();
    }
    // Every block of these files is touched, and blocks cover headers and padding too.
    assert_eq!(noticed, n_flips(), "of all flips");
}

#[test]
fn every_truncation_and_every_lengthening_is_noticed() {
    let (dir, size) = (tempfile::tempdir_in(memory_or_disk()).unwrap(), 3);
    let path = dir.path().join("c");
    save(&path, &state(1, size)).unwrap();
    for (file, bytes) in files(&path) {
        for len in 0..bytes.len() {
            std::fs::write(&file, &bytes[..len]).unwrap();
            assert!(check(&path, size, &|| format!("{len} bytes")), "{len} bytes of {}", file.display());
        }
        std::fs::write(&file, [&bytes[..], &[0]].concat()).unwrap();
        assert!(check(&path, size, &|| "a byte too many".to_owned()));
        std::fs::write(&file, &bytes).unwrap();
    }
    assert!(!check(&path, size, &|| "whole".to_owned()));
}

/// Writes beyond the limit on the size of files fail, as they do on a full disk or beyond a quota: with the errors that
/// the system gives (`EFBIG` here, `ENOSPC` there), at the same calls.
#[test]
fn a_write_that_finds_no_room_is_an_error_that_names_the_file_and_the_checkpoint_before_stays() {
    const ROLE: &str = "SCONCE_TEST_NO_ROOM";
    let name = "a_write_that_finds_no_room_is_an_error_that_names_the_file_and_the_checkpoint_before_stays";
    if let Ok(path) = std::env::var(ROLE) {
        let options = SaveOptions { overwrite: true, ..SaveOptions::default() };
        let error = save_with(&path, &state(2, 2000), options).unwrap_err();
        let Error::Io { op, path: file, os_error, .. } = error else { panic!("{error}") };
        println!("no room: {op} {} {os_error:?}", file.display());
        return;
    }
    for place in [std::env::temp_dir(), memory_or_disk().to_owned()] {
        let dir = tempfile::tempdir_in(place).unwrap();
        let path = dir.path().join("c");
        save(&path, &state(1, 50)).unwrap();
        // 512-byte units: 16 KiB, less than the data file of 56 KB. The signal of the limit is ignored, as a full disk sends none.
        let script = "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\"";
        let binary = std::env::current_exe().unwrap();
        let mut child = std::process::Command::new("sh");
        child.args(["-c", script]).arg(binary).args([name, "--exact", "--nocapture"]).env(ROLE, &path);
        let output = child.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("no room: ") && text.contains("shard-00001"), "{text}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().contains(".tmp-")), "{left:?}");
        let mut loaded = state(3, 50);
        load(&path, &mut loaded).unwrap();
        assert!(contents(&loaded) == contents(&state(1, 50)));
    }
}

fn memory_or_disk() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}
