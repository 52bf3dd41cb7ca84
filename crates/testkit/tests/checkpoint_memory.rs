//! What saves and loads take beyond the state itself, counted: at most 64 MiB a rank, whatever the size of the state.

#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::time::Duration;

use sconce_checkpoint::{LoadOptions, SaveOptions, Saver, Verify, load_with, save_with};
use sconce_dtensor::{DType, StateDict, TensorBox, TensorBuf, chunk_range};
use sconce_mesh::ProcessGroup;
use sconce_testkit::{CountingAllocator, live_bytes, peak_bytes, run_ranks};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const RANKS: usize = 2;
const SHAPE: [usize; 2] = [24 << 10, 1024];
const LIMIT_BYTES: usize = 64 << 20;

/// This rank's rows, or columns, of 192 MiB in f32 and 100 small tensors.
fn state(group: &ProcessGroup, dim: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    let chunk = |shape: &[usize]| {
        let mut part = TensorBox::whole(shape);
        let range = chunk_range(shape[dim], group.size(), group.rank().0);
        (part.offsets[dim], part.sizes[dim]) = (range.start, range.len());
        part
    };
    let shapes = [SHAPE.to_vec(), SHAPE.to_vec()].into_iter().chain((0..100).map(|n| vec![10 + n, 33]));
    for (nth, shape) in shapes.enumerate() {
        let part = chunk(&shape);
        let bytes = vec![nth as u8; part.numel() * 4];
        let tensor = TensorBuf::from_boxes(DType::F32, &shape, vec![part], bytes).unwrap();
        state.insert_tensor(format!("t{nth}"), tensor);
    }
    state
}

/// Both ranks are threads of this process: the peak is that of both together.
#[test]
fn saves_and_loads_take_at_most_64_mib_a_rank_beyond_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    run_ranks(RANKS, Duration::from_secs(60), |group| {
        let rows = state(&group, 0);
        let mut columns = state(&group, 1);
        let check = |what: &str, act: &mut dyn FnMut()| {
            group.barrier().unwrap();
            let before = live_bytes();
            let ((), peak) = peak_bytes(&mut *act);
            group.barrier().unwrap();
            let peak = peak.saturating_sub(before);
            assert!(peak <= RANKS * LIMIT_BYTES, "{what}: {peak} bytes");
        };
        let options = SaveOptions { group: Some(&group), overwrite: true, ..SaveOptions::default() };
        check("save", &mut || assert!(save_with(&path, &rows, options).unwrap().data_bytes > 0));
        for verify in [Verify::AsRead, Verify::BeforeRead, Verify::Off] {
            let options = LoadOptions { group: Some(&group), verify, ..LoadOptions::default() };
            check("load", &mut || drop(load_with(&path, &mut columns, options).unwrap()));
        }
        // Staged by a copy, a save takes one copy of the state; the next one takes nothing more.
        let mut saver = Saver::new(Some(&group)).unwrap();
        saver.save(dir.path().join("first"), &rows, false).unwrap();
        saver.wait().unwrap();
        check("save in the background", &mut || {
            saver.save(dir.path().join("second"), &rows, false).unwrap();
            saver.wait().unwrap();
        });
    });
}
