//! Whatever fails, the checkpoint before stays loadable, all ranks say the same, and the object is named.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sconce_checkpoint::object::object_store::memory::InMemory;
use sconce_checkpoint::object::object_store::path::Path;
use sconce_checkpoint::object::object_store::{GetOptions, ObjectStore, PutOptions};
use sconce_checkpoint::object::{Options, Prefix, Reader, Writer};
use sconce_checkpoint::{
    DefaultSavePlanner, Error, LoadOptions, ObjectFailure, StorageReader, Verify, load_from, save_to,
};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf};

use crate::common::part;
use crate::faulty::{Fault, Faulty, Plan};
use crate::saved::{SHAPE, columns, held, load_on, loaded_step, options, place, rows, save_on};

const ALWAYS: usize = usize::MAX;

fn small_parts() -> Options {
    Options { part_bytes: 1 << 20, retries: 2, timeout: Duration::from_secs(20), in_flight: 3 }
}

/// A store with a checkpoint of step 1 at a place.
fn prepared() -> (Arc<Faulty>, Prefix) {
    let faulty = Arc::new(Faulty::default());
    let store: Arc<dyn ObjectStore> = faulty.clone();
    let place = place(&store, "runs/a", small_parts());
    for saved in save_on(3, 1, |_| Writer::new(place.clone(), true)) {
        saved.unwrap();
    }
    (faulty, place)
}

/// The objects of a store, by name.
fn names(store: &dyn ObjectStore) -> Vec<String> {
    let prefix = Path::from("runs/a");
    let listed = store.list_with_delimiter(Some(&prefix));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let listed = runtime.block_on(listed).unwrap();
    listed.objects.iter().map(|object| object.location.filename().unwrap().to_owned()).collect()
}

/// The object of the `Ranks` that every rank got.
#[track_caller]
fn same_error<T: std::fmt::Debug>(outcomes: Vec<Result<T, Error>>) -> Error {
    let errors: Vec<Error> = outcomes.into_iter().map(Result::unwrap_err).collect();
    assert!(errors.windows(2).all(|pair| pair[0] == pair[1]), "{errors:?}");
    errors.into_iter().next().unwrap()
}

#[track_caller]
fn first_failure(error: &Error) -> (usize, &Error) {
    let cause = if let Error::PartlyLoaded { cause, .. } = error { cause } else { error };
    let Error::Ranks { failures, .. } = cause else { panic!("{error}") };
    (failures[0].rank, &failures[0].error)
}

#[test]
fn a_save_that_fails_at_any_step_leaves_the_checkpoint_before_and_nothing_else() {
    let cases = [
        (Fault::Put, "manifest.sconce"),
        (Fault::Part, "shard-00001"),
        (Fault::Part, "shard-00003"),
        (Fault::Complete, "shard-00002"),
    ];
    for (fault, object) in cases {
        let (faulty, place) = prepared();
        let before = names(&*faulty);
        faulty.set(Some(Plan { fault, object, times: ALWAYS }));
        let error = same_error(save_on(3, 2, |_| Writer::new(place.clone(), true)));
        let (_, failure) = first_failure(&error);
        let is_named = matches!(failure, Error::ObjectStore { object: found, failure: ObjectFailure::Broken, .. }
            if found.to_string_lossy().contains(object));
        assert!(is_named && error.to_string().contains("broke"), "{fault:?}: {error}");
        faulty.set(None);
        assert_eq!(names(&*faulty), before, "{fault:?}");
        assert_eq!(loaded_step(&place), 1, "{fault:?}");
        // And the next one succeeds.
        save_on(3, 3, |_| Writer::new(place.clone(), true)).into_iter().for_each(|saved| {
            saved.unwrap();
        });
        assert_eq!(loaded_step(&place), 3, "{fault:?}");
        assert_eq!(names(&*faulty).len(), before.len(), "the replaced one's objects are gone");
    }
}

