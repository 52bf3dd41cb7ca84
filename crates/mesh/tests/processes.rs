//! The local backend with ranks as processes: right answers, and right errors when processes die or stop.

#![allow(clippy::panic, reason = "test code: clippy knows it only inside `#[test]` functions")]

mod support;

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use sconce_mesh::{DeviceMesh, DeviceType, Error, GroupRank, ProcessGroup, Rank, ReduceOp};
use support::{RankProcess, procs};

const ALL: [usize; 4] = [0, 1, 2, 3];
const LONG: Duration = Duration::from_secs(60);

/// Repeats a collective until it fails. Tells the test once a few have succeeded.
fn until_error(process: &RankProcess, mut call: impl FnMut() -> sconce_mesh::Result<()>) -> Error {
    for step in 0.. {
        if let Err(error) = call() {
            return error;
        }
        if step == 3 {
            process.signal(&format!("running/{}", process.rank));
        }
    }
    unreachable!("the loop ends with an error")
}

fn lost_rank(error: &Error) -> Rank {
    match error {
        Error::PeerLost { rank, .. } => *rank,
        other => panic!("{other}"),
    }
}

fn all_reduce(group: &ProcessGroup, buffer: &mut [f32]) -> sconce_mesh::Result<()> {
    group.all_reduce(buffer, ReduceOp::Max)
}

#[test]
fn collectives_between_processes_are_right() {
    let ranks = procs("collectives_between_processes_are_right", &ALL, |process| {
        let world = process.join(4, LONG).unwrap();
        let me = world.rank().0;
        for len in [0, 1, 1000, 2_000_003] {
            let mut sum: Vec<i64> = (0..len).map(|i| (i * (me + 1)) as i64).collect();
            world.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert!(sum.iter().enumerate().all(|(i, v)| *v == 10 * i as i64), "all_reduce of {len}");

            let mut all = vec![0u32; 4 * len];
            world.all_gather_into(&vec![me as u32; len], &mut all).unwrap();
            assert!(all.iter().enumerate().all(|(i, v)| *v as usize == i / len), "all_gather of {len}");

            let mut part = vec![0f32; len];
            world.reduce_scatter(&vec![1f32; 4 * len], &mut part, ReduceOp::Sum).unwrap();
            assert!(part.iter().all(|v| *v == 4.0), "reduce_scatter of {len}");
        }
        let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &[2, 2], &["replicate", "shard"]).unwrap();
        let row = mesh.group_by_name("shard").unwrap().all_gather_object(&[me as u8]).unwrap();
        assert_eq!(row, [[me as u8 / 2 * 2], [me as u8 / 2 * 2 + 1]]);
        let column = mesh.group(0).unwrap().broadcast_object(Some(&[me as u8]), GroupRank(1)).unwrap();
        assert_eq!(column, [me as u8 % 2 + 2]);
    });
    if let Some(mut ranks) = ranks {
        ranks.assert_success(&ALL);
    }
}

#[test]
fn two_worlds_of_one_store_do_not_meet() {
    let ranks = procs("two_worlds_of_one_store_do_not_meet", &[0, 1], |process| {
        let first = process.join(2, LONG).unwrap();
        let second = process.join(2, LONG).unwrap();
        first.barrier().unwrap();
        drop(first);
        second.barrier().unwrap();
    });
    if let Some(mut ranks) = ranks {
        ranks.assert_success(&[0, 1]);
    }
}

#[test]
fn survivors_of_a_killed_rank_name_it_within_a_second() {
    let ranks = procs("survivors_of_a_killed_rank_name_it_within_a_second", &ALL, |process| {
        let world = process.join(4, LONG).unwrap();
        let mut buffer = vec![1f32; 4 << 20];
        let error = until_error(&process, || all_reduce(&world, &mut buffer));
        assert_eq!(lost_rank(&error), Rank(2));
        assert_eq!(world.barrier(), Err(error));
    });
    let Some(mut ranks) = ranks else { return };
    ranks.await_signal("running/2");
    let killed = Instant::now();
    ranks.kill(2);
    ranks.assert_success(&[0, 1, 3]);
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
}

#[test]
fn a_group_without_the_killed_rank_learns_of_it_too() {
    let ranks = procs("a_group_without_the_killed_rank_learns_of_it_too", &ALL, |process| {
        let world = process.join(4, LONG).unwrap();
        let rows = [vec![Rank(0), Rank(1)], vec![Rank(2), Rank(3)]];
        let row = world.subgroups(&rows).unwrap().unwrap();
        let error = until_error(&process, || row.barrier());
        assert_eq!(lost_rank(&error), Rank(3));
        assert_eq!(lost_rank(&world.barrier().unwrap_err()), Rank(3));
    });
    let Some(mut ranks) = ranks else { return };
    ranks.await_signal("running/0");
    ranks.await_signal("running/3");
    let killed = Instant::now();
    ranks.kill(3);
    ranks.assert_success(&[0, 1, 2]);
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
}

