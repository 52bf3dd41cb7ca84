//! Every byte counts: a flipped bit, a missing byte, a full disk or a directory that cannot be written is a typed error on
//! every rank, and what was there before stays.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use common::ranks;
use sconce_checkpoint::{
    BLOCK_BYTES, Error, LoadOptions, MANIFEST_NAME, SaveOptions, Verify, load, load_new, load_with, save,
    save_with,
};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf};

/// Sizes of the tensors: one of several blocks, one of a part of one, one that every file has a part of.
const LARGE: usize = 2 * BLOCK_BYTES as usize + 777;
const SMALL: usize = 300;

fn bytes_of(name: &str, n: usize) -> Vec<u8> {
    (0..n).map(|i| ((i * 31) >> 3) as u8 ^ name.as_bytes()[0] | 1).collect()
}

/// One rank's rows of `{"large", "small", "spread"}`.
fn state(rank: usize, n_ranks: usize, is_filled: bool) -> StateDict<'static> {
    let mut state = StateDict::new();
    for (name, n, start, end) in [
        ("large", LARGE, 0, if rank == 0 { LARGE } else { 0 }),
        ("small", SMALL, 0, if rank + 1 == n_ranks { SMALL } else { 0 }),
        ("spread", SMALL, rank * SMALL / n_ranks, (rank + 1) * SMALL / n_ranks),
    ] {
        let held = TensorBox { offsets: vec![start], sizes: vec![end - start] };
        let bytes = bytes_of(name, n)[start..end].to_vec();
        let bytes = if is_filled { bytes } else { vec![0; end - start] };
        state.insert_tensor(name, TensorBuf::from_boxes(DType::U8, &[n], vec![held], bytes).unwrap());
    }
    state.insert("step", i64::from(is_filled));
    state
}

/// A checkpoint of three ranks.
fn checkpoint(dir: &Path) -> PathBuf {
    let path = dir.join("c");
    ranks(3, |group| {
        let options = SaveOptions { group: Some(&group), sync: false, ..SaveOptions::default() };
        save_with(&path, &state(group.group_rank().0, 3, true), options).unwrap();
    });
    path
}

fn files(checkpoint: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(checkpoint).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn contents<'s>(state: &'s StateDict<'_>, name: &str) -> &'s [u8] {
    state.tensor::<TensorBuf>(name).unwrap().bytes()
}

/// The file that an error names.
fn named(error: &Error) -> Option<&Path> {
    match error {
        Error::Corrupt { path, .. } | Error::Length { path, .. } | Error::NotACheckpoint { path, .. } => {
            Some(path)
        }
        Error::PartlyLoaded { cause, .. } => named(cause),
        _ => None,
    }
}

/// xorshift64*.
fn next(state: &mut u64) -> usize {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize
}

#[test]
fn any_flipped_bit_is_found_by_a_load_of_all_and_never_reaches_a_load_of_a_part() {
    let flips = std::env::var("SCONCE_FLIPS").map_or(10_000, |n| n.parse().expect("a number"));
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let files = files(&path);
    assert_eq!(files.len(), 4, "three data files and the manifest");
    let (mut random, mut harmless_to_part) = (7, 0);
    let (mut all, mut part) = (state(0, 1, false), StateDict::new());
    part.insert_tensor("spread", TensorBuf::new(DType::U8, &[SMALL], vec![0; SMALL]).unwrap());
    let strict = LoadOptions { strict: false, ..LoadOptions::default() };
    for nth in 0..flips {
        let file = &files[nth % files.len()];
        let handle = OpenOptions::new().read(true).write(true).open(file).unwrap();
        let at = next(&mut random) as u64 % handle.metadata().unwrap().len();
        let mut byte = [0];
        handle.read_exact_at(&mut byte, at).unwrap();
        let flipped = byte[0] ^ (1 << (next(&mut random) % 8));
        handle.write_all_at(&[flipped], at).unwrap();
        let error = load(&path, &mut all).expect_err(&format!("byte {at} of {}", file.display()));
        assert!(named(&error).is_some_and(|named| named == file), "byte {at} of {}: {error}", file.display());
        if load_with(&path, &mut part, strict).is_ok() {
            assert_eq!(contents(&part, "spread"), bytes_of("spread", SMALL));
            harmless_to_part += 1;
        }
        handle.write_all_at(&byte, at).unwrap();
    }
    load(&path, &mut all).unwrap();
    assert_eq!(contents(&all, "large"), bytes_of("large", LARGE));
    // Blocks of `large` that hold nothing else: two of the first file's three, which is one file of four.
    let share = harmless_to_part as f64 / flips as f64;
    println!(
        "{flips} flips, each found; {harmless_to_part} lay in blocks that a load of one tensor does not read"
    );
    assert!((0.1..=0.25).contains(&share), "{share}");
}

#[test]
fn a_file_cut_at_any_byte_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let mut saved = StateDict::new();
    saved.insert_tensor("w", TensorBuf::new(DType::U8, &[SMALL], bytes_of("w", SMALL)).unwrap());
    save(&path, &saved).unwrap();
    let mut n_cuts = 0;
    for file in files(&path) {
        let whole = fs::read(&file).unwrap();
        for len in (0..whole.len()).rev() {
            OpenOptions::new().write(true).open(&file).unwrap().set_len(len as u64).unwrap();
            let error = load_new(&path).expect_err("a file that was cut");
            let is_named = named(&error).is_some_and(|named| named == file);
            assert!(is_named, "{} cut to {len} bytes: {error}", file.display());
            n_cuts += 1;
        }
        fs::write(&file, whole).unwrap();
    }
    assert!(n_cuts > 4096 + SMALL);
    load_new(&path).unwrap();
}

