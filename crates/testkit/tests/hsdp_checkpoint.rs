//! PyTorch's test_hsdp_checkpoint.py, ported in meaning: save under HSDP, train on, load, and get the same bits back,
//! as HSDP and as FSDP.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{
    CPU, Kind, Sharded, adam, bytes, contents, dtensor, fsdp_mesh, hsdp_mesh, input, load, model_state, save,
};
use sconce_checkpoint::{Error, LoadOptions, Verify, load_with};
use sconce_dtensor::{Placement, StateDict};
use sconce_fsdp::ShardingStrategy::{FullShard, HybridShard};
use sconce_mesh::ProcessGroup;
use sconce_testkit::{Place, RankContext, gpu_ranks, rank_tests, run_procs, run_procs_for_exits};

/// One whose initial weights leave no rank a shard behind dead ReLUs: those would rightly not change in a step.
const SEED: u64 = 4;

/// What the damaged variants do instead of an honest save and load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Twist {
    None,
    LoadLeftOut,
}

fn hsdp_checkpoint(world: &ProcessGroup, place: &Place, dir: &Path, kind: Kind, twist: Twist) {
    let checkpoint = dir.join("checkpoint");
    let mesh = hsdp_mesh(world, place);
    let sharded = Sharded::at(place, kind, &mesh, HybridShard, SEED);
    let mut optim = adam(&sharded);
    let mut saved = model_state(sharded.sharded_state()).deep_copy().unwrap();
    save(world, &checkpoint, &saved).unwrap();

    sharded.step(&mut optim, &input(world)).unwrap();
    compare(&saved, &sharded.sharded_state(), |fqn, v1, v2| {
        assert!(v1 != v2 || v1.is_empty(), "{fqn} did not change");
    });

    if twist != Twist::LoadLeftOut {
        load(world, &checkpoint, &mut saved).unwrap();
        sharded.fsdp.load_state_dict(saved.map("model").unwrap()).unwrap();
    }
    compare(&saved, &sharded.sharded_state(), |fqn, v1, v2| assert_eq!(v1, v2, "{fqn} after the load"));
}

/// Same names, mesh and placements; `check` gets the bytes of both local shards.
fn compare(saved: &StateDict<'_>, now: &StateDict<'_>, check: impl Fn(&str, &[u8], &[u8])) {
    let saved = saved.map("model").unwrap();
    assert_eq!(saved.keys().collect::<Vec<_>>(), now.keys().collect::<Vec<_>>());
    for fqn in saved.keys() {
        let (v1, v2) = (dtensor(saved, fqn), dtensor(now, fqn));
        assert_eq!(v1.device_mesh(), v2.device_mesh());
        assert_eq!(v1.placements(), v2.placements());
        check(fqn, &bytes(v1), &bytes(v2));
    }
}

fn hsdp_fsdp_checkpoint_conversion(world: &ProcessGroup, place: &Place, dir: &Path, kind: Kind) {
    let checkpoint = dir.join("checkpoint");
    let hsdp = Sharded::at(place, kind, &hsdp_mesh(world, place), HybridShard, SEED);
    let hsdp_state = model_state(hsdp.sharded_state());
    save(world, &checkpoint, &hsdp_state).unwrap();

    let fsdp = Sharded::at(place, kind, &fsdp_mesh(world, place), FullShard, SEED + 1);
    let mut fsdp_state = model_state(fsdp.sharded_state());
    compare_converted(&hsdp_state, &fsdp.sharded_state(), |fqn, v1, v2| assert_ne!(v1, v2, "{fqn}"));

    load(world, &checkpoint, &mut fsdp_state).unwrap();
    fsdp.fsdp.load_state_dict(fsdp_state.map("model").unwrap()).unwrap();
    compare_converted(&hsdp_state, &fsdp.sharded_state(), |fqn, v1, v2| assert_eq!(v1, v2, "{fqn}"));
}

/// Same names, other mesh and placements; `check` gets the bytes of both whole tensors.
fn compare_converted(hsdp: &StateDict<'_>, fsdp: &StateDict<'_>, check: impl Fn(&str, &[u8], &[u8])) {
    let hsdp = hsdp.map("model").unwrap();
    assert_eq!(hsdp.keys().collect::<Vec<_>>(), fsdp.keys().collect::<Vec<_>>());
    for fqn in hsdp.keys() {
        let (v1, v2) = (dtensor(hsdp, fqn), dtensor(fsdp, fqn));
        assert_ne!(v1.device_mesh(), v2.device_mesh());
        assert_ne!(v1.placements(), v2.placements());
        let v1 = v1.redistribute(&[Placement::Replicate, Placement::Replicate]).unwrap();
        let v2 = v2.redistribute(&[Placement::Replicate]).unwrap();
        check(fqn, &bytes(&v1), &bytes(&v2));
    }
}