#[test]
fn what_breaks_once_is_tried_again() {
    for (fault, object) in [
        (Fault::Put, "manifest.sconce"),
        (Fault::PutAnswer, "manifest.sconce"),
        (Fault::Part, "shard-00002"),
        (Fault::Complete, "shard-00001"),
    ] {
        let (faulty, place) = prepared();
        faulty.set(Some(Plan { fault, object, times: 1 }));
        save_on(3, 2, |_| Writer::new(place.clone(), true)).into_iter().for_each(|saved| {
            saved.unwrap();
        });
        assert_eq!(loaded_step(&place), 2, "{fault:?}");
    }
    for fault in [Fault::GetBroken, Fault::GetShort] {
        let (faulty, place) = prepared();
        faulty.set(Some(Plan { fault, object: "shard-00002", times: 2 }));
        load_on(2, 1, columns, |_| Reader::new(place.clone())).into_iter().for_each(|got| drop(got.unwrap()));
    }
}

#[test]
fn a_get_that_is_cut_again_and_again_is_the_same_error_on_all_ranks() {
    let cases = [
        (Fault::GetBroken, ObjectFailure::Broken, "the connection broke"),
        (Fault::GetShort, ObjectFailure::Broken, "came"),
        (Fault::GetDenied, ObjectFailure::Denied, "not yours"),
    ];
    for (fault, expected, words) in cases {
        let (faulty, place) = prepared();
        faulty.set(Some(Plan { fault, object: "shard-00003", times: ALWAYS }));
        let error = same_error(load_on(3, 1, rows, |_| Reader::new(place.clone())));
        let (rank, failure) = first_failure(&error);
        let Error::ObjectStore { object, failure, .. } = failure else { panic!("{error}") };
        assert_eq!((rank, *failure), (2, expected), "{error}");
        assert!(object.to_string_lossy().contains("runs/a/shard-00003"), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        faulty.set(None);
        assert_eq!(loaded_step(&place), 1);
    }
}

#[test]
fn a_store_that_does_not_answer_is_an_error_in_time() {
    let (faulty, _) = prepared();
    let store: Arc<dyn ObjectStore> = faulty.clone();
    let place = place(&store, "runs/a", Options { timeout: Duration::from_millis(300), ..small_parts() });
    for object in ["manifest.sconce", "shard-00001"] {
        faulty.set(Some(Plan { fault: Fault::GetSilent, object, times: ALWAYS }));
        let started = Instant::now();
        let mut loaded = held(&[TensorBox::whole(&SHAPE)], 1, false);
        let error = load_from(&Reader::new(place.clone()), &mut loaded, LoadOptions::default()).unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        let cause = if let Error::PartlyLoaded { cause, .. } = &error { cause } else { &error };
        let Error::ObjectStore { object: found, failure, .. } = cause else { panic!("{error}") };
        assert_eq!(*failure, ObjectFailure::Timeout);
        assert!(found.to_string_lossy().contains(object), "{error}");
    }
}

/// Replaces an object by what `change` makes of it.
fn change(store: &dyn ObjectStore, object: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let at = Path::from(format!("runs/a/{object}"));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut bytes =
            store.get_opts(&at, GetOptions::default()).await.unwrap().bytes().await.unwrap().to_vec();
        change(&mut bytes);
        store.put_opts(&at, bytes.into(), PutOptions::default()).await.unwrap();
    });
}

#[test]
fn damaged_objects_are_named_with_their_block_and_nothing_was_loaded() {
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Change); 4] = [
        ("CRC32", |bytes| bytes[(2 << 20) + 7] ^= 1),
        ("expected", |bytes| bytes.truncate(3 << 20)),
        ("expected", |bytes| bytes.truncate(1000)),
        ("expected", |bytes| bytes.push(0)),
    ];
    for (nth, (words, damage)) in cases.into_iter().enumerate() {
        let (faulty, place) = prepared();
        let file = Reader::new(place.clone()).read_metadata().unwrap().files[1].name.clone();
        change(&*faulty, &file, damage);
        let mut loaded = held(&[TensorBox::whole(&SHAPE)], 1, false);
        let options = LoadOptions { verify: Verify::BeforeRead, ..LoadOptions::default() };
        let error = load_from(&Reader::new(place), &mut loaded, options).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(words) && text.contains(&file), "case {nth}: {text}");
        match &error {
            Error::Corrupt { what, offset_bytes, .. } => {
                assert_eq!((what.as_str(), *offset_bytes), ("block 2", 2 << 20));
            }
            Error::Length { expected, got, .. } => assert_ne!(expected, got),
            _ => panic!("case {nth}: {error}"),
        }
        assert!(
            loaded.tensor::<TensorBuf>("t").unwrap() == &part(&SHAPE, &[TensorBox::whole(&SHAPE)], false)
        );
    }
}

