//! Every collective on thread ranks, against answers computed in one place; then what ranks do wrong.

use std::fmt::Debug;
use std::sync::mpsc;
use std::time::Duration;

use half::{bf16, f16};

use crate::{Element, Error, GroupOptions, GroupRank, ProcessGroup, Rank, ReduceOp, Result};

const WORLDS: [usize; 4] = [1, 2, 3, 4];
/// Empty, one, odd, just above one crossing for 4-byte elements, and across rounds of 1 MiB.
const SIZES: [usize; 5] = [0, 1, 7, 8193, 786_437];
const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::Prod];

fn options() -> GroupOptions {
    GroupOptions { timeout: Duration::from_secs(60) }
}

/// Runs `body` on each rank of a world of threads and returns the answers in rank order.
#[track_caller]
fn run<R: Send>(world_size: usize, body: impl Fn(&ProcessGroup) -> R + Sync) -> Vec<R> {
    run_with(world_size, options(), body)
}

#[track_caller]
fn run_with<R: Send>(
    world_size: usize,
    options: GroupOptions,
    body: impl Fn(&ProcessGroup) -> R + Sync,
) -> Vec<R> {
    let groups = ProcessGroup::threads(world_size, options).unwrap();
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || body(&group))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Byte `i` of what rank `from` has for rank `to`.
fn streamed_byte(from: usize, to: usize, i: usize) -> u8 {
    (i * 7 + from * 31 + to * 3) as u8
}

#[test]
fn streamed_parts_arrive_whole_and_in_order() {
    for (n, len) in WORLDS.into_iter().flat_map(|n| [0, 1, 5000, 3_000_001].map(|len| (n, len))) {
        // Rank r sends len + r + 2 g bytes to rank g.
        let count = |from: usize, to: usize| if from == to { 0 } else { len + from + 2 * to };
        run(n, |group| {
            let me = group.rank().0;
            let send: Vec<usize> = (0..n).map(|g| count(me, g)).collect();
            let receive: Vec<usize> = (0..n).map(|g| count(g, me)).collect();
            let (mut asked, mut got) = (vec![0; n], vec![Vec::new(); n]);
            let fill = |to: GroupRank, offset: usize, bytes: &mut [u8]| {
                assert_eq!(offset, asked[to.0]);
                asked[to.0] += bytes.len();
                (offset..).zip(bytes).for_each(|(i, byte)| *byte = streamed_byte(me, to.0, i));
                Ok::<(), Error>(())
            };
            let drain = |from: GroupRank, offset: usize, bytes: &[u8]| {
                assert_eq!(offset, got[from.0].len());
                got[from.0].extend_from_slice(bytes);
                Ok(())
            };
            group.all_to_all_streamed(&send, &receive, fill, drain).unwrap();
            let expected: Vec<Vec<u8>> = (0..n)
                .map(|from| (0..count(from, me)).map(|i| streamed_byte(from, me, i)).collect())
                .collect();
            assert!(got == expected, "all_to_all of {len} bytes on {n} ranks");

            let counts: Vec<usize> = (0..n).map(|g| len + g).collect();
            let mine: Vec<u8> = (0..counts[me]).map(|i| streamed_byte(me, 0, i)).collect();
            let mut got = vec![Vec::new(); n];
            let drain = |from: GroupRank, offset: usize, bytes: &[u8]| {
                assert_eq!(offset, got[from.0].len());
                got[from.0].extend_from_slice(bytes);
                Ok::<(), Error>(())
            };
            group.all_gather_streamed(&mine, &counts, drain).unwrap();
            let expected: Vec<Vec<u8>> =
                (0..n).map(|from| (0..counts[from]).map(|i| streamed_byte(from, 0, i)).collect()).collect();
            assert!(got == expected, "all_gather of {len} bytes on {n} ranks");
        });
    }
}

