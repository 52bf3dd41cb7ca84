//! Saves in the background: what is saved is what the state was, errors come once, layouts are sent once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use common::ranks;
use sconce_checkpoint::{Error, Saver, load_new};
use sconce_dtensor::{
    DType, LocalTensor, Result as TensorResult, StateDict, TensorBox, TensorBuf, Value, run_boxes,
};
use sconce_mesh::ProcessGroup;

const SHAPE: [usize; 2] = [300, 70];

/// This rank's run of a tensor that is all `value`, and the step.
fn state(group: &ProcessGroup, value: u8, step: i64) -> StateDict<'static> {
    let (n, me, numel) = (group.size(), group.rank().0, SHAPE[0] * SHAPE[1]);
    let (start, end) = (me * numel / n, (me + 1) * numel / n);
    let boxes = run_boxes(&SHAPE, start, end - start);
    let tensor = TensorBuf::from_boxes(DType::U8, &SHAPE, boxes, vec![value; end - start]).unwrap();
    let mut state = StateDict::new();
    state.insert("model", StateDict::from_iter([("w", Value::Tensor(Box::new(tensor)))]));
    state.insert("list", vec![Value::Int(step), Value::None]);
    state.insert("step", step);
    state
}

fn overwrite(state: &mut StateDict<'_>, value: u8) {
    for (_, tensor) in state.flat_tensors_mut().unwrap() {
        for index in 0..tensor.local_boxes().len() {
            tensor.write_box(index, &mut |bytes| bytes.fill(value)).unwrap();
        }
    }
}

#[test]
fn what_is_saved_is_what_the_state_was_when_save_returned() {
    let dir = tempfile::tempdir().unwrap();
    ranks(3, |group| {
        let mut saver = Saver::new(Some(&group)).unwrap();
        let mut state = state(&group, 1, 0);
        for step in 1..5u8 {
            overwrite(&mut state, step);
            state.insert("step", i64::from(step));
            saver.save(dir.path().join(step.to_string()), &state, false).unwrap();
            overwrite(&mut state, 99);
            // Training goes on with collectives of its own meanwhile.
            group.barrier().unwrap();
        }
        assert!(saver.wait().unwrap().is_some());
        assert!(saver.wait().unwrap().is_none());
    });
    for step in 1..5u8 {
        let loaded = load_new(dir.path().join(step.to_string())).unwrap();
        assert_eq!(loaded.get("step").and_then(Value::as_int), Some(i64::from(step)));
        let bytes = loaded.map("model").unwrap().tensor::<TensorBuf>("w").unwrap().bytes();
        assert!(bytes.iter().all(|byte| *byte == step), "step {step}");
    }
}

#[test]
fn a_layout_that_changes_on_one_rank_is_planned_anew() {
    let dir = tempfile::tempdir().unwrap();
    ranks(3, |group| {
        let mut saver = Saver::new(Some(&group)).unwrap();
        for step in 0..4i64 {
            let mut state = state(&group, 7, step);
            if step >= 2 && group.rank().0 == 1 {
                state.insert_tensor("extra", TensorBuf::new(DType::U8, &[2], vec![1, step as u8]).unwrap());
            }
            if step == 3 {
                state.insert("note", "a value more on every rank");
            }
            saver.save(dir.path().join(step.to_string()), &state, false).unwrap();
        }
        saver.wait().unwrap();
    });
    for step in 0..4u8 {
        let loaded = load_new(dir.path().join(step.to_string())).unwrap();
        let extra = loaded.tensor::<TensorBuf>("extra").map(|tensor| tensor.bytes().to_vec());
        assert_eq!(extra, (step >= 2).then(|| vec![1, step]));
        assert_eq!(loaded.get("note").is_some(), step == 3);
    }
}

#[test]
fn an_error_comes_once_at_the_next_call_and_the_saver_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    ranks(2, |group| {
        let mut saver = Saver::new(Some(&group)).unwrap();
        let state = state(&group, 1, 1);
        saver.save(&first, &state, false).unwrap();
        saver.save(&first, &state, false).unwrap();
        let error = saver.save(&second, &state, false).unwrap_err();
        assert!(
            matches!(&error, Error::Ranks { failures, .. }
            if matches!(failures[0].error, Error::AlreadyExists { .. })),
            "{error}"
        );
        saver.save(&second, &state, false).unwrap();
        saver.wait().unwrap();
    });
    load_new(&second).unwrap();
}

/// A tensor whose device fails on the second rank.
struct Broken(bool);

impl LocalTensor for Broken {
    fn dtype(&self) -> DType {
        DType::U8
    }
    fn global_shape(&self) -> &[usize] {
        &[4]
    }
    fn local_boxes(&self) -> &[TensorBox] {
        static WHOLE: std::sync::OnceLock<Vec<TensorBox>> = std::sync::OnceLock::new();
        WHOLE.get_or_init(|| vec![TensorBox::whole(&[4])])
    }
    fn read_box(&self, _: usize, read: &mut dyn FnMut(&[u8])) -> TensorResult<()> {
        if self.0 {
            return Err(sconce_dtensor::Error::ReadOnly { what: "a broken device".to_owned() });
        }
        read(&[1, 2, 3, 4]);
        Ok(())
    }
    fn write_box(&mut self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> TensorResult<()> {
        Err(sconce_dtensor::Error::ReadOnly { what: "a broken device".to_owned() })
    }
    fn deep_copy(&self) -> TensorResult<Box<dyn LocalTensor>> {
        Ok(Box::new(Broken(self.0)))
    }
}

#[test]
fn a_rank_that_cannot_stage_fails_the_save_of_every_rank() {
    let dir = tempfile::tempdir().unwrap();
    let errors = ranks(2, |group| {
        let mut saver = Saver::new(Some(&group)).unwrap();
        let mut state = state(&group, 1, 1);
        state.insert_tensor("broken", Broken(group.rank().0 == 1));
        saver.save(dir.path().join("c"), &state, false).unwrap();
        saver.wait().unwrap_err()
    });
    assert_eq!(errors[0], errors[1]);
    assert!(errors[0].to_string().contains("rank 1: broken"), "{}", errors[0]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
