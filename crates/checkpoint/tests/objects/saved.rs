//! What the tests of object stores save and load, under several layouts.

use std::sync::Arc;
use std::time::Duration;

use sconce_checkpoint::object::object_store::ObjectStore;
use sconce_checkpoint::object::{Options, Prefix, Reader, Writer};
use sconce_checkpoint::{
    DefaultSavePlanner, Error, LoadOptions, LoadReport, SaveReport, load_from, load_new_from, save_to,
};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value};
use sconce_mesh::ProcessGroup;

use crate::common::{part, ranks, state};

/// 24 MiB of i32, so that three ranks have two parts each.
pub(crate) const SHAPE: [usize; 2] = [3 * 2048 + 5, 1024];

pub(crate) fn options() -> Options {
    // Parts of 5 MiB are the least that S3 takes.
    Options { part_bytes: 5 << 20, timeout: Duration::from_secs(60), ..Options::default() }
}

pub(crate) fn place(store: &Arc<dyn ObjectStore>, prefix: &str, options: Options) -> Prefix {
    Prefix::new(Arc::clone(store), prefix, options).unwrap()
}

/// The rows of rank `nth` of `n`.
pub(crate) fn rows(n: usize, nth: usize) -> Vec<TensorBox> {
    let (start, end) = (nth * SHAPE[0] / n, (nth + 1) * SHAPE[0] / n);
    vec![TensorBox { offsets: vec![start, 0], sizes: vec![end - start, SHAPE[1]] }]
}

/// The columns of rank `nth` of `n`.
pub(crate) fn columns(n: usize, nth: usize) -> Vec<TensorBox> {
    let (start, end) = (nth * SHAPE[1] / n, (nth + 1) * SHAPE[1] / n);
    vec![TensorBox { offsets: vec![0, start], sizes: vec![SHAPE[0], end - start] }]
}

/// The state of a rank: its part of a tensor, a small one, a step.
pub(crate) fn held(boxes: &[TensorBox], step: i64, filled: bool) -> StateDict<'static> {
    let mut held = state(&SHAPE, boxes, filled);
    let small = if filled { vec![step as u8; 3] } else { vec![0; 3] };
    held.insert_tensor("small", TensorBuf::new(DType::U8, &[3], small).unwrap());
    held.insert("step", if filled { step } else { 0 });
    held
}

/// Saves on `n` ranks; what each got.
pub(crate) fn save_on(
    n: usize,
    step: i64,
    writer: impl Fn(&ProcessGroup) -> Writer + Sync,
) -> Vec<Result<SaveReport, Error>> {
    ranks(n, |group| {
        let mine = held(&rows(n, group.rank().0), step, true);
        save_to(&mut writer(&group), &mut DefaultSavePlanner, &mine, Some(&group))
    })
}

/// Loads on `n` ranks into zeros and compares what came; what each got.
pub(crate) fn load_on(
    n: usize,
    step: i64,
    boxes: fn(usize, usize) -> Vec<TensorBox>,
    reader: impl Fn(&ProcessGroup) -> Reader + Sync,
) -> Vec<Result<LoadReport, Error>> {
    ranks(n, |group| {
        let mine = boxes(n, group.rank().0);
        let mut loaded = held(&mine, step, false);
        let options = LoadOptions { group: Some(&group), ..LoadOptions::default() };
        let report = load_from(&reader(&group), &mut loaded, options)?;
        assert!(loaded.tensor::<TensorBuf>("t").unwrap() == &part(&SHAPE, &mine, true));
        assert_eq!(loaded.tensor::<TensorBuf>("small").unwrap().bytes(), [step as u8; 3]);
        assert_eq!(loaded.get("step").and_then(Value::as_int), Some(step));
        Ok(report)
    })
}

/// The step of the checkpoint at a place, all of which is compared.
#[track_caller]
pub(crate) fn loaded_step(place: &Prefix) -> i64 {
    let loaded = load_new_from(&Reader::new(place.clone()), LoadOptions::default()).unwrap();
    let whole = [TensorBox::whole(&SHAPE)];
    assert!(loaded.tensor::<TensorBuf>("t").unwrap() == &part(&SHAPE, &whole, true));
    let step = loaded.get("step").and_then(Value::as_int).unwrap();
    assert_eq!(loaded.tensor::<TensorBuf>("small").unwrap().bytes(), [step as u8; 3]);
    step
}
