//! Stores in memory and in a directory: any layout in, any layout out, and the same objects as a directory of format 1.

use std::sync::Arc;

use sconce_checkpoint::object::object_store::ObjectStore;
use sconce_checkpoint::object::object_store::local::LocalFileSystem;
use sconce_checkpoint::object::object_store::memory::InMemory;
use sconce_checkpoint::object::{Options, Prefix, Reader, Writer};
use sconce_checkpoint::{Error, SaveOptions, Saver, StorageReader, load_new, save_with, verify, verify_from};
use sconce_dtensor::{TensorBox, TensorBuf};

use crate::common::{part, ranks};
use crate::saved::{SHAPE, columns, held, load_on, loaded_step, options, place, rows, save_on};

/// What every store must do.
#[track_caller]
pub(crate) fn check(place: &Prefix) {
    for saved in save_on(3, 7, |_| Writer::new(place.clone(), false)) {
        let report = saved.unwrap();
        assert_eq!(report.n_files, 3);
        assert!(report.data_bytes > 4 * (SHAPE[0] * SHAPE[1]) as u64);
    }
    for (n, boxes) in [(2, rows as fn(usize, usize) -> Vec<TensorBox>), (3, rows), (4, columns), (1, columns)]
    {
        load_on(n, 7, boxes, |_| Reader::new(place.clone())).into_iter().for_each(|got| drop(got.unwrap()));
    }
    let again = save_on(2, 8, |_| Writer::new(place.clone(), false)).remove(0).unwrap_err();
    assert!(again.to_string().contains("exists already"), "{again}");
    save_on(2, 9, |_| Writer::new(place.clone(), true)).into_iter().for_each(|saved| {
        saved.unwrap();
    });
    assert_eq!(loaded_step(place), 9);
    let report = verify_from(&Reader::new(place.clone())).unwrap();
    assert_eq!((report.n_files, report.damage), (2, vec![]));
    assert_eq!(Writer::new(place.clone(), true).sweep().unwrap(), 0, "the replaced objects are gone");
    let nothing = Reader::new(place.child("nothing").unwrap()).read_metadata();
    assert!(matches!(nothing, Err(Error::Missing { .. })), "{nothing:?}");
}

#[test]
fn a_store_in_memory_keeps_checkpoints() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    for (prefix, part_bytes) in [("runs/a/step-1", 5 << 20), ("", 1 << 20), ("x", 64 << 20)] {
        check(&place(&store, prefix, Options { part_bytes, ..options() }));
    }
}

#[test]
fn a_store_in_a_directory_holds_checkpoints_that_are_directories_of_format_1() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(dir.path()).unwrap());
    check(&place(&store, "runs/a", options()));
    let path = dir.path().join("runs/a");
    assert_eq!(verify(&path).unwrap().damage, []);
    let loaded = load_new(&path).unwrap();
    assert!(loaded.tensor::<TensorBuf>("t").unwrap() == &part(&SHAPE, &[TensorBox::whole(&SHAPE)], true));
    // The other way: a directory that is read as a store, under a URL.
    let saved = dir.path().join("saved");
    ranks(2, |group| {
        let options = SaveOptions { group: Some(&group), ..SaveOptions::default() };
        save_with(&saved, &held(&rows(2, group.rank().0), 5, true), options).unwrap();
    });
    let url = format!("file://{}", saved.display());
    assert_eq!(loaded_step(&Prefix::parse(&url, &[], options()).unwrap()), 5);
}

#[test]
fn a_saver_in_the_background_saves_to_a_store() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let place = place(&store, "runs/a", options());
    let mut saver = Saver::new(None).unwrap();
    for step in [3, 4] {
        let state = held(&[TensorBox::whole(&SHAPE)], step, true);
        saver.save_to(Box::new(Writer::new(place.clone(), true)), "runs/a", &state).unwrap();
    }
    saver.wait().unwrap();
    assert_eq!(loaded_step(&place), 4);
}

#[test]
fn names_that_no_object_can_have_and_urls_of_nothing_are_errors() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    assert!(matches!(Prefix::new(store, "a//b", options()), Err(Error::ObjectStore { .. })));
    for url in ["no url", "gopher://bucket/x"] {
        let error = Prefix::parse(url, &[], options()).unwrap_err();
        assert!(
            matches!(&error, Error::ObjectStore { object, .. } if object.to_str() == Some(url)),
            "{error}"
        );
    }
}