#[test]
fn a_caller_that_fails_while_streaming_ends_the_collective_for_all() {
    #[derive(Debug, PartialEq)]
    enum Mine {
        Broken,
        Group(Error),
    }
    impl From<Error> for Mine {
        fn from(error: Error) -> Self {
            Mine::Group(error)
        }
    }
    let errors = run(3, |group| {
        let counts: Vec<usize> = (0..3).map(|g| if g == group.rank().0 { 0 } else { 100 }).collect();
        let fill = |_: GroupRank, _: usize, _: &mut [u8]| {
            if group.rank() == Rank(1) { Err(Mine::Broken) } else { Ok(()) }
        };
        group.all_to_all_streamed(&counts, &counts, fill, |_, _, _| Ok(())).unwrap_err()
    });
    let aborted = Mine::Group(Error::Aborted { group: "world".into(), rank: Rank(1) });
    assert_eq!(errors[0], aborted);
    assert_eq!(errors[1], Mine::Broken);
    assert_eq!(errors[2], aborted);
}

#[test]
fn the_record_says_how_much_a_rank_takes_from_the_others() {
    let received = run(3, |group| {
        group.all_gather_into(&[1u8; 10], &mut [0; 30]).unwrap();
        group.reduce_scatter(&[1u8; 30], &mut [0; 10], ReduceOp::Sum).unwrap();
        group.all_reduce(&mut [1u8; 10], ReduceOp::Sum).unwrap();
        group.all_to_all(&[1u8; 30], &mut [0; 30]).unwrap();
        group.broadcast(&mut [1u8; 10], GroupRank(1)).unwrap();
        group.barrier().unwrap();
        group.flight_record().collectives.iter().map(|c| c.received_bytes).collect::<Vec<_>>()
    });
    // An all_reduce of 10 bytes is reduced in parts of 3, 3 and 4: 2 x 3 + 7, 2 x 3 + 7, 2 x 4 + 6.
    assert_eq!(received[0], [20, 20, 13, 20, 10, 0]);
    assert_eq!(received[1], [20, 20, 13, 20, 0, 0]);
    assert_eq!(received[2], [20, 20, 14, 20, 10, 0]);
}

/// Small values, so that sums and products of four are exact in every dtype.
fn value(rank: usize, i: usize) -> i32 {
    ((i * 7 + rank * 5) % 4) as i32
}

fn input<T>(rank: usize, len: usize, make: fn(i32) -> T) -> Vec<T> {
    (0..len).map(|i| make(value(rank, i))).collect()
}

fn reduced<T>(op: ReduceOp, ranks: usize, i: usize, make: fn(i32) -> T, avg: fn(i32, usize) -> T) -> T {
    let column = (0..ranks).map(|rank| value(rank, i));
    match op {
        ReduceOp::Sum => make(column.sum()),
        ReduceOp::Avg => avg(column.sum(), ranks),
        ReduceOp::Min => make(column.min().unwrap()),
        ReduceOp::Max => make(column.max().unwrap()),
        ReduceOp::Prod => make(column.product()),
    }
}

fn check_reductions<T: Element + Debug + PartialEq>(make: fn(i32) -> T, avg: fn(i32, usize) -> T) {
    for ranks in WORLDS {
        run(ranks, |group| {
            let me = group.rank().0;
            for (op, len) in OPS.into_iter().flat_map(|op| SIZES.map(|len| (op, len))) {
                if len > 10_000 && op != ReduceOp::Avg {
                    continue;
                }
                let expected: Vec<T> = (0..len).map(|i| reduced(op, ranks, i, make, avg)).collect();
                let mut buffer = input(me, len, make);
                group.all_reduce(&mut buffer, op).unwrap();
                assert!(buffer == expected, "all_reduce {op} of {ranks} x {len} {}", T::DTYPE);

                let part = len / ranks;
                let input = input(me, part * ranks, make);
                let mut output = vec![make(0); part];
                group.reduce_scatter(&input, &mut output, op).unwrap();
                let expected = &expected[me * part..][..part];
                assert!(output == expected, "reduce_scatter {op} of {ranks} x {part} {}", T::DTYPE);
            }
        });
    }
}

