//! A series of checkpoints: resuming, retention, preemption, and processes that use one directory at the same time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::ranks;
use sconce_checkpoint::{
    Access, Best, Error, FileSystemReader, LoadOptions, MANIFEST_NAME, Order, Preemption, Retention,
    SaveOptions, Series, SeriesOptions, StorageReader, load_from, load_new, read_metadata, save, save_with,
};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value};

/// A state whose every value is `step`, with a rank's half of a tensor.
fn state(step: i64, rank: usize, n_ranks: usize) -> StateDict<'static> {
    let held = TensorBox { offsets: vec![rank * 12 / n_ranks], sizes: vec![12 / n_ranks] };
    let bytes = vec![step as u8; held.numel()];
    let mut state = StateDict::new();
    state.insert_tensor("w", TensorBuf::from_boxes(DType::U8, &[12], vec![held], bytes).unwrap());
    state.insert("loss", (step as f64 - 30.0).abs());
    state.insert("step", step);
    state
}

fn step_of(state: &StateDict<'_>) -> i64 {
    let step = state.get("step").and_then(Value::as_int).unwrap();
    let bytes = state.tensor::<TensorBuf>("w").unwrap().bytes();
    assert!(bytes.iter().all(|byte| i64::from(*byte) == step), "a mix of {step} and {bytes:?}");
    step
}

/// A series of one process with the checkpoints of `steps`.
fn series_of(dir: &Path, steps: &[u64], keep: Retention) -> Series<'static> {
    let series = Series::open(dir, SeriesOptions { keep, ..SeriesOptions::default() }).unwrap();
    for step in steps {
        series.save(*step, &state(*step as i64, 0, 1)).unwrap();
    }
    series
}

fn flip_a_bit(checkpoint: &Path) {
    let file = checkpoint.join(&read_metadata(checkpoint).unwrap().files[0].name);
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 4;
    fs::write(&file, bytes).unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn training_goes_on_from_the_newest_whole_checkpoint_and_is_told_of_damaged_ones() {
    let dir = tempfile::tempdir().unwrap();
    let series = series_of(dir.path(), &[10, 20, 30, 40], Retention::default());
    flip_a_bit(&series.path_of(40));
    fs::remove_file(series.path_of(30).join(MANIFEST_NAME)).unwrap();
    let mut resumed = state(0, 0, 1);
    let from = series.resume(&mut resumed).unwrap().unwrap();
    assert_eq!((from.step, step_of(&resumed)), (20, 20));
    assert_eq!(from.skipped.iter().map(|s| s.step).collect::<Vec<_>>(), [40, 30]);
    assert!(matches!(&from.skipped[0].error, Error::Corrupt { what, .. } if what == "block 0"));
    assert!(matches!(&from.skipped[1].error, Error::NotACheckpoint { .. }));
    assert_eq!(series.latest_valid().unwrap().unwrap(), from);
    assert_eq!(series.latest().unwrap(), Some(40));
    // The same step again replaces the damaged checkpoint.
    series.save(40, &state(40, 0, 1)).unwrap();
    assert_eq!(series.latest_valid().unwrap().unwrap().step, 40);
}

#[test]
fn all_ranks_resume_from_the_same_checkpoint_though_one_alone_sees_the_damage() {
    let dir = tempfile::tempdir().unwrap();
    let outcomes = ranks(3, |group| {
        let (rank, n) = (group.group_rank().0, group.size());
        let options = SeriesOptions { group: Some(&group), ..SeriesOptions::default() };
        let series = Series::open(dir.path(), options).unwrap();
        for step in [10, 20] {
            series.save(step, &state(step as i64, rank, n)).unwrap();
        }
        if rank == 2 {
            // Only what the last rank loads: its bytes are the end of the last file.
            let file = series.path_of(20).join("shard-00003-model-00001-of-00001.safetensors");
            fs::remove_file(file).unwrap();
        }
        group.barrier().unwrap();
        let mut resumed = state(0, rank, n);
        let from = series.resume(&mut resumed).unwrap().unwrap();
        (from, step_of(&resumed))
    });
    for (from, step) in &outcomes {
        assert_eq!((from.step, *step), (10, 10));
        assert_eq!(from, &outcomes[0].0);
        let Error::Ranks { failures, .. } = &from.skipped[0].error else { panic!("{from:?}") };
        assert_eq!(failures.iter().map(|f| f.rank).collect::<Vec<_>>(), [2]);
    }
}

#[test]
fn an_empty_series_begins_and_one_with_only_damage_or_another_model_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let series = series_of(&dir.path().join("new/run"), &[], Retention::default());
    let mut resumed = state(1, 0, 1);
    assert_eq!(series.resume(&mut resumed).unwrap(), None);
    series.save(10, &state(10, 0, 1)).unwrap();
    let mut other = StateDict::new();
    other.insert("epoch", 1i64);
    assert!(matches!(series.resume(&mut other), Err(Error::KeyMismatch { .. })));
    flip_a_bit(&series.path_of(10));
    let error = series.resume(&mut resumed).unwrap_err();
    assert!(matches!(&error, Error::NoValidCheckpoint { skipped, .. } if skipped.len() == 1), "{error}");
    assert!(error.to_string().contains("step 10: "), "{error}");
    assert_eq!(step_of(&resumed), 1);
}

