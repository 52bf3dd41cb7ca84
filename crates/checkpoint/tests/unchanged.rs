//! Saves that link what did not change: how much is written, and that every checkpoint is whole by itself.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use common::ranks;
use proptest::prelude::*;
use sconce_checkpoint::{FileSystemWriter, read_metadata};
use sconce_checkpoint::{
    Retention, SaveOptions, SaveReport, Saver, Series, SeriesOptions, load, load_new, save_with, verify,
};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value};

const FROZEN: usize = 3 << 20;
const TRAINED: usize = 1 << 20;

fn bytes(n: usize, seed: u8) -> Vec<u8> {
    (0..n).map(|i| (i >> 4) as u8 ^ (i as u8).wrapping_mul(29) ^ seed).collect()
}

/// A rank's rows of a frozen tensor, of one that is another at every step, and of a small one.
fn state(step: u8, rank: usize, n_ranks: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    for (name, n, seed) in [("frozen", FROZEN, 0), ("trained", TRAINED, step), ("bias", 600, 0)] {
        let (start, end) = (rank * n / n_ranks, (rank + 1) * n / n_ranks);
        let held = TensorBox { offsets: vec![start], sizes: vec![end - start] };
        let mine = bytes(n, seed)[start..end].to_vec();
        state.insert_tensor(name, TensorBuf::from_boxes(DType::U8, &[n], vec![held], mine).unwrap());
    }
    state.insert("step", i64::from(step));
    state
}

#[track_caller]
fn check(checkpoint: &Path, step: u8) {
    assert_eq!(verify(checkpoint).unwrap().damage, []);
    let loaded = load_new(checkpoint).unwrap();
    let of = |name| loaded.tensor::<TensorBuf>(name).unwrap().bytes();
    assert!(of("frozen") == bytes(FROZEN, 0), "frozen of {step}");
    assert!(of("trained") == bytes(TRAINED, step), "trained of {step}");
    assert_eq!(of("bias"), bytes(600, 0));
    assert_eq!(loaded.get("step").and_then(Value::as_int), Some(i64::from(step)));
}

/// The data files of a checkpoint by inode, with their lengths.
fn inodes(checkpoint: &Path) -> BTreeMap<u64, u64> {
    let names = read_metadata(checkpoint).unwrap().files.into_iter().map(|file| file.name);
    let found = names.map(|name| fs::metadata(checkpoint.join(name)).unwrap());
    found.map(|found| (found.ino(), found.len())).collect()
}

/// Bytes of data files that `checkpoint` shares with `earlier`.
fn shared_bytes(checkpoint: &Path, earlier: &Path) -> u64 {
    let earlier = inodes(earlier);
    inodes(checkpoint).iter().filter(|(ino, _)| earlier.contains_key(ino)).map(|(_, len)| len).sum()
}

fn series(dir: &Path, keep: Retention) -> Series<'static> {
    Series::open(dir, SeriesOptions { keep, link_unchanged: true, ..SeriesOptions::default() }).unwrap()
}

fn flip_a_bit(file: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn what_is_frozen_is_written_twice_and_linked_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let series = series(dir.path(), Retention::default());
    let save = |step: u8| series.save(step.into(), &state(step, 0, 1)).unwrap().saved;
    assert_eq!(save(1).linked_bytes, 0);
    // What stays the same is told from the rest now, and kept apart.
    let SaveReport { n_files, linked_bytes, .. } = save(2);
    assert_eq!((n_files, linked_bytes), (2, 0));
    for step in [3, 4, 5] {
        let SaveReport { data_bytes, n_files, linked_bytes } = save(step);
        assert_eq!(n_files, 2);
        let written = data_bytes - linked_bytes;
        assert!(written < TRAINED as u64 + 10_000, "{written} bytes written");
        assert!(linked_bytes > FROZEN as u64, "{linked_bytes} bytes linked");
        let (now, before) = (series.path_of(step.into()), series.path_of(u64::from(step) - 1));
        assert_eq!(shared_bytes(&now, &before), linked_bytes);
        check(&now, step);
    }
    // Files stay what safetensors' own reader reads.
    for file in read_metadata(series.path_of(5)).unwrap().files {
        let read = fs::read(series.path_of(5).join(file.name)).unwrap();
        safetensors::SafeTensors::deserialize(&read).unwrap();
    }
}

#[test]
fn a_state_that_is_the_same_as_before_is_all_linked() {
    let dir = tempfile::tempdir().unwrap();
    let series = series(dir.path(), Retention::default());
    series.save(1, &state(7, 0, 1)).unwrap();
    for step in [2, 3] {
        let saved = series.save(step, &state(7, 0, 1)).unwrap().saved;
        assert_eq!(saved.linked_bytes, saved.data_bytes);
        check(&series.path_of(step), 7);
    }
}

#[test]
fn checkpoints_outlive_those_that_they_share_files_with() {
    let dir = tempfile::tempdir().unwrap();
    let series = series(dir.path(), Retention { last: Some(1), ..Retention::default() });
    for step in 1..=4 {
        let report = series.save(step.into(), &state(step, 0, 1)).unwrap();
        assert!(report.in_use.is_empty());
        assert_eq!(report.saved.linked_bytes > 0, step > 2);
        assert_eq!(series.steps().unwrap(), [u64::from(step)]);
        check(&series.path_of(step.into()), step);
    }
    let found = inodes(&series.path_of(4));
    assert_eq!(found.len(), 2);
    for file in read_metadata(series.path_of(4)).unwrap().files {
        assert_eq!(fs::metadata(series.path_of(4).join(file.name)).unwrap().nlink(), 1);
    }
}