#[test]
fn a_checkpoint_is_replaced_only_where_that_is_asked_for_and_one_saver_wins() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let place = place(&store, "runs/a", options());
    let state = |step: i64| StateDict::from_iter([("step", step)]);
    let save =
        |step| save_to(&mut Writer::new(place.clone(), false), &mut DefaultSavePlanner, &state(step), None);
    save(1).unwrap();
    assert!(matches!(save(2), Err(Error::AlreadyExists { is_checkpoint: true, .. })));

    // Both looked before either had put its manifest: one of them is told.
    let empty = place.child("race").unwrap();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let savers = (0..8).map(|step| {
            let empty = empty.clone();
            scope.spawn(move || {
                save_to(&mut Writer::new(empty, false), &mut DefaultSavePlanner, &state(step), None)
            })
        });
        savers.collect::<Vec<_>>().into_iter().map(|saver| saver.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{outcomes:?}");
}

#[test]
fn what_a_killed_save_left_is_swept_and_the_checkpoint_is_not() {
    let (faulty, place) = prepared();
    let before = names(&*faulty);
    let stale = Path::from("runs/a/shard-00001-model-00001-of-00001.00ff.safetensors");
    let foreign = Path::from("runs/a/notes.txt");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for at in [&stale, &foreign] {
        runtime.block_on(faulty.put_opts(at, vec![1].into(), PutOptions::default())).unwrap();
    }
    assert_eq!(Writer::new(place.clone(), true).sweep().unwrap(), 1);
    let mut after = names(&*faulty);
    after.retain(|name| name != "notes.txt");
    assert_eq!(after, before);
    assert_eq!(loaded_step(&place), 1);
}

#[test]
fn a_load_gets_each_wanted_block_once_in_few_requests() {
    let (faulty, place) = prepared();
    let total: u64 =
        Reader::new(place.clone()).read_metadata().unwrap().files.iter().map(|f| f.len_bytes).sum();
    let counted = |load: &dyn Fn()| {
        faulty.gets.store(0, Ordering::Relaxed);
        faulty.got_bytes.store(0, Ordering::Relaxed);
        load();
        (faulty.gets.load(Ordering::Relaxed), faulty.got_bytes.load(Ordering::Relaxed) as f64 / total as f64)
    };
    let options = Options { part_bytes: 4 << 20, ..small_parts() };
    let store: Arc<dyn ObjectStore> = faulty.clone();
    let large = self::place(&store, "runs/a", options);
    let (gets, times) = counted(&|| assert_eq!(loaded_step(&large), 1));
    // The manifest, read twice; three files of a little over 8 MiB; a block in which two tensors lie may come twice.
    assert!(gets <= 2 + 3 * 3 + 3, "{gets}");
    assert!(times < 1.05, "{times}");
    // Of one row only its block.
    let (gets, times) = counted(&|| {
        let row = [TensorBox { offsets: vec![0, 0], sizes: vec![1, SHAPE[1]] }];
        let mut one = StateDict::new();
        one.insert_tensor("t", part(&SHAPE, &row, false));
        let loose = LoadOptions { strict: false, ..LoadOptions::default() };
        load_from(&Reader::new(large.clone()), &mut one, loose).unwrap();
        assert!(one.tensor::<TensorBuf>("t").unwrap() == &part(&SHAPE, &row, true));
    });
    assert_eq!(gets, 2);
    assert!(times < 0.1, "{times}");
}

/// Callers may be in a runtime of their own.
#[test]
fn saves_and_loads_work_inside_of_a_runtime() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let place = place(&store, "runs/a", options());
        let mut state = StateDict::new();
        state.insert_tensor("w", TensorBuf::new(DType::U8, &[2], vec![1, 2]).unwrap());
        save_to(&mut Writer::new(place.clone(), false), &mut DefaultSavePlanner, &state, None).unwrap();
        let metadata = Reader::new(place).read_metadata().unwrap();
        assert_eq!(metadata.tensors[0].fqn, "w");
    });
}