#[test]
fn reductions_of_every_dtype_op_world_and_size_equal_the_naive_ones() {
    check_reductions::<u8>(|v| v as u8, |sum, n| (sum / n as i32) as u8);
    check_reductions::<i8>(|v| v as i8, |sum, n| (sum / n as i32) as i8);
    check_reductions::<i16>(|v| v as i16, |sum, n| (sum / n as i32) as i16);
    check_reductions::<i32>(|v| v, |sum, n| sum / n as i32);
    check_reductions::<i64>(i64::from, |sum, n| i64::from(sum / n as i32));
    check_reductions::<u32>(|v| v as u32, |sum, n| (sum / n as i32) as u32);
    check_reductions::<f32>(|v| v as f32, |sum, n| sum as f32 / n as f32);
    check_reductions::<f64>(f64::from, |sum, n| f64::from(sum) / n as f64);
    check_reductions::<f16>(|v| f16::from_f32(v as f32), |sum, n| f16::from_f32(sum as f32 / n as f32));
    check_reductions::<bf16>(|v| bf16::from_f32(v as f32), |sum, n| bf16::from_f32(sum as f32 / n as f32));
}

#[test]
fn all_ranks_get_the_same_bits_from_sums_that_depend_on_the_order() {
    for len in [5, 8193, 600_001] {
        let answers = run(4, |group| {
            let scale = [1e8f32, 1.0, -1e8, 0.1][group.rank().0];
            let mut buffer: Vec<f32> = (0..len).map(|i| scale + i as f32 * 0.37).collect();
            group.all_reduce(&mut buffer, ReduceOp::Sum).unwrap();
            buffer.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        });
        let in_order = |i: usize| {
            [1e8f32, 1.0, -1e8, 0.1]
                .iter()
                .map(|s| s + i as f32 * 0.37)
                .reduce(|a, b| a + b)
                .unwrap()
                .to_bits()
        };
        for answer in answers {
            assert!(answer.iter().enumerate().all(|(i, bits)| *bits == in_order(i)), "{len} long");
        }
    }
}

#[test]
fn all_gathers_concatenate_in_group_rank_order() {
    for ranks in WORLDS {
        run(ranks, |group| {
            for len in SIZES {
                let mine = input(group.rank().0, len, |v| v as i16);
                let mut output = vec![-1; ranks * len];
                group.all_gather_into(&mine, &mut output).unwrap();
                let expected: Vec<i16> = (0..ranks).flat_map(|rank| input(rank, len, |v| v as i16)).collect();
                assert!(output == expected, "{ranks} x {len}");
            }
        });
    }
}

/// Counts that differ, with zeros, and with a longest part that crosses rounds.
fn uneven(ranks: usize, scale: usize) -> Vec<usize> {
    (0..ranks).map(|g| [3, 0, 5, 1][g] * scale).collect()
}

#[test]
fn uneven_gathers_and_scatters_keep_every_element() {
    for (ranks, scale) in WORLDS.into_iter().flat_map(|ranks| [0, 1, 300_007].map(|scale| (ranks, scale))) {
        let counts = uneven(ranks, scale);
        let total: usize = counts.iter().sum();
        run(ranks, |group| {
            let me = group.rank().0;
            let mine = input(me, counts[me], |v| v as f32);
            let mut output = vec![-1.0; total];
            group.all_gather_uneven(&mine, &counts, &mut output).unwrap();
            let expected: Vec<f32> =
                (0..ranks).flat_map(|rank| input(rank, counts[rank], |v| v as f32)).collect();
            assert!(output == expected, "all_gather_uneven {counts:?}");

            let full = input(me, total, |v| v as f32);
            let mut part = vec![-1.0; counts[me]];
            group.reduce_scatter_uneven(&full, &counts, &mut part, ReduceOp::Sum).unwrap();
            let offset: usize = counts[..me].iter().sum();
            let sum = |i: usize| (0..ranks).map(|rank| value(rank, offset + i) as f32).sum::<f32>();
            assert!(part.iter().enumerate().all(|(i, v)| *v == sum(i)), "reduce_scatter_uneven {counts:?}");
        });
    }
}

