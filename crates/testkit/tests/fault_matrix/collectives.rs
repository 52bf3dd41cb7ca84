//! Scenarios of one collective each: it is called three times, and what it answers is checked each time.

use sconce_mesh::{GroupRank, ProcessGroup, Rank, ReduceOp, Result};

/// Past the size up to which an all_reduce crosses once, and less than a half of the segment holds.
const LARGE: usize = 60_000;

pub(crate) const NAMES: [&str; 20] = [
    "barrier",
    "broadcast",
    "all_reduce",
    "all_reduce_large",
    "all_gather",
    "all_gather_uneven",
    "reduce_scatter",
    "reduce_scatter_uneven",
    "all_to_all",
    "all_to_all_uneven",
    "reduce",
    "gather",
    "scatter",
    "all_gather_object",
    "gather_object",
    "scatter_object",
    "broadcast_object",
    "send_recv",
    "subgroups",
    "issued",
];

/// Three calls of the collective `name`; `None` if there is no such one.
pub(crate) fn run(name: &str, world: &ProcessGroup) -> Option<Result<()>> {
    if !NAMES.contains(&name) {
        return None;
    }
    Some((0..3).try_for_each(|turn| call(name, world, turn)))
}

fn call(name: &str, world: &ProcessGroup, turn: u32) -> Result<()> {
    let (me, n) = (world.group_rank().0 as u32, world.size());
    let sum = turn * n as u32 + 3;
    match name {
        "barrier" => world.barrier(),
        "all_reduce" => reduced(world, 5, turn + me, sum),
        "all_reduce_large" => reduced(world, LARGE, turn + me, sum),
        "issued" => {
            let work = world.issue(move |world| reduced(world, 5, turn + me, sum));
            work.wait()
        }
        "subgroups" => {
            // Of all ranks: what ranks outside a failing group wait for is another group's matter.
            let backwards = vec![vec![Rank(2), Rank(1), Rank(0)]];
            let group = world.subgroups(&backwards)?;
            group.map_or(Ok(()), |group| group.barrier())
        }
        "send_recv" => round(world, me, turn),
        "broadcast" | "reduce" | "gather" | "scatter" => rooted(name, world, turn),
        _ if name.ends_with("object") => objects(name, world, turn as u8),
        _ => exchanged(name, world, turn),
    }
}

fn reduced(world: &ProcessGroup, len: usize, value: u32, sum: u32) -> Result<()> {
    let mut buffer = vec![value; len];
    world.all_reduce(&mut buffer, ReduceOp::Sum)?;
    assert!(buffer.iter().all(|got| *got == sum));
    Ok(())
}

/// Each rank sends to the next one.
fn round(world: &ProcessGroup, me: u32, turn: u32) -> Result<()> {
    let n = world.size() as u32;
    let (next, before) = (GroupRank(((me + 1) % n) as usize), (me + n - 1) % n);
    let sent = world.issue_send(vec![me + turn; 7], next);
    let received = world.issue_recv(vec![0; 7], GroupRank(before as usize)).wait()?;
    assert_eq!(received, [before + turn; 7]);
    sent.wait().map(drop)
}

fn rooted(name: &str, world: &ProcessGroup, turn: u32) -> Result<()> {
    let (me, n, root) = (world.group_rank().0 as u32, world.size(), GroupRank(turn as usize % world.size()));
    let is_root = world.group_rank() == root;
    let mut buffer = vec![turn + me; 9];
    let mut all = vec![0; 9 * n];
    match name {
        "broadcast" => {
            world.broadcast(&mut buffer, root)?;
            assert_eq!(buffer, [turn + root.0 as u32; 9]);
        }
        "reduce" => {
            let mut sum = [0; 9];
            world.reduce(&buffer, is_root.then_some(&mut sum[..]), ReduceOp::Sum, root)?;
            assert!(!is_root || sum == [turn * n as u32 + 3; 9]);
        }
        "gather" => {
            world.gather(&buffer, &vec![9; n], is_root.then_some(&mut all[..]), root)?;
            assert!(!is_root || all.chunks(9).enumerate().all(|(g, part)| part == [turn + g as u32; 9]));
        }
        _ => {
            let parts: Vec<u32> = (0..9 * n).map(|i| turn + i as u32 / 9).collect();
            world.scatter(is_root.then_some(&parts[..]), &vec![9; n], &mut buffer, root)?;
            assert_eq!(buffer, [turn + me; 9]);
        }
    }
    Ok(())
}

fn objects(name: &str, world: &ProcessGroup, turn: u8) -> Result<()> {
    let (me, n, root) = (world.group_rank().0 as u8, world.size() as u8, GroupRank(1));
    let object = |g: u8| vec![turn; g as usize + 1];
    let all: Vec<Vec<u8>> = (0..n).map(object).collect();
    let is_root = world.group_rank() == root;
    match name {
        "all_gather_object" => assert_eq!(world.all_gather_object(&object(me))?, all),
        "gather_object" => assert_eq!(world.gather_object(&object(me), root)?, is_root.then_some(all)),
        "scatter_object" => {
            assert_eq!(world.scatter_object(is_root.then_some(&all[..]), root)?, object(me));
        }
        _ => {
            let mine = object(me);
            assert_eq!(world.broadcast_object(is_root.then_some(&mine[..]), root)?, object(1));
        }
    }
    Ok(())
}

/// The collectives in which all send to all.
fn exchanged(name: &str, world: &ProcessGroup, turn: u32) -> Result<()> {
    let (me, n) = (world.group_rank().0, world.size());
    let counts: Vec<usize> = (0..n).map(|g| 4 * g + 1).collect();
    let total: usize = counts.iter().sum();
    match name {
        "all_gather" => {
            let mut all = vec![0; 6 * n];
            world.all_gather_into(&[turn + me as u32; 6], &mut all)?;
            assert!(all.iter().enumerate().all(|(i, got)| *got == turn + i as u32 / 6));
        }
        "all_gather_uneven" => {
            let mut all = vec![0; total];
            world.all_gather_uneven(&vec![turn; counts[me]], &counts, &mut all)?;
            assert_eq!(all, vec![turn; total]);
        }
        "reduce_scatter" => {
            let mut part = vec![0; 6];
            world.reduce_scatter(&vec![turn; 6 * n], &mut part, ReduceOp::Sum)?;
            assert_eq!(part, [turn * n as u32; 6]);
        }
        "reduce_scatter_uneven" => {
            let mut part = vec![0; counts[me]];
            world.reduce_scatter_uneven(&vec![turn; total], &counts, &mut part, ReduceOp::Sum)?;
            assert_eq!(part, vec![turn * n as u32; counts[me]]);
        }
        "all_to_all" => {
            let mut got = vec![0; 2 * n];
            world.all_to_all(&vec![turn + me as u32; 2 * n], &mut got)?;
            assert!(got.iter().enumerate().all(|(i, got)| *got == turn + i as u32 / 2));
        }
        _ => {
            let (send, receive) = (vec![me + 1; n], (1..=n).collect::<Vec<_>>());
            let mut got = vec![0; receive.iter().sum()];
            world.all_to_all_uneven(&vec![turn; (me + 1) * n], &send, &mut got, &receive)?;
            assert!(got.iter().all(|got| *got == turn));
        }
    }
    Ok(())
}