#[test]
fn damage_that_one_rank_meets_is_the_same_error_on_all_and_nothing_is_overwritten_before_it_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let file = &files(&path)[2];
    let handle = OpenOptions::new().read(true).write(true).open(file).unwrap();
    handle.write_all_at(&[0xff], handle.metadata().unwrap().len() - 1).unwrap();
    for verify in [Verify::AsRead, Verify::BeforeRead] {
        let errors = ranks(3, |group| {
            let rank = group.group_rank().0;
            let mut wanted = state(rank, 3, false);
            let options = LoadOptions { group: Some(&group), verify, ..LoadOptions::default() };
            let error = load_with(&path, &mut wanted, options).unwrap_err();
            for (fqn, tensor) in wanted.flat_tensors().unwrap() {
                let expected = if verify == Verify::BeforeRead { 0 } else { 1 };
                let is_old_or_new =
                    |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0 || expected & byte == 1);
                tensor.read_box(0, &mut |bytes| assert!(is_old_or_new(bytes), "{fqn}")).unwrap();
            }
            error
        });
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        assert!(errors[0].to_string().contains("block 0"), "{}", errors[0]);
        assert!(errors[0].to_string().contains(file.to_str().unwrap()), "{}", errors[0]);
    }
}

/// A file system in memory of a given size, mounted for one test.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf, options: &str) -> Self {
        fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&at).status();
        assert!(mounted.unwrap().success(), "mounting needs root");
        Self(at)
    }

    fn remount(&self, options: &str) {
        let how = format!("remount,{options}");
        let remounted = Command::new("mount").args(["-o", &how]).arg(&self.0).status();
        assert!(remounted.unwrap().success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Held by tests that mount: a process that one starts holds the open files of the other for a moment, and their space.
static MOUNTING: Mutex<()> = Mutex::new(());

const ENOSPC: i32 = 28;
const EROFS: i32 = 30;

fn os_error(error: &Error) -> Option<i32> {
    match error {
        Error::Io { os_error, .. } => *os_error,
        Error::Ranks { failures, .. } => failures.iter().find_map(|failure| os_error(&failure.error)),
        _ => None,
    }
}

#[test]
#[ignore = "needs root: it mounts a file system"]
fn a_full_disk_is_an_error_on_all_ranks_and_the_old_checkpoint_stays() {
    let _alone = MOUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount(dir.path().join("disk"), "size=3m");
    let path = disk.0.join("c");
    let tiny = |value: u8| {
        let mut state = StateDict::new();
        state.insert_tensor("spread", TensorBuf::new(DType::U8, &[SMALL], vec![value; SMALL]).unwrap());
        state
    };
    save(&path, &tiny(9)).unwrap();
    let free = || rustix::fs::statvfs(&disk.0).unwrap().f_bfree;
    let before = free();
    for n_ranks in [1, 2, 3] {
        // Two copies of `large` do not fit, and one does not fit beside what fills the rest.
        fs::write(disk.0.join("filler"), vec![1; BLOCK_BYTES as usize]).unwrap();
        let errors = ranks(n_ranks, |group| {
            let options = SaveOptions { group: Some(&group), overwrite: true, ..SaveOptions::default() };
            save_with(&path, &state(group.group_rank().0, n_ranks, true), options).unwrap_err()
        });
        assert!(
            errors.iter().all(|error| *error == errors[0] && os_error(error) == Some(ENOSPC)),
            "{errors:?}"
        );
        assert_eq!(contents(&load_new(&path).unwrap(), "spread"), [9; SMALL]);
        fs::remove_file(disk.0.join("filler")).unwrap();
        assert_eq!(free(), before, "what was written is removed");
    }
    save_with(&path, &tiny(8), SaveOptions { overwrite: true, ..SaveOptions::default() }).unwrap();
    assert_eq!(contents(&load_new(&path).unwrap(), "spread"), [8; SMALL]);
}

#[test]
#[ignore = "needs root: it mounts a file system"]
fn a_read_only_disk_loads_and_refuses_to_save() {
    let _alone = MOUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount(dir.path().join("disk"), "size=8m");
    let path = checkpoint(&disk.0);
    disk.remount("ro");
    let errors = ranks(2, |group| {
        let options = SaveOptions { group: Some(&group), overwrite: true, ..SaveOptions::default() };
        save_with(&path, &state(group.group_rank().0, 2, true), options).unwrap_err()
    });
    assert!(errors.iter().all(|error| *error == errors[0] && os_error(error) == Some(EROFS)), "{errors:?}");
    assert_eq!(contents(&load_new(&path).unwrap(), "large"), bytes_of("large", LARGE));
    assert!(path.join(MANIFEST_NAME).exists());
}
