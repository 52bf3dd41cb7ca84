//! Works on thread ranks: order, results, failures, and what the caller may do meanwhile.

use std::sync::mpsc;

use super::*;
use crate::{GroupOptions, Rank, ReduceOp};

const LONG: Duration = Duration::from_secs(60);

#[track_caller]
fn run(world_size: usize, body: impl Fn(ProcessGroup) + Sync) {
    let groups = ProcessGroup::threads(world_size, GroupOptions { timeout: LONG }).unwrap();
    std::thread::scope(|scope| {
        groups.into_iter().for_each(|group| drop(scope.spawn(|| body(group))));
    });
}

#[test]
fn works_and_blocking_calls_take_their_turns_in_the_order_of_issue() {
    for n in [1, 2, 3, 4] {
        run(n, |group| {
            let me = group.rank().0 as i64;
            let sum = (0..n as i64).sum::<i64>();
            let works: Vec<_> = (1..=20)
                .map(|step| {
                    group.issue(move |group| {
                        let mut buffer = vec![me * step; 1000];
                        group.all_reduce(&mut buffer, ReduceOp::Sum).map(|()| buffer)
                    })
                })
                .collect();
            // Another op: it would be a mismatch out of turn.
            let mut all = vec![0; n];
            group.all_gather_into(&[me], &mut all).unwrap();
            assert!(works.iter().all(Work::is_completed));
            assert!(all.into_iter().eq(0..n as i64));
            for (step, work) in (1..).zip(works) {
                assert_eq!(work.wait().unwrap(), vec![sum * step; 1000]);
            }
        });
    }
}

#[test]
fn the_caller_goes_on_while_a_work_waits_for_its_peer() {
    let (come, came) = mpsc::channel();
    let (come, came) = (Mutex::new(come), Mutex::new(came));
    run(2, |group| {
        if group.rank() == Rank(0) {
            let work = group.issue(ProcessGroup::barrier);
            assert!(!work.wait_timeout(Duration::from_millis(30)) && !work.is_completed());
            come.lock().unwrap().send(()).unwrap();
            assert!(work.wait_timeout(LONG));
            work.wait().unwrap();
        } else {
            came.lock().unwrap().recv().unwrap();
            group.barrier().unwrap();
        }
    });
}

#[test]
fn a_work_that_fails_fails_all_ranks_and_all_later_works() {
    run(3, |group| {
        let work = group.issue(|group| {
            let mut buffer = vec![0f32; 1 + group.rank().0 / 2];
            group.all_reduce(&mut buffer, ReduceOp::Sum)
        });
        let later = group.issue(ProcessGroup::barrier);
        let error = work.wait().unwrap_err();
        assert!(matches!(error, Error::Mismatch { got_rank: Rank(2), .. }), "{error}");
        assert_eq!(later.wait(), Err(error.clone()));
        assert_eq!(group.barrier(), Err(error));
    });
}

#[test]
fn a_work_that_panics_aborts_the_group() {
    run(2, |group| {
        let work = if group.rank() == Rank(1) {
            group.issue(|_| -> Result<()> { std::panic::resume_unwind(Box::new(())) })
        } else {
            group.issue(ProcessGroup::barrier)
        };
        assert_eq!(work.wait(), Err(Error::Aborted { group: "world".into(), rank: Rank(1) }));
    });
}

#[test]
fn ranks_may_send_to_each_other_and_around_a_ring() {
    for (n, len) in [(2, 0), (2, 5), (3, 700_001), (4, 1000)] {
        run(n, |group| {
            let me = group.rank().0;
            let (next, before) = (GroupRank((me + 1) % n), GroupRank((me + n - 1) % n));
            for round in 0..3u32 {
                let sent = group.issue_send(vec![me as u32 + 10 * round; len], next);
                let got = group.issue_recv(vec![0; len], before).wait().unwrap();
                assert_eq!(got, vec![before.0 as u32 + 10 * round; len]);
                assert_eq!(sent.wait().unwrap().len(), len);
            }
        });
    }
}

#[test]
fn blocking_sends_follow_issued_ones_and_pass_no_other_rank() {
    run(3, |group| match group.rank().0 {
        0 => {
            let first = group.issue_send(vec![1u8], GroupRank(2));
            group.send(&[2u8, 3], GroupRank(2)).unwrap();
            assert!(first.is_completed());
        }
        2 => {
            let (mut one, mut two) = ([0u8], [0u8; 2]);
            group.recv(&mut one, GroupRank(0)).unwrap();
            group.recv(&mut two, GroupRank(0)).unwrap();
            assert_eq!((one, two), ([1], [2, 3]));
        }
        _ => {}
    });
}

#[test]
fn a_receiver_that_expects_another_length_is_a_mismatch_on_both_ends() {
    run(2, |group| {
        let error = match group.rank().0 {
            0 => group.send(&[1f32; 4], GroupRank(1)).unwrap_err(),
            _ => group.recv(&mut [0f32; 5], GroupRank(0)).unwrap_err(),
        };
        let text = error.to_string();
        assert!(text.contains("send_recv(f32, [16, 0] bytes)") && text.contains("[20, 0]"), "{text}");
    });
}