#[test]
fn a_damaged_file_is_never_linked() {
    for (at, cut) in [(4096 + FROZEN as u64 - 5, false), (10, false), (0, true)] {
        let dir = tempfile::tempdir().unwrap();
        let series = series(dir.path(), Retention::default());
        for step in 1..=3 {
            series.save(step.into(), &state(step, 0, 1)).unwrap();
        }
        let third = series.path_of(3);
        let files = read_metadata(&third).unwrap().files;
        let frozen = third.join(&files.iter().max_by_key(|file| file.len_bytes).unwrap().name);
        if cut {
            OpenOptions::new().write(true).open(&frozen).unwrap().set_len(FROZEN as u64).unwrap();
        } else {
            flip_a_bit(&frozen, at);
        }
        // The copy that is damaged is that of two checkpoints.
        assert_eq!(verify(series.path_of(2)).unwrap().damage.len(), 1);
        let saved = series.save(4, &state(4, 0, 1)).unwrap().saved;
        assert_eq!(saved.linked_bytes, 0, "byte {at}");
        check(&series.path_of(4), 4);
        // And later ones link again what stays the same.
        series.save(5, &state(5, 0, 1)).unwrap();
        assert!(series.save(6, &state(6, 0, 1)).unwrap().saved.linked_bytes > FROZEN as u64);
        check(&series.path_of(6), 6);
    }
}

#[test]
fn every_rank_links_its_own_files_and_writes_all_after_a_change_of_layout() {
    let dir = tempfile::tempdir().unwrap();
    let save = |step: u8, n: usize| {
        let reports = ranks(n, |group| {
            let options = SeriesOptions { group: Some(&group), link_unchanged: true, ..Default::default() };
            let series = Series::open(dir.path(), options).unwrap();
            series.save(step.into(), &state(step, group.rank().0, n)).unwrap().saved
        });
        assert!(reports.iter().all(|report| *report == reports[0]));
        check(&dir.path().join(format!("step-{step:06}")), step);
        reports[0]
    };
    assert_eq!([save(1, 3).linked_bytes, save(2, 3).linked_bytes], [0, 0]);
    let third = save(3, 3);
    assert!(third.linked_bytes > FROZEN as u64 && third.n_files == 6, "{third:?}");
    assert_eq!(save(4, 2).linked_bytes, 0, "other boxes");
    assert_eq!(save(5, 2).linked_bytes, 0);
    assert!(save(6, 2).linked_bytes > FROZEN as u64);
}

#[test]
fn what_cannot_be_linked_is_written() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let target = |nth: usize| dir.path().join(nth.to_string());
    let save = |nth: usize, since: &Path| {
        let options = SaveOptions { since: Some(since), ..SaveOptions::default() };
        let saved = save_with(target(nth), &state(1, 0, 1), options).unwrap();
        check(&target(nth), 1);
        saved.linked_bytes
    };
    assert_eq!(save(0, &dir.path().join("nothing")), 0);
    assert!(save(1, &target(0)) > 0);
    fs::write(target(0).join("manifest.sconce"), "damaged").unwrap();
    assert_eq!(save(2, &target(0)), 0);
    // Memory is another file system than the disk of the build.
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let elsewhere = memory.path().join("c");
    save_with(&elsewhere, &state(1, 0, 1), SaveOptions::default()).unwrap();
    assert_ne!(fs::metadata(&elsewhere).unwrap().dev(), fs::metadata(dir.path()).unwrap().dev());
    assert_eq!(save(3, &elsewhere), 0);
}

#[test]
fn a_saver_in_the_background_links_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = |step: u8| -> PathBuf { dir.path().join(step.to_string()) };
    let mut saver = Saver::new(None).unwrap();
    let mut reports = Vec::new();
    for step in 1..=3 {
        let writer = FileSystemWriter::new(path(step), false, true).since(path(step - 1));
        saver.save_to(Box::new(writer), path(step), &state(step, 0, 1)).unwrap();
        reports.push(saver.wait().unwrap().unwrap());
        check(&path(step), step);
    }
    assert!(reports[2].linked_bytes > FROZEN as u64, "{reports:?}");
}

/// Tensors of 80 KiB each, the value of each.
fn tensors(values: &[u8]) -> StateDict<'static> {
    let tensor = |value: &u8| TensorBuf::new(DType::U8, &[80 << 10], vec![*value; 80 << 10]).unwrap();
    let mut state = StateDict::new();
    values.iter().enumerate().for_each(|(nth, value)| {
        state.insert_tensor(format!("t{nth}"), tensor(value));
    });
    state
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever changes when, each checkpoint is what was saved, and never more is written than without links.
    #[test]
    fn any_history_of_changes_leaves_checkpoints_that_are_whole(
        history in prop::collection::vec(prop::collection::vec(prop::bool::weighted(0.3), 5), 1..7),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let series = series(dir.path(), Retention { last: Some(2), ..Retention::default() });
        let mut values = [1u8; 5];
        for (step, changes) in history.iter().enumerate() {
            values.iter_mut().zip(changes).for_each(|(value, is_changed)| *value += u8::from(*is_changed));
            let saved = series.save(step as u64, &tensors(&values)).unwrap().saved;
            prop_assert!(saved.linked_bytes <= saved.data_bytes);
            let mut loaded = tensors(&[0; 5]);
            load(series.path_of(step as u64), &mut loaded).unwrap();
            for (nth, value) in values.iter().enumerate() {
                let name = format!("t{nth}");
                prop_assert!(loaded.tensor::<TensorBuf>(&name).unwrap().bytes().iter().all(|byte| byte == value));
            }
            prop_assert_eq!(verify(series.path_of(step as u64)).unwrap().damage, vec![]);
        }
    }
}