#[test]
fn what_the_rules_do_not_keep_is_removed_at_the_next_save() {
    let dir = tempfile::tempdir().unwrap();
    let best = Best { n: 1, value: "loss".into(), order: Order::Lowest };
    let keep = Retention { last: Some(2), every: Some(50), best: Some(best) };
    let series = series_of(dir.path(), &[10, 20, 30, 40, 50, 60, 70], keep);
    assert_eq!(series.steps().unwrap(), [30, 50, 60, 70]);
    let report = series.save(80, &state(80, 0, 1)).unwrap();
    assert_eq!((report.removed, report.in_use), (vec![60], vec![]));
    assert_eq!(names(dir.path()), ["step-000030", "step-000050", "step-000070", "step-000080"]);
}

#[test]
fn a_checkpoint_is_not_removed_under_its_reader() {
    let dir = tempfile::tempdir().unwrap();
    let series = series_of(dir.path(), &[1], Retention { last: Some(1), ..Retention::default() });
    let reader = File::open(series.path_of(1).join(MANIFEST_NAME)).unwrap();
    reader.lock_shared().unwrap();
    let report = series.save(2, &state(2, 0, 1)).unwrap();
    assert_eq!((report.removed, report.in_use), (vec![], vec![1]));
    assert_eq!(step_of(&load_new(series.path_of(1)).unwrap()), 1);
    drop(reader);
    assert_eq!(series.save(3, &state(3, 0, 1)).unwrap().removed, [1, 2]);
}

#[test]
fn a_replaced_checkpoint_stays_readable_to_whoever_reads_it_and_goes_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let overwrite = SaveOptions { overwrite: true, ..SaveOptions::default() };
    save(&path, &state(1, 0, 1)).unwrap();
    let reader = FileSystemReader::new(&path, Access::positional());
    reader.read_metadata().unwrap();
    save_with(&path, &state(2, 0, 1), overwrite).unwrap();
    assert_eq!(names(dir.path()), ["c", "c.old-0"]);
    assert_eq!(step_of(&load_new(&path).unwrap()), 2);
    let mut loaded = state(0, 0, 1);
    load_from(&reader, &mut loaded, LoadOptions::default()).unwrap();
    assert_eq!(step_of(&loaded), 1);
    drop(reader);
    save_with(&path, &state(3, 0, 1), overwrite).unwrap();
    assert_eq!(names(dir.path()), ["c"]);
}

#[test]
fn what_a_dead_writer_left_goes_and_what_a_live_one_writes_stays() {
    let dir = tempfile::tempdir().unwrap();
    for (name, file) in [
        ("step-000001.tmp", Some(MANIFEST_NAME)),
        ("step-000002.tmp", None),
        ("step-000003.old-0", Some("shard-00001-model-00001-of-00001.safetensors")),
        ("step-000004.tmp", Some(MANIFEST_NAME)),
        ("step-000005.tmp", Some("notes.txt")),
        ("other.tmp", Some(MANIFEST_NAME)),
    ] {
        fs::create_dir(dir.path().join(name)).unwrap();
        if let Some(file) = file {
            fs::write(dir.path().join(name).join(file), "").unwrap();
        }
    }
    let writer = File::open(dir.path().join("step-000004.tmp").join(MANIFEST_NAME)).unwrap();
    writer.lock().unwrap();
    let series = series_of(dir.path(), &[], Retention::default());
    assert_eq!(names(dir.path()), ["other.tmp", "step-000004.tmp", "step-000005.tmp"]);
    let busy = series.save(4, &state(4, 0, 1)).unwrap_err();
    assert_eq!(busy, Error::Busy { path: series.path_of(4) });
    drop(writer);
    series.save(4, &state(4, 0, 1)).unwrap();
    let foreign = series.save(5, &state(5, 0, 1)).unwrap_err();
    assert!(matches!(foreign, Error::AlreadyExists { is_checkpoint: false, .. }), "{foreign}");
    assert!(dir.path().join("step-000005.tmp/notes.txt").exists());
}

#[test]
fn one_ranks_notice_makes_all_ranks_save_at_the_same_step() {
    let dir = tempfile::tempdir().unwrap();
    let saved = ranks(3, |group| {
        let (rank, n) = (group.group_rank().0, group.size());
        let flag = Arc::new(AtomicBool::new(false));
        let preemption = Preemption::from_flag(Arc::clone(&flag));
        let options = SeriesOptions { group: Some(&group), ..SeriesOptions::default() };
        let series = Series::open(dir.path(), options).unwrap();
        for step in 1.. {
            flag.store(rank == 1 && step == 4, Ordering::Relaxed);
            if preemption.is_agreed(Some(&group)).unwrap() {
                series.save(step, &state(step as i64, rank, n)).unwrap();
                return step;
            }
        }
        unreachable!("the loop ends by preemption")
    });
    assert_eq!(saved, [4, 4, 4]);
    assert_eq!(step_of(&load_new(dir.path().join("step-000004")).unwrap()), 4);
}

#[cfg(feature = "preemption")]
#[test]
fn sigterm_is_noticed_and_does_not_end_the_process() {
    let preemption = Preemption::on_sigterm().unwrap();
    assert!(!preemption.is_agreed(None).unwrap());
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
    let asked_within = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !preemption.is_asked() && std::time::Instant::now() < asked_within {
        std::thread::yield_now();
    }
    assert!(preemption.is_agreed(None).unwrap());
}