/// Cuts `len` into slices of growing length, some empty.
fn cut(mut len: usize) -> Vec<usize> {
    let mut lens = vec![0];
    for next in [1, 7, 0, 1000, 300_000, usize::MAX] {
        lens.push(next.min(len));
        len -= next.min(len);
    }
    lens
}

#[test]
fn vectored_gather_drops_the_padding_and_vectored_scatter_reads_it_as_zeros() {
    for (ranks, part) in
        WORLDS.into_iter().flat_map(|ranks| [0, 1, 5, 40_000, 700_001].map(|part| (ranks, part)))
    {
        for padding in [0, 1, part / 2, ranks * part] {
            let total = (ranks * part).saturating_sub(padding);
            run(ranks, |group| {
                let me = group.rank().0;
                let mine = input(me, part, |v| v as f32);
                let mut slices: Vec<Vec<f32>> = cut(total).into_iter().map(|len| vec![-1.0; len]).collect();
                let mut output: Vec<&mut [f32]> = slices.iter_mut().map(Vec::as_mut_slice).collect();
                group.all_gather_vectored(&mine, &mut output).unwrap();
                let expected: Vec<f32> =
                    (0..ranks).flat_map(|rank| input(rank, part, |v| v as f32)).collect();
                assert!(slices.concat() == expected[..total], "gather {ranks} x {part}, padding {padding}");

                let full = input(me, total, |v| v as f32);
                let mut rest = &full[..];
                let slices: Vec<&[f32]> =
                    cut(total).into_iter().map(|len| rest.split_off(..len).unwrap()).collect();
                let mut output = vec![-1.0; part];
                group.reduce_scatter_vectored(&slices, &mut output, ReduceOp::Sum).unwrap();
                let sum = |i: usize| (0..ranks).map(|rank| value(rank, i) as f32).sum::<f32>();
                let expected = |i: usize| if me * part + i < total { sum(me * part + i) } else { 0.0 };
                let equal = output.iter().enumerate().all(|(i, v)| *v == expected(i));
                assert!(equal, "scatter {ranks} x {part}, padding {padding}");
            });
        }
    }
}

#[test]
fn broadcast_gives_every_rank_the_buffer_of_each_root() {
    for (ranks, len) in WORLDS.into_iter().flat_map(|ranks| SIZES.map(|len| (ranks, len))) {
        run(ranks, |group| {
            for root in 0..ranks {
                let mut buffer = input(group.rank().0, len, |v| v as i64);
                group.broadcast(&mut buffer, GroupRank(root)).unwrap();
                assert!(buffer == input(root, len, i64::from), "{ranks} x {len} from {root}");
            }
        });
    }
}

#[test]
fn all_to_all_delivers_each_part_to_its_rank() {
    for (ranks, len) in WORLDS.into_iter().flat_map(|ranks| SIZES.map(|len| (ranks, len))) {
        run(ranks, |group| {
            let me = group.rank().0;
            let mine = input(me, ranks * len, |v| v as u32);
            let mut output = vec![9; ranks * len];
            group.all_to_all(&mine, &mut output).unwrap();
            let of = |rank: usize| input(rank, ranks * len, |v| v as u32)[me * len..][..len].to_vec();
            assert!(output == (0..ranks).flat_map(of).collect::<Vec<_>>(), "{ranks} x {len}");
        });
    }
}

