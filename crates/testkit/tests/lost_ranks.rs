//! A rank is killed while all train, and while all save: the others name it within two seconds, and the last committed
//! checkpoint loads.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use common::{CPU, Kind, Sharded, adam, contents, hsdp_mesh, input, model_state, save, zero};
use sconce_checkpoint::{SaveOptions, load, save_with};
use sconce_dtensor::{DType, LocalTensor, StateDict, TensorBox, Value};
use sconce_fsdp::ShardingStrategy::HybridShard;
use sconce_mesh::{Error, Rank, RankExit};
use sconce_testkit::{RankContext, run_procs_for_exits};

const DEADLINE: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(2);
/// It shares a group with ranks 1 and 2, and none but the world with rank 0.
const VICTIM: Rank = Rank(3);
const SIGKILL: i32 = 9;

fn die() -> ! {
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
    unreachable!("SIGKILL cannot be survived")
}

/// A commit that all ranks finish; what it holds.
fn commit(rank: &RankContext, sharded: &Sharded) -> Vec<(String, Vec<u8>)> {
    let state = model_state(sharded.sharded_state());
    save(&rank.world, &rank.dir.join("checkpoint"), &state).unwrap();
    contents(&state)
}

/// The moment of the kill is when the victim wrote its mark; the error must name it soon after.
fn check_survivor(dir: &Path, error: &Error) {
    let killed = std::fs::metadata(dir.join("killed")).unwrap().modified().unwrap();
    assert!(matches!(error, Error::PeerLost { rank, .. } if *rank == VICTIM), "{error}");
    assert!(killed.elapsed().unwrap() < LIMIT, "{:?} after the kill", killed.elapsed());
}

/// In the process that judges: the victim died of the signal, all others ended well, by themselves.
fn check_exits(exits: &[RankExit]) {
    for exit in exits {
        match exit.rank == VICTIM {
            true => assert_eq!(exit.status.signal(), Some(SIGKILL), "{}", exit.last_lines),
            false => {
                assert!(exit.by_itself && exit.status.success(), "rank {}: {}", exit.rank, exit.last_lines)
            }
        }
    }
}

#[test]
fn a_rank_killed_in_training_is_named_by_all_others_and_the_last_commit_loads() {
    let test = "a_rank_killed_in_training_is_named_by_all_others_and_the_last_commit_loads";
    let exits = run_procs_for_exits(test, 4, DEADLINE, |rank| {
        let sharded = Sharded::new(Kind::Uneven, &hsdp_mesh(&rank.world, &CPU), HybridShard, 4);
        let mut optim = adam(&sharded);
        let expected = commit(&rank, &sharded);
        let mut state = model_state(sharded.sharded_state());
        let error = (0..).find_map(|step| {
            if step == 20 && rank.world.rank() == VICTIM {
                std::fs::write(rank.dir.join("killed"), "").unwrap();
                die();
            }
            sharded.step(&mut optim, &input(&rank.world)).err()
        });
        match error {
            Some(sconce_fsdp::Error::Mesh(error)) => check_survivor(&rank.dir, &error),
            other => panic!("{other:?}"),
        }
        zero(&mut state);
        load(rank.dir.join("checkpoint"), &mut state).unwrap();
        assert_eq!(contents(&state), expected);
    });
    if let Some(exits) = exits {
        check_exits(&exits);
    }
}

/// A tensor that kills its rank when it is saved: after the others have begun to write.
struct Deadly(Vec<TensorBox>);

impl LocalTensor for Deadly {
    fn dtype(&self) -> DType {
        DType::U8
    }
    fn global_shape(&self) -> &[usize] {
        &[1]
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.0
    }
    fn read_box(&self, _: usize, read: &mut dyn FnMut(&[u8])) -> sconce_dtensor::Result<()> {
        if let Ok(dir) = std::env::var("SCONCE_TESTKIT_DIR") {
            std::fs::write(Path::new(&dir).join("killed"), "").unwrap();
            die();
        }
        read(&[0]);
        Ok(())
    }
    fn write_box(&mut self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        Ok(())
    }
    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        Ok(Box::new(Deadly(self.0.clone())))
    }
}

#[test]
fn a_rank_killed_in_saving_is_named_by_all_others_and_the_last_commit_loads() {
    let test = "a_rank_killed_in_saving_is_named_by_all_others_and_the_last_commit_loads";
    let exits = run_procs_for_exits(test, 4, DEADLINE, |rank| {
        let sharded = Sharded::new(Kind::Uneven, &hsdp_mesh(&rank.world, &CPU), HybridShard, 4);
        let expected = commit(&rank, &sharded);
        let mut state = model_state(sharded.sharded_state());
        let held = if rank.world.rank() == VICTIM { vec![TensorBox::whole(&[1])] } else { vec![] };
        state.insert_tensor("deadly", Deadly(held));
        let path = rank.dir.join("checkpoint");
        let options = SaveOptions { group: Some(&rank.world), overwrite: true, ..SaveOptions::default() };
        match save_with(&path, &state, options).unwrap_err() {
            sconce_checkpoint::Error::Mesh(error) => check_survivor(&rank.dir, &error),
            other => panic!("{other}"),
        }
        // The rank's own part of the committed checkpoint, without the broken world.
        let mut again = StateDict::from_iter([("model", Value::Map(StateDict::new()))]);
        again.insert("model", state.deep_copy().unwrap().remove("model").unwrap());
        zero(&mut again);
        load(&path, &mut again).unwrap();
        assert_eq!(contents(&again), expected);
    });
    if let Some(exits) = exits {
        check_exits(&exits);
    }
}