#[test]
fn a_dead_rank_that_nobody_waits_for_is_noticed_too() {
    let ranks = procs("a_dead_rank_that_nobody_waits_for_is_noticed_too", &[0, 1, 2], |process| {
        let world = process.join(3, LONG).unwrap();
        let Some(pair) = world.subgroups(&[vec![Rank(0), Rank(1)]]).unwrap() else {
            process.signal("alone");
            loop {
                std::thread::park();
            }
        };
        let error = until_error(&process, || pair.barrier());
        assert_eq!(lost_rank(&error), Rank(2));
    });
    let Some(mut ranks) = ranks else { return };
    for key in ["alone", "running/0", "running/1"] {
        ranks.await_signal(key);
    }
    let killed = Instant::now();
    ranks.kill(2);
    ranks.assert_success(&[0, 1]);
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
}

#[test]
fn a_process_that_exits_without_leaving_is_lost() {
    let ranks = procs("a_process_that_exits_without_leaving_is_lost", &[0, 1], |process| {
        let world = process.join(2, LONG).unwrap();
        if world.rank() == Rank(1) {
            std::process::exit(0);
        }
        assert_eq!(lost_rank(&world.barrier().unwrap_err()), Rank(1));
    });
    if let Some(mut ranks) = ranks {
        ranks.assert_success(&[0, 1]);
    }
}

#[test]
fn a_stopped_rank_is_a_timeout_that_names_it_on_every_rank() {
    let ranks = procs("a_stopped_rank_is_a_timeout_that_names_it_on_every_rank", &ALL, |process| {
        let world = process.join(4, Duration::from_secs(2)).unwrap();
        let mut buffer = vec![1f32; 1 << 20];
        let error = until_error(&process, || all_reduce(&world, &mut buffer));
        let Error::Timeout { arrived, missing, .. } = &error else { panic!("{error}") };
        assert_eq!((&arrived[..], &missing[..]), (&[Rank(0), Rank(2), Rank(3)][..], &[Rank(1)][..]));
        let dump = process.store.dir().join(format!("rank-{}-world.txt", process.rank));
        let dump = std::fs::read_to_string(dump).unwrap();
        assert!(dump.starts_with(&format!("{error}\n\ngroup world of ranks [0, 1, 2, 3]")), "{dump}");
        assert!(dump.trim_end().ends_with("all_reduce(max, f32, 4194304 bytes)"), "{dump}");
        assert!(dump.contains("  completed  ") && dump.contains("  failed     "), "{dump}");
        // A world that is still held is not left: the ranks that end first must not be what the others report.
        process.signal(&format!("failed/{}", process.rank));
        for rank in ALL {
            sconce_mesh::Store::get(&*process.store, &format!("failed/{rank}"), LONG).unwrap();
        }
    });
    let Some(mut ranks) = ranks else { return };
    ranks.await_signal("running/1");
    kill_process(ranks.pid(1), Signal::STOP).unwrap();
    for rank in [0, 2, 3] {
        ranks.await_signal(&format!("failed/{rank}"));
    }
    kill_process(ranks.pid(1), Signal::CONT).unwrap();
    ranks.assert_success(&ALL);
}

#[test]
fn a_rank_started_twice_is_refused_by_name() {
    let ranks = procs("a_rank_started_twice_is_refused_by_name", &[0, 1, 1], |process| {
        match process.join(2, LONG) {
            Ok(world) => world.barrier().unwrap(),
            Err(error) => {
                assert!(matches!(error, Error::InvalidArgument { op: "joining the world", .. }), "{error}");
                let text = error.to_string();
                assert!(
                    text.starts_with("joining the world: rank 1: expected each rank to be started once"),
                    "{text}"
                );
                process.signal("refused");
            }
        }
        // A process that has ended is no second one.
        sconce_mesh::Store::get(&*process.store, "refused", LONG).unwrap();
    });
    if let Some(mut ranks) = ranks {
        ranks.assert_success(&[0, 1, 2]);
    }
}

#[test]
fn joining_names_the_ranks_that_did_not_come() {
    let name = "joining_names_the_ranks_that_did_not_come";
    let ranks = procs(name, &[0, 1, 3], |process| {
        let error = process.join(4, Duration::from_millis(700)).unwrap_err();
        let Error::Timeout { missing, arrived, .. } = &error else { panic!("{error}") };
        assert_eq!((arrived.len(), &missing[..]), (3, &[Rank(2)][..]));
    });
    if let Some(mut ranks) = ranks {
        ranks.assert_success(&[0, 1, 2]);
    }
}

#[test]
fn joining_without_the_leader_names_the_leader() {
    let ranks = procs("joining_without_the_leader_names_the_leader", &[1, 2], |process| {
        let error = process.join(3, Duration::from_millis(700)).unwrap_err();
        let Error::Timeout { missing, .. } = &error else { panic!("{error}") };
        assert_eq!(missing, &[Rank(0)]);
    });
    if let Some(mut ranks) = ranks {
        ranks.assert_success(&[0, 1]);
    }
}