#[test]
fn uneven_all_to_all_delivers_each_part_to_its_rank() {
    for (ranks, scale) in WORLDS.into_iter().flat_map(|ranks| [0, 1, 100_003].map(|scale| (ranks, scale))) {
        let count = |from: usize, to: usize| (from * 2 + to * 3) % 4 * scale;
        run(ranks, |group| {
            let me = group.rank().0;
            let send: Vec<usize> = (0..ranks).map(|to| count(me, to)).collect();
            let receive: Vec<usize> = (0..ranks).map(|from| count(from, me)).collect();
            let part = |from: usize, to: usize| vec![(10 * from + to) as u8; count(from, to)];
            let mine: Vec<u8> = (0..ranks).flat_map(|to| part(me, to)).collect();
            let mut output = vec![255; receive.iter().sum()];
            group.all_to_all_uneven(&mine, &send, &mut output, &receive).unwrap();
            assert!(
                output == (0..ranks).flat_map(|from| part(from, me)).collect::<Vec<_>>(),
                "{ranks}, {scale}"
            );
        });
    }
}

#[test]
fn objects_of_any_length_arrive_whole() {
    let object = |rank: usize| vec![rank as u8; [3, 0, 2_500_000, 1][rank]];
    for ranks in WORLDS {
        let all: Vec<Vec<u8>> = (0..ranks).map(object).collect();
        run(ranks, |group| {
            let me = group.rank().0;
            assert_eq!(group.all_gather_object(&object(me)).unwrap(), all);
            for root in 0..ranks {
                let is_root = me == root;
                let root = GroupRank(root);
                let gathered = group.gather_object(&object(me), root).unwrap();
                assert_eq!(gathered, is_root.then(|| all.clone()));
                assert_eq!(group.scatter_object(is_root.then_some(&all[..]), root).unwrap(), object(me));
                let given = object(me);
                let got = group.broadcast_object(is_root.then_some(&given[..]), root).unwrap();
                assert_eq!(got, object(root.0));
            }
        });
    }
}

#[test]
fn thousands_of_small_collectives_stay_in_step() {
    run(4, |group| {
        for step in 0..5000u32 {
            let mut sum = [step + group.rank().0 as u32];
            group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum, [4 * step + 6]);
            if step % 7 == 0 {
                group.barrier().unwrap();
            }
        }
    });
}

/// Every rank must return the same mismatch, now and at the next call.
#[track_caller]
fn check_mismatch(call: impl Fn(&ProcessGroup) -> Result<()> + Sync, texts: [&str; 2]) {
    let errors = run(3, |group| {
        group.barrier().unwrap();
        let error = call(group).unwrap_err();
        assert_eq!(group.barrier().unwrap_err(), error, "a failed group stays failed");
        assert_eq!(group.failure(), Some(error.clone()));
        error
    });
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:#?}");
    let Error::Mismatch { expected_rank, expected, got, .. } = &errors[0] else { panic!("{errors:?}") };
    assert_eq!((expected_rank, [&expected[..], got]), (&Rank(0), texts));
}

#[test]
fn ranks_that_disagree_all_get_the_same_mismatch_naming_both_sides() {
    let on_two = |group: &ProcessGroup| group.rank() == Rank(2);
    check_mismatch(
        |g| if on_two(g) { g.barrier() } else { g.all_reduce(&mut [0f32; 1024], ReduceOp::Sum) },
        ["all_reduce(sum, f32, 4096 bytes)", "barrier()"],
    );
    check_mismatch(
        |g| g.all_reduce(&mut vec![0f32; if on_two(g) { 8 } else { 2_000_000 }], ReduceOp::Sum),
        ["all_reduce(sum, f32, 8000000 bytes)", "all_reduce(sum, f32, 32 bytes)"],
    );
    check_mismatch(
        |g| g.all_reduce(&mut [0f32], if on_two(g) { ReduceOp::Max } else { ReduceOp::Sum }),
        ["all_reduce(sum, f32, 4 bytes)", "all_reduce(max, f32, 4 bytes)"],
    );
    check_mismatch(
        |g| {
            if on_two(g) {
                g.broadcast(&mut [0f32], GroupRank(0))
            } else {
                g.broadcast(&mut [0i32], GroupRank(0))
            }
        },
        ["broadcast(root 0, i32, 4 bytes)", "broadcast(root 0, f32, 4 bytes)"],
    );
    check_mismatch(
        |g| g.broadcast(&mut [0u8], GroupRank(usize::from(on_two(g)))),
        ["broadcast(root 0, u8, 1 bytes)", "broadcast(root 1, u8, 1 bytes)"],
    );
    check_mismatch(
        |g| {
            if on_two(g) {
                g.all_gather_object(b"x").map(drop)
            } else {
                g.all_gather_into(&[1i64], &mut [0; 3])
            }
        },
        ["all_gather(i64, 8 bytes)", "all_gather_object(i64, 8 bytes)"],
    );
}