const DEADLINE: Duration = Duration::from_secs(60);

rank_tests! {
    ranks: 4, deadline: DEADLINE;
    mod hsdp_checkpoint {
        even => |rank| super::hsdp_checkpoint(&rank.world, &CPU, &rank.dir, Kind::Even, Twist::None);
        uneven => |rank| super::hsdp_checkpoint(&rank.world, &CPU, &rank.dir, Kind::Uneven, Twist::None);
    }
    mod hsdp_fsdp_checkpoint_conversion {
        even => |rank| super::hsdp_fsdp_checkpoint_conversion(&rank.world, &CPU, &rank.dir, Kind::Even);
        uneven => |rank| super::hsdp_fsdp_checkpoint_conversion(&rank.world, &CPU, &rank.dir, Kind::Uneven);
    }
}

/// The same bodies with CUDA tensors; `cargo xtask gpu-test` says on how many ranks, and what carries the tensors.
mod on_cuda {
    use super::*;

    const CUDA_DEADLINE: Duration = Duration::from_secs(300);

    fn place(rank: &RankContext) -> Place {
        Place::cuda(&rank.world)
    }

    rank_tests! {
        ranks: gpu_ranks(), deadline: CUDA_DEADLINE;
        mod hsdp_checkpoint {
            #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
            even => |rank| {
                crate::hsdp_checkpoint(&rank.world, &place(&rank), &rank.dir, Kind::Even, Twist::None);
            };
            #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
            uneven => |rank| {
                crate::hsdp_checkpoint(&rank.world, &place(&rank), &rank.dir, Kind::Uneven, Twist::None);
            };
        }
        mod hsdp_fsdp_checkpoint_conversion {
            #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
            even => |rank| {
                crate::hsdp_fsdp_checkpoint_conversion(&rank.world, &place(&rank), &rank.dir, Kind::Even);
            };
            #[ignore = "needs a CUDA device: cargo xtask gpu-test"]
            uneven => |rank| {
                crate::hsdp_fsdp_checkpoint_conversion(&rank.world, &place(&rank), &rank.dir, Kind::Uneven);
            };
        }
    }
}

/// The cases above would fail if loading did nothing: this one does nothing, and must fail.
#[test]
fn without_the_load_the_case_fails() {
    let test = "without_the_load_the_case_fails";
    let exits = run_procs_for_exits(test, 4, DEADLINE, |rank| {
        hsdp_checkpoint(&rank.world, &CPU, &rank.dir, Kind::Even, Twist::LoadLeftOut);
    });
    let Some(exits) = exits else { return };
    let blamed = exits.iter().filter(|exit| exit.last_lines.contains("after the load")).count();
    assert!(blamed > 0, "{}", exits[0].last_lines);
    assert!(exits.iter().all(|exit| !exit.status.success()));
}

/// One byte of one shard file changed: every rank names the file and the block, and no rank's state changes.
#[test]
fn a_changed_byte_fails_the_load_by_file_and_block() {
    run_procs("a_changed_byte_fails_the_load_by_file_and_block", 4, DEADLINE, |rank| {
        let (world, checkpoint) = (&rank.world, rank.dir.join("checkpoint"));
        let sharded = Sharded::new(Kind::Uneven, &hsdp_mesh(world, &CPU), HybridShard, SEED);
        let mut state = model_state(sharded.sharded_state());
        save(world, &checkpoint, &state).unwrap();
        let file = checkpoint.join("shard-00002-model-00001-of-00001.safetensors");
        if world.rank().0 == 0 {
            let mut bytes = std::fs::read(&file).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            std::fs::write(&file, bytes).unwrap();
        }
        world.barrier().unwrap();
        let before = contents(&state);
        let options =
            LoadOptions { group: Some(world), verify: Verify::BeforeRead, ..LoadOptions::default() };
        let error = load_with(&checkpoint, &mut state, options).unwrap_err();
        let Error::Ranks { step, failures } = &error else { panic!("{error}") };
        assert_eq!(step, "verify");
        for failure in failures {
            match &failure.error {
                Error::Corrupt { path, what, .. } => assert_eq!((path, what.as_str()), (&file, "block 0")),
                other => panic!("{other}"),
            }
        }
        assert_eq!(contents(&state), before);
        let mut all = world.all_gather_object(error.to_string().as_bytes()).unwrap();
        all.dedup();
        assert_eq!(all.len(), 1, "the same error on every rank");
    });
}
