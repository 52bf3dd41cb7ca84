//! Ranks save together, other ranks load: any layout into any other, and one rank's failure on all.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use common::{part, ranks, state, whole};
use proptest::prelude::*;
use sconce_checkpoint::{
    Error, LoadOptions, SaveOptions, Verify, load_new, load_with, read_metadata, save_with,
};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, Value, chunk_range, run_boxes};

/// Who holds which boxes of a tensor.
#[derive(Debug, Clone)]
enum Layout {
    /// Contiguous runs cut at these fractions of 64, as flat parameters have.
    Runs(Vec<usize>),
    /// Chunks along a dim.
    Chunks { dim: usize, n: usize },
    /// Every rank all of it.
    Replicas(usize),
    /// Pairs of ranks hold the same chunk along dim 0, as hybrid sharding has.
    Hybrid { shards: usize },
}

impl Layout {
    fn boxes(&self, shape: &[usize]) -> Vec<Vec<TensorBox>> {
        let numel: usize = shape.iter().product();
        match self {
            Layout::Runs(cuts) => {
                let mut at: Vec<usize> = cuts.iter().map(|c| c * numel / 64).collect();
                at.sort_unstable();
                let ends = at.iter().copied().chain([numel]);
                let starts = [0].into_iter().chain(at.iter().copied());
                starts.zip(ends).map(|(start, end)| run_boxes(shape, start, end - start)).collect()
            }
            Layout::Chunks { dim, n } => {
                (0..*n).map(|nth| vec![chunk(shape, dim % shape.len(), *n, nth)]).collect()
            }
            Layout::Replicas(n) => vec![vec![TensorBox::whole(shape)]; *n],
            Layout::Hybrid { shards } => {
                (0..2 * shards).map(|r| vec![chunk(shape, 0, *shards, r % shards)]).collect()
            }
        }
    }
}

fn chunk(shape: &[usize], dim: usize, n: usize, nth: usize) -> TensorBox {
    let range = chunk_range(shape[dim], n, nth);
    let mut part = TensorBox::whole(shape);
    (part.offsets[dim], part.sizes[dim]) = (range.start, range.len());
    part
}

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![
        prop::collection::vec(0usize..=64, 0..4).prop_map(Layout::Runs),
        (0usize..3, 1usize..5).prop_map(|(dim, n)| Layout::Chunks { dim, n }),
        (1usize..4).prop_map(Layout::Replicas),
        (1usize..3).prop_map(|shards| Layout::Hybrid { shards }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn any_layout_loads_as_any_other_bit_for_bit(
        shape in prop::collection::vec(0usize..8, 1..4),
        from in layouts(),
        to in layouts(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let (held, wanted) = (from.boxes(&shape), to.boxes(&shape));
        ranks(held.len(), |group| {
            let options = SaveOptions { group: Some(&group), sync: false, ..SaveOptions::default() };
            save_with(&path, &state(&shape, &held[group.rank().0], true), options).unwrap();
        });
        ranks(wanted.len(), |group| {
            let mine = &wanted[group.rank().0];
            let mut loaded = state(&shape, mine, false);
            load_with(&path, &mut loaded, LoadOptions { group: Some(&group), ..LoadOptions::default() }).unwrap();
            assert_eq!(loaded.tensor::<TensorBuf>("t").unwrap(), &part(&shape, mine, true));
        });
        let alone = load_new(&path).unwrap();
        let bytes: Vec<u8> = whole(&shape).iter().flat_map(|v| v.to_le_bytes()).collect();
        prop_assert_eq!(alone.tensor::<TensorBuf>("t").unwrap().bytes(), bytes);
    }
}

#[test]
fn replicas_are_written_once_and_by_all_in_turn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    ranks(2, |group| {
        let mut state = StateDict::new();
        for name in ["a", "b", "c", "d"] {
            state.insert_tensor(name, TensorBuf::new(DType::U8, &[100_000], vec![7; 100_000]).unwrap());
        }
        save_with(&path, &state, SaveOptions { group: Some(&group), ..SaveOptions::default() }).unwrap();
    });
    let files = read_metadata(&path).unwrap().files;
    assert_eq!(files.iter().map(|f| f.len_bytes).collect::<Vec<_>>(), [204_096, 204_096]);
}

#[test]
fn a_part_that_nobody_holds_and_values_that_differ_are_the_same_error_on_every_rank() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let save_all = |make: &(dyn Fn(usize) -> StateDict<'static> + Sync)| {
        let errors = ranks(3, |group| {
            let options = SaveOptions { group: Some(&group), ..SaveOptions::default() };
            save_with(&path, &make(group.rank().0), options).unwrap_err()
        });
        assert!(errors.iter().all(|error| error == &errors[0]), "{errors:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
        errors[0].to_string()
    };
    let shape = [6, 2];
    let hole = save_all(&|rank| state(&shape, &[chunk(&shape, 0, 4, rank.max(1))], true));
    assert_eq!(hole, "plan failed on rank 0: t: nobody holds box [0, 0]+[2, 2] of shape [6, 2]");
    let overlap = save_all(&|rank| {
        let mut part = chunk(&shape, 0, 3, rank);
        part.sizes[0] += usize::from(rank == 0);
        state(&shape, &[part], true)
    });
    assert_eq!(overlap, "plan failed on rank 0: t: boxes [0, 0]+[3, 2] and [2, 0]+[2, 2] overlap");
    let shapes = save_all(&|rank| state(&[6 + rank / 2, 2], &[TensorBox::whole(&[6 + rank / 2, 2])], true));
    assert_eq!(shapes, "plan failed on rank 0: t: expected shape [6, 2], got [7, 2]");
    let values = save_all(&|rank| StateDict::from_iter([("step", Value::Int(rank as i64 / 2))]));
    assert!(values.contains("step: expected Int(0) as on an earlier rank, got Int(1)"), "{values}");
}

#[test]
fn what_one_rank_cannot_load_no_rank_loads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    let shape = [9, 4];
    ranks(3, |group| {
        let options = SaveOptions { group: Some(&group), ..SaveOptions::default() };
        save_with(&path, &state(&shape, &[chunk(&shape, 0, 3, group.rank().0)], true), options).unwrap();
    });
    // Only rank 2 reads the third file.
    let file = path.join(&read_metadata(&path).unwrap().files[2].name);
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let errors = |verify| {
        let errors = ranks(3, |group| {
            let mine = [chunk(&shape, 0, 3, group.rank().0)];
            let mut loaded = state(&shape, &mine, false);
            let options = LoadOptions { group: Some(&group), verify, ..LoadOptions::default() };
            let error = load_with(&path, &mut loaded, options).unwrap_err();
            let is_untouched = loaded.tensor::<TensorBuf>("t").unwrap() == &part(&shape, &mine, false);
            assert!(is_untouched || (verify == Verify::AsRead && group.rank().0 < 2));
            error
        });
        assert!(errors.iter().all(|error| error == &errors[0]), "{errors:?}");
        errors.into_iter().next().unwrap()
    };
    let check_cause = |error: Error, at: &str| {
        let Error::Ranks { step, failures } = error else { panic!("{error}") };
        assert_eq!((step.as_str(), failures.len(), failures[0].rank), (at, 1, 2));
        assert!(matches!(&failures[0].error, Error::Corrupt { path, .. } if *path == file));
    };
    check_cause(errors(Verify::BeforeRead), "verify");
    // The other two ranks have copied what they verified; every rank says so.
    let Error::PartlyLoaded { overwritten, cause } = errors(Verify::AsRead) else { panic!("not partly") };
    assert_eq!(overwritten, ["t"]);
    check_cause(*cause, "read");
}