#[test]
fn uneven_counts_that_disagree_are_a_mismatch() {
    check_mismatch(
        |g| {
            let counts = if g.rank() == Rank(1) { [1, 1, 2] } else { [2, 1, 1] };
            g.all_gather_uneven(&vec![0u8; counts[g.rank().0]], &counts, &mut [0; 4])
        },
        ["all_gather(u8, [2, 1, 1] bytes)", "all_gather(u8, [1, 1, 2] bytes)"],
    );
    check_mismatch(
        |g| {
            let mut receive = [1; 3];
            receive[0] += usize::from(g.rank() == Rank(2));
            g.all_to_all_uneven(&[0u8; 3], &[1; 3], &mut vec![0; receive.iter().sum()], &receive)
        },
        [
            "all_to_all_uneven sending 1 bytes to group rank 2",
            "all_to_all_uneven expecting 2 bytes from group rank 0",
        ],
    );
}

#[test]
fn roots_of_object_collectives_are_compared() {
    check_mismatch(
        |g| g.gather_object(b"", GroupRank(usize::from(g.rank() == Rank(2)))).map(drop),
        ["gather_object(root 0, i64, 8 bytes)", "gather_object(root 1, i64, 8 bytes)"],
    );
}

#[test]
fn a_timeout_names_who_arrived_and_who_is_missing_on_every_rank() {
    let (done, wait) = mpsc::channel::<()>();
    let (done, wait) = (std::sync::Mutex::new(Some(done)), std::sync::Mutex::new(wait));
    let finished = std::sync::Barrier::new(2);
    let options = GroupOptions { timeout: Duration::from_millis(100) };
    let errors = run_with(3, options, |group| {
        if group.rank() == Rank(1) {
            // Late: it comes when the others have given up.
            let _closed = wait.lock().unwrap().recv();
        }
        let error = group.all_reduce(&mut [1f32], ReduceOp::Sum).unwrap_err();
        if group.rank() != Rank(1) && finished.wait().is_leader() {
            done.lock().unwrap().take();
        }
        error
    });
    for error in errors {
        let Error::Timeout { arrived, missing, op, seq, .. } = error else { panic!("{error}") };
        assert_eq!((&arrived[..], &missing[..]), (&[Rank(0), Rank(2)][..], &[Rank(1)][..]));
        assert_eq!((&op[..], seq), ("all_reduce(sum, f32, 4 bytes)", 1));
    }
}