#[test]
fn a_peer_that_is_no_other_rank_of_the_group_is_refused() {
    run(2, |group| {
        for peer in [GroupRank(2), group.group_rank()] {
            let refused = group.issue_send(vec![0u8], peer).wait().unwrap_err();
            assert!(matches!(refused, Error::InvalidArgument { op: "send", .. }), "{refused}");
            let refused = group.recv(&mut [0u8], peer).unwrap_err();
            assert!(matches!(refused, Error::InvalidArgument { op: "recv", .. }), "{refused}");
        }
    });
}

#[test]
fn the_flight_record_tells_what_runs_and_what_is_done() {
    let (come, came) = mpsc::channel();
    let (come, came) = (Mutex::new(come), Mutex::new(came));
    run(2, |group| {
        group.all_reduce(&mut [1f32; 4], ReduceOp::Sum).unwrap();
        if group.rank() == Rank(0) {
            let work = group.issue(ProcessGroup::barrier);
            let running = || group.flight_record().collectives.last().unwrap().call == "barrier()";
            while !running() {
                std::thread::yield_now();
            }
            let record = group.flight_record();
            let states: Vec<_> = record.collectives.iter().map(|c| (c.seq, &*c.call, c.state)).collect();
            let reduced = (1, "all_reduce(sum, f32, 16 bytes)", crate::CollectiveState::Completed);
            assert_eq!(states, [reduced, (2, "barrier()", crate::CollectiveState::Running)]);
            assert_eq!(record.collectives[1].thread, "sconce-progress");
            come.lock().unwrap().send(()).unwrap();
            work.wait().unwrap();
        } else {
            came.lock().unwrap().recv().unwrap();
            group.barrier().unwrap();
        }
    });
}

#[test]
fn a_work_that_waits_for_one_behind_it_is_told_so() {
    for n in [1, 2] {
        run(n, |group| {
            let work = group.issue(|group| group.issue(ProcessGroup::barrier).wait());
            let error = work.wait().unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { op: "wait", .. }), "{error}");
            // The barrier has its turn all the same.
            group.barrier().unwrap();
        });
    }
}

#[test]
fn an_abort_ends_what_is_received_and_sends_that_come_later() {
    run(2, |group| {
        let (me, other) = (group.rank(), GroupRank(1 - group.rank().0));
        let mut buffer = [1u8];
        if me == Rank(0) {
            group.send(&buffer, other).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            group.abort();
            assert!(matches!(group.send(&buffer, other), Err(Error::Aborted { .. })));
        } else {
            group.recv(&mut buffer, other).unwrap();
            let started = Instant::now();
            assert!(matches!(group.recv(&mut buffer, other), Err(Error::Aborted { .. })));
            assert!(started.elapsed() < LONG / 2);
            assert!(matches!(group.send(&buffer, other), Err(Error::Aborted { .. })));
        }
    });
}

#[test]
fn a_duplicate_is_no_subgroup_of_all() {
    run(2, |group| {
        let made = match group.rank() {
            Rank(0) => group.duplicate().map(drop),
            _ => group.subgroups(&[vec![Rank(0), Rank(1)]]).map(drop),
        };
        let error = made.unwrap_err().to_string();
        assert!(error.contains("duplicate(") && error.contains("subgroups("), "{error}");
    });
}

#[test]
fn works_of_two_groups_that_wait_for_each_other_are_told_so() {
    run(1, |one| {
        let two = one.duplicate().unwrap();
        for waits_for_a_work in [false, true] {
            // Both run before either waits.
            let both_run = Arc::new(std::sync::Barrier::new(2));
            let wait = |own: &ProcessGroup, other: &ProcessGroup| {
                let (other, both_run) = (other.clone(), both_run.clone());
                own.issue(move |_| {
                    both_run.wait();
                    if waits_for_a_work { other.issue(ProcessGroup::barrier).wait() } else { other.barrier() }
                })
            };
            let ended = [wait(&one, &two), wait(&two, &one)].map(Work::wait);
            let is_told = |e: &&Result<()>| matches!(e, Err(Error::InvalidArgument { op: "wait", .. }));
            assert_eq!(ended.iter().filter(is_told).count(), 1, "{ended:?}");
            assert_eq!(ended.iter().filter(|e| e.is_ok()).count(), 1, "{ended:?}");
        }
        // Nothing is left of it.
        one.issue(move |_| two.barrier()).wait().unwrap();
    });
}

#[test]
fn works_may_wait_for_works_of_another_group() {
    for n in [1, 2, 3] {
        run(n, |one| {
            let two = one.duplicate().unwrap();
            for step in 0..200i64 {
                let inner = two.issue(ProcessGroup::barrier);
                let of_two = two.clone();
                let outer = one.issue(move |group| {
                    inner.wait()?;
                    of_two.barrier()?;
                    let mut sum = [step];
                    group.all_reduce(&mut sum, ReduceOp::Sum).map(|()| sum[0])
                });
                assert_eq!(outer.wait().unwrap(), step * n as i64);
                let of_one = one.clone();
                two.issue(move |_| of_one.barrier()).wait().unwrap();
            }
        });
    }
}