#[test]
fn killing_every_rank_leaves_nothing_in_shared_memory() {
    let ranks = procs("killing_every_rank_leaves_nothing_in_shared_memory", &ALL, |process| {
        let world = process.join(4, LONG).unwrap();
        let mut buffer = vec![1f32; 4 << 20];
        until_error(&process, || all_reduce(&world, &mut buffer));
    });
    let Some(mut ranks) = ranks else { return };
    for rank in ALL {
        ranks.await_signal(&format!("running/{rank}"));
    }
    let open = |pid: rustix::process::Pid| {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_pid())).unwrap();
        let targets = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        targets.map(|target| target.to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    // No name in a file system to begin with, and no door left open once everyone is in.
    for target in open(ranks.pid(0)) {
        assert!(!target.starts_with("/dev/shm") && !target.starts_with("socket:"), "{target}");
    }
    ALL.iter().for_each(|rank| ranks.kill(*rank));
    ALL.iter().for_each(|rank| assert!(!ranks.status(*rank).success()));
    for entry in std::fs::read_dir("/dev/shm").unwrap() {
        let name = entry.unwrap().file_name();
        assert!(!name.to_string_lossy().contains("sconce"), "{name:?}");
    }
}

#[test]
fn processes_send_to_each_other_and_name_a_peer_that_left() {
    let name = "processes_send_to_each_other_and_name_a_peer_that_left";
    let ranks = procs(name, &[0, 1, 2], |process| {
        let world = process.join(3, LONG).unwrap();
        let me = world.rank().0;
        let (next, before) = (GroupRank((me + 1) % 3), GroupRank((me + 2) % 3));
        for len in [0, 1, 600_001] {
            let sent = world.issue_send(vec![me as i64; len], next);
            assert_eq!(world.issue_recv(vec![0; len], before).wait().unwrap(), vec![before.0 as i64; len]);
            sent.wait().unwrap();
        }
        world.barrier().unwrap();
        match me {
            // The way back to rank 0 was never opened.
            0 => assert_eq!(lost_rank(&world.recv(&mut [0u8], GroupRank(1)).unwrap_err()), Rank(1)),
            // The one from rank 1 was.
            2 => assert_eq!(lost_rank(&world.recv(&mut [0i64], GroupRank(1)).unwrap_err()), Rank(1)),
            _ => {}
        }
    });
    if let Some(mut ranks) = ranks {
        ranks.assert_success(&[0, 1, 2]);
    }
}

/// Endless turns of collectives, by size and kind: large and small, uneven, of objects, of a sub-group, asynchronous.
fn mixed_collectives(world: &ProcessGroup, step: usize) -> sconce_mesh::Result<()> {
    let (me, n) = (world.rank().0, world.size());
    let pair = world.subgroups(&[vec![Rank(0), Rank(1)], vec![Rank(2)]])?;
    let mut buffer = vec![1f32; [3, 5000, 700_001][step % 3]];
    world.all_reduce(&mut buffer, ReduceOp::Sum)?;
    pair.map_or(Ok(()), |pair| pair.broadcast(&mut buffer, GroupRank(0)))?;
    world.all_gather_object(&vec![0; me * step % 1000])?;
    let counts: Vec<usize> = (0..n).map(|g| g * 1000).collect();
    world.all_gather_uneven(&vec![1u8; counts[me]], &counts, &mut vec![0; counts.iter().sum()])?;
    let work = world.issue(ProcessGroup::barrier);
    let sent = (me == 0).then(|| world.issue_send(vec![1u8; 10], GroupRank(1)));
    if me == 1 {
        world.recv(&mut [0u8; 10], GroupRank(0))?;
    }
    sent.map_or(Ok(()), |sent| sent.wait().map(drop))?;
    work.wait()
}

/// SIGKILL of a rank at 200 moments that no two runs share: the survivors notice at once, and nothing is left.
#[test]
fn ranks_killed_at_random_moments_are_lost_to_all_survivors() {
    const NAME: &str = "ranks_killed_at_random_moments_are_lost_to_all_survivors";
    for round in 0..200 {
        let ranks = procs(NAME, &[0, 1, 2], |process| {
            let world = process.join(3, LONG).unwrap();
            process.signal(&format!("joined/{}", process.rank));
            let error = (0..).find_map(|step| mixed_collectives(&world, step).err()).unwrap();
            let started: std::time::SystemTime =
                std::fs::metadata(process.store.dir().join("killed")).unwrap().modified().unwrap();
            assert!(started.elapsed().unwrap() < Duration::from_secs(1), "{:?}", started.elapsed());
            process.signal(&format!("lost/{}/{}", process.rank, lost_rank(&error)));
        });
        let Some(mut ranks) = ranks else { return };
        (0..3).for_each(|rank| ranks.await_signal(&format!("joined/{rank}")));
        let noise = Instant::now();
        std::thread::sleep(Duration::from_micros(round * 97 % 5000));
        let victim = noise.elapsed().subsec_nanos() as usize % 3;
        std::fs::write(ranks.store.dir().join("killed"), "").unwrap();
        ranks.kill(victim);
        let survivors: Vec<usize> = (0..3).filter(|rank| *rank != victim).collect();
        ranks.assert_success(&survivors);
        for rank in survivors {
            ranks.await_signal(&format!("lost/{rank}/{victim}"));
        }
    }
}