#[test]
fn a_rank_that_left_is_lost_to_those_who_need_it_only() {
    let groups = ProcessGroup::threads(3, options()).unwrap();
    let threads = groups.into_iter().map(|world| {
        std::thread::spawn(move || {
            let me = world.rank();
            let pair = world.subgroups(&[vec![Rank(0), Rank(1)]]).unwrap();
            world.barrier().unwrap();
            if me == Rank(2) {
                return;
            }
            let Error::PeerLost { rank, reporter, .. } = world.barrier().unwrap_err() else { panic!() };
            assert_eq!((rank, reporter), (Rank(2), me));
            pair.unwrap().barrier().unwrap();
        })
    });
    threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_rank_whose_thread_panics_is_lost_in_every_group() {
    let groups = ProcessGroup::threads(3, options()).unwrap();
    let threads = groups.into_iter().map(|world| {
        std::thread::spawn(move || {
            let pair = world.subgroups(&[vec![Rank(0), Rank(1)]]).unwrap();
            if world.rank() == Rank(2) {
                std::panic::resume_unwind(Box::new("a bug in user code"));
            }
            let Error::PeerLost { rank, .. } = world.barrier().unwrap_err() else { panic!() };
            assert_eq!(rank, Rank(2));
            let Error::PeerLost { rank, .. } = pair.unwrap().barrier().unwrap_err() else { panic!() };
            assert_eq!(rank, Rank(2));
        })
    });
    let ended: Vec<_> = threads.collect::<Vec<_>>().into_iter().map(|thread| thread.join().is_ok()).collect();
    assert_eq!(ended, [true, true, false]);
}

#[test]
fn abort_fails_pending_collectives_of_all_ranks() {
    run(3, |group| {
        if group.rank() == Rank(1) {
            group.abort();
        }
        let error = group.barrier().unwrap_err();
        assert_eq!(error, Error::Aborted { group: "world".into(), rank: Rank(1) });
    });
    let single = ProcessGroup::single();
    single.abort();
    assert_eq!(single.barrier(), Err(Error::Aborted { group: "world".into(), rank: Rank(0) }));
}

#[test]
fn wrong_arguments_are_refused_before_anything_is_sent() {
    run(2, |group| {
        let (mut one, mut two) = ([0f32; 1], [0f32; 2]);
        let refused = [
            group.all_gather_into(&[0f32], &mut one),
            group.all_gather_vectored(&[0f32], &mut [&mut two, &mut one]),
            group.all_gather_uneven(&[0f32], &[1, 1, 0], &mut two),
            group.all_gather_uneven(&[0f32], &[2, 2], &mut [0f32; 4]),
            group
                .all_gather_uneven(&[0f32], &[1, usize::MAX], &mut two)
                .and(group.broadcast(&mut [0u8], GroupRank(2))),
            group.reduce_scatter(&[0f32; 3], &mut one, ReduceOp::Sum),
            group.reduce_scatter_vectored(&[&[0f32; 3]], &mut one, ReduceOp::Sum),
            group.reduce_scatter_uneven(&[0f32; 3], &[1, 1], &mut one, ReduceOp::Sum),
            group.all_to_all(&[0f32; 3], &mut [0f32; 3]),
            group.all_to_all(&[0f32; 2], &mut one),
            group.all_to_all_uneven(&[0f32; 2], &[1, 1], &mut two, &[2, 1]),
            group.broadcast(&mut one, GroupRank(2)),
            group.gather_object(b"", GroupRank(2)).map(drop),
            group.scatter_object(None, group.group_rank()).map(drop),
            group.scatter_object(Some(&[]), group.group_rank()).map(drop),
            group.broadcast_object(None, group.group_rank()).map(drop),
        ];
        for (case, result) in refused.into_iter().enumerate() {
            assert!(matches!(result, Err(Error::InvalidArgument { .. })), "case {case}: {result:?}");
        }
        group.barrier().unwrap();
    });
    let text = ProcessGroup::single().all_gather_into(&[1u8, 2], &mut [0]).unwrap_err().to_string();
    assert_eq!(text, "all_gather_into: length of output: expected 2, got 1");
}

#[test]
fn the_root_alone_gets_reductions_and_gathered_parts_and_scatters_its_own() {
    for ranks in WORLDS {
        run(ranks, |group| {
            let me = group.rank().0;
            for (root, len) in (0..ranks).flat_map(|root| SIZES.map(|len| (root, len))) {
                let root = GroupRank(root);
                let is_root = group.group_rank() == root;
                let mine = input(me, len, f64::from);
                let mut output = vec![-1.0; len];
                group.reduce(&mine, is_root.then_some(&mut output[..]), ReduceOp::Sum, root).unwrap();
                let sum = |i| reduced(ReduceOp::Sum, ranks, i, f64::from, |_, _| 0.0);
                let expected = (0..len).map(|i| if is_root { sum(i) } else { -1.0 });
                assert!(output.into_iter().eq(expected), "reduce to {root} of {ranks} x {len}");

                // Uneven, and empty on rank 1.
                let counts: Vec<usize> = (0..ranks).map(|g| if g == 1 { 0 } else { len / (g + 1) }).collect();
                let all: Vec<i32> = (0..ranks).flat_map(|g| input(g, counts[g], |v| v)).collect();
                let mine = input(me, counts[me], |v| v);
                let mut gathered = vec![-1; all.len()];
                group.gather(&mine, &counts, is_root.then_some(&mut gathered[..]), root).unwrap();
                assert!(!is_root || gathered == all, "gather to {root} of {counts:?}");

                let mut part = vec![-1; counts[me]];
                group.scatter(is_root.then_some(&all[..]), &counts, &mut part, root).unwrap();
                assert!(part == mine, "scatter from {root} of {counts:?}");
            }
        });
    }
}

#[test]
fn roots_that_differ_are_a_mismatch_and_buffers_in_the_wrong_place_are_refused() {
    run(2, |group| {
        let me = group.group_rank();
        let text = group.reduce(&[1u8], Some(&mut [0]), ReduceOp::Sum, me).unwrap_err().to_string();
        assert!(text.contains("reduce(sum, root 0, u8") && text.contains("root 1"), "{text}");
    });
    run(2, |group| {
        let is_root = group.rank() == Rank(0);
        let mut output = [0u8];
        let output = (!is_root).then_some(&mut output[..]);
        let refused = group.reduce(&[1u8], output, ReduceOp::Sum, GroupRank(0)).unwrap_err();
        assert!(matches!(refused, Error::InvalidArgument { op: "reduce", .. }), "{refused}");
        assert_eq!(group.failure(), None);
    });
}

/// A call that differs from others in one thing: op, dtype, size, root or reduction.
fn odd_call(group: &ProcessGroup, kind: usize) -> Result<()> {
    let (mut bytes, mut floats, mut all) = ([1u8; 12], [1f32; 3], [0f32; 12]);
    let all = &mut all[..3 * group.size()];
    match kind {
        0 => group.all_reduce(&mut floats, ReduceOp::Sum),
        1 => group.all_reduce(&mut floats, ReduceOp::Max),
        2 => group.all_reduce(&mut floats[..2], ReduceOp::Sum),
        3 => group.all_reduce(&mut bytes, ReduceOp::Sum),
        4 => group.broadcast(&mut floats, GroupRank(0)),
        5 => group.broadcast(&mut floats, GroupRank(1)),
        6 => group.all_gather_into(&floats, all),
        7 => group.reduce_scatter(all, &mut floats, ReduceOp::Sum),
        8 => group.all_to_all(&[1f32; 12][..all.len()], all),
        9 => group.all_gather_object(&bytes).map(drop),
        _ => group.barrier(),
    }
}

#[test]
fn five_hundred_mismatched_programs_end_in_one_mismatch_that_names_both_sides() {
    let mut state = 1u64;
    let mut next = |limit: usize| {
        // Knuth's multiplier; the high bits are random enough to choose from a list.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % limit
    };
    for program in 0..500 {
        let ranks = 2 + next(3);
        let (common, odd_rank, agreed) = (next(11), next(ranks), next(4));
        let odd = (common + 1 + next(10)) % 11;
        let answers = run(ranks, |group| {
            (0..agreed).for_each(|_| odd_call(group, common).unwrap());
            odd_call(group, if group.rank().0 == odd_rank { odd } else { common }).unwrap_err()
        });
        let Error::Mismatch { expected_rank, got_rank, expected, got, .. } = &answers[0] else {
            panic!("program {program}: {}", answers[0])
        };
        assert!(answers.iter().all(|answer| *answer == answers[0]), "program {program}: {answers:?}");
        assert!([*expected_rank, *got_rank].contains(&Rank(odd_rank)), "program {program}");
        assert_ne!(expected, got, "program {program}");
    }
}
