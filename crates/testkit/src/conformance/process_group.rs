//! Every collective of a process group, in random order, sizes, dtypes, ops and sub-groups, against a naive oracle: each
//! rank knows what all ranks contribute, and computes the answers by itself. Then, each on a world of its own, what ranks
//! do wrong.

use std::fmt::Debug;

use sconce_mesh::{DType, Element, Error, GroupRank, ProcessGroup, Rank, ReduceOp, Work};

use super::carried::Carried;
use crate::Place;

/// Lengths beside random ones: empty, one, around 32 KiB and around 1 MiB for elements of 4 bytes.
const LENS: [usize; 6] = [0, 1, 8192, 8193, 262_144, 262_147];
const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::Prod];

/// Runs `rounds` random collectives of `seed` on `world` and on groups of it that overlap.
///
/// Ranks:  collective; all ranks pass the same numbers. The world is still well afterwards.
///
/// # Panics
/// If an answer is wrong.
pub fn process_group_answers(world: &ProcessGroup, rounds: usize, seed: u64) {
    process_group_answers_at(&Place::CPU, world, rounds, seed);
}

/// As [`process_group_answers`], of tensors at `place`; what has no form for a device runs in host memory.
///
/// # Panics
/// If an answer is wrong.
pub fn process_group_answers_at(place: &Place, world: &ProcessGroup, rounds: usize, seed: u64) {
    let groups = overlapping_groups(world);
    let mut random = Random(seed);
    for round in 0..rounds {
        // All ranks draw the same, also those that sit a round out.
        let (group, draws) = (&groups[random.below(groups.len())], Draws::new(&mut random));
        if let Some(group) = group {
            Case { group, carried: Carried { group, place }, draws, round }.run();
        }
    }
    works_keep_their_order(world);
    bad_arguments_concern_the_caller_only(world);
    world.barrier().expect("a barrier");
}

/// The world, pairs of neighbours, all but the first rank, and the world backwards.
fn overlapping_groups(world: &ProcessGroup) -> Vec<Option<ProcessGroup>> {
    let ranks = world.ranks().to_vec();
    let pairs = ranks.chunks(2).map(<[Rank]>::to_vec).collect();
    let mut partitions: Vec<Vec<Vec<Rank>>> = vec![pairs, vec![backwards(&ranks)]];
    if ranks.len() > 1 {
        partitions.push(vec![ranks[1..].to_vec()]);
    }
    let made = partitions.iter().map(|partition| world.subgroups(partition).expect("groups are made"));
    std::iter::once(Some(world.clone())).chain(made).collect()
}

fn backwards(ranks: &[Rank]) -> Vec<Rank> {
    ranks.iter().rev().copied().collect()
}

/// Knuth's linear congruential generator; its high bits.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// What one round is.
#[derive(Debug)]
struct Draws {
    kind: usize,
    dtype: DType,
    op: ReduceOp,
    len: usize,
    /// Drawn for the largest group; taken modulo the group's size.
    root: usize,
    salt: usize,
}

impl Draws {
    fn new(random: &mut Random) -> Draws {
        let len = match random.below(3) {
            0 => LENS[random.below(LENS.len())],
            1 => random.below(300),
            _ => random.below(40_000),
        };
        Draws {
            kind: random.below(12),
            dtype: DType::ELEMENTS[random.below(DType::ELEMENTS.len())],
            op: OPS[random.below(OPS.len())],
            len,
            root: random.below(1 << 20),
            salt: random.below(1 << 20),
        }
    }
}

struct Case<'a> {
    group: &'a ProcessGroup,
    carried: Carried<'a>,
    draws: Draws,
    round: usize,
}

/// Elements made of small integers, in which sums and products of four are exact.
trait Small: Element + PartialEq + Debug {
    fn of(value: i32) -> Self;
    /// `sum / n` as this dtype divides.
    fn mean(sum: i32, n: usize) -> Self;
}

macro_rules! small {
    ($($integer:ty),*; $($float:ty),*) => {
        $(impl Small for $integer {
            fn of(value: i32) -> Self { value as $integer }
            fn mean(sum: i32, n: usize) -> Self { (sum / n as i32) as $integer }
        })*
        $(impl Small for $float {
            fn of(value: i32) -> Self { value as $float }
            fn mean(sum: i32, n: usize) -> Self { sum as $float / n as $float }
        })*
    };
}

small!(u8, i8, i16, i32, i64, u32; f32, f64);

macro_rules! small_halves {
    ($($half:ty),*) => {$(
        impl Small for $half {
            fn of(value: i32) -> Self { <$half>::from_f32(value as f32) }
            fn mean(sum: i32, n: usize) -> Self { <$half>::from_f32(sum as f32 / n as f32) }
        }
    )*};
}

small_halves!(half::f16, half::bf16);

impl Case<'_> {
    fn run(&self) {
        match self.draws.dtype {
            DType::U8 => self.typed::<u8>(),
            DType::I8 => self.typed::<i8>(),
            DType::I16 => self.typed::<i16>(),
            DType::I32 => self.typed::<i32>(),
            DType::I64 => self.typed::<i64>(),
            DType::U32 => self.typed::<u32>(),
            DType::F16 => self.typed::<half::f16>(),
            DType::BF16 => self.typed::<half::bf16>(),
            DType::F32 => self.typed::<f32>(),
            DType::F64 => self.typed::<f64>(),
            stored => unreachable!("{stored} is not drawn"),
        }
    }

    fn typed<T: Small>(&self) {
        match self.draws.kind {
            0 => self.all_reduce::<T>(),
            1 => self.reduce::<T>(),
            2 => self.broadcast::<T>(),
            3 => self.all_gather::<T>(),
            4 => self.gather_and_scatter::<T>(),
            5 => self.reduce_scatter::<T>(),
            6 => self.reduce_scatter_uneven::<T>(),
            7 => self.all_to_all::<T>(),
            8 => self.all_to_all_uneven::<T>(),
            9 => self.ring::<T>(),
            10 => self.objects(),
            _ => self.group.barrier().expect("a barrier"),
        }
    }

    fn n(&self) -> usize {
        self.group.size()
    }

    fn me(&self) -> usize {
        self.group.group_rank().0
    }

    fn op(&self) -> ReduceOp {
        self.carried.exact(self.draws.op)
    }

    fn root(&self) -> GroupRank {
        GroupRank(self.draws.root % self.n())
    }

    /// Element `i` of what group rank `g` contributes.
    fn value(&self, g: usize, i: usize) -> i32 {
        ((i * 7 + g * 5 + self.draws.salt) % 3) as i32
    }

    fn input<T: Small>(&self, g: usize, len: usize) -> Vec<T> {
        (0..len).map(|i| T::of(self.value(g, i))).collect()
    }

    fn reduced<T: Small>(&self, i: usize) -> T {
        let column = (0..self.n()).map(|g| self.value(g, i));
        match self.op() {
            ReduceOp::Sum => T::of(column.sum()),
            ReduceOp::Avg => T::mean(column.sum(), self.n()),
            ReduceOp::Min => T::of(column.min().unwrap_or(0)),
            ReduceOp::Max => T::of(column.max().unwrap_or(0)),
            ReduceOp::Prod => T::of(column.product()),
        }
    }

    /// Uneven counts, some zero.
    fn count(&self, g: usize) -> usize {
        (self.draws.len / self.n() + g * 3) * usize::from(!(g + self.draws.salt).is_multiple_of(3))
    }

    fn counts(&self) -> Vec<usize> {
        (0..self.n()).map(|g| self.count(g)).collect()
    }

    #[track_caller]
    fn same<T: PartialEq>(&self, got: &[T], expected: impl IntoIterator<Item = T>) {
        let right = got.iter().eq(expected.into_iter().collect::<Vec<_>>().iter());
        let (round, group, draws) = (self.round, self.group, &self.draws);
        assert!(right, "round {round}: {draws:?} on {group:?}");
    }

    fn all_reduce<T: Small>(&self) {
        let mut buffer = self.input::<T>(self.me(), self.draws.len);
        self.carried.all_reduce(&mut buffer, self.op()).expect("an all_reduce");
        self.same(&buffer, (0..self.draws.len).map(|i| self.reduced(i)));
    }

    fn reduce<T: Small>(&self) {
        let mut output = vec![T::of(0); self.draws.len];
        let is_root = self.root().0 == self.me();
        let input = self.input::<T>(self.me(), self.draws.len);
        let to = is_root.then_some(&mut output[..]);
        self.group.reduce(&input, to, self.op(), self.root()).expect("a reduce");
        if is_root {
            self.same(&output, (0..self.draws.len).map(|i| self.reduced(i)));
        }
    }

    fn broadcast<T: Small>(&self) {
        let mut buffer = self.input::<T>(self.me(), self.draws.len);
        self.carried.broadcast(&mut buffer, self.root()).expect("a broadcast");
        self.same(&buffer, self.input(self.root().0, self.draws.len));
    }

    fn all_gather<T: Small>(&self) {
        let counts = self.counts();
        let mut output = vec![T::of(0); counts.iter().sum()];
        let input = self.input::<T>(self.me(), self.count(self.me()));
        self.carried.all_gather_uneven(&input, &counts, &mut output).expect("an all_gather");
        self.same(&output, (0..self.n()).flat_map(|g| self.input(g, self.count(g))));

        let mut even = vec![T::of(0); self.draws.len * self.n()];
        let input = self.input::<T>(self.me(), self.draws.len);
        self.carried.all_gather(&input, &mut even).expect("an all_gather");
        self.same(&even, (0..self.n()).flat_map(|g| self.input(g, self.draws.len)));
    }

    fn gather_and_scatter<T: Small>(&self) {
        let (counts, is_root) = (self.counts(), self.root().0 == self.me());
        let mine = self.input::<T>(self.me(), self.count(self.me()));
        let mut gathered = vec![T::of(0); if is_root { counts.iter().sum() } else { 0 }];
        let to = is_root.then_some(&mut gathered[..]);
        self.group.gather(&mine, &counts, to, self.root()).expect("a gather");
        if is_root {
            self.same(&gathered, (0..self.n()).flat_map(|g| self.input(g, self.count(g))));
        }
        let mut part = vec![T::of(0); mine.len()];
        let from = is_root.then_some(&gathered[..]);
        self.group.scatter(from, &counts, &mut part, self.root()).expect("a scatter");
        self.same(&part, mine);
    }

    fn reduce_scatter<T: Small>(&self) {
        let part = self.draws.len / self.n();
        let mut output = vec![T::of(0); part];
        let input = self.input::<T>(self.me(), part * self.n());
        self.carried.reduce_scatter(&input, &mut output, self.op()).expect("a reduce_scatter");
        self.same(&output, (0..part).map(|i| self.reduced(self.me() * part + i)));
    }

    fn reduce_scatter_uneven<T: Small>(&self) {
        let counts = self.counts();
        let (start, len) = (counts[..self.me()].iter().sum::<usize>(), counts[self.me()]);
        let mut output = vec![T::of(0); len];
        let input = self.input::<T>(self.me(), counts.iter().sum());
        let reduced = self.carried.reduce_scatter_uneven(&input, &counts, &mut output, self.op());
        reduced.expect("a reduce_scatter");
        self.same(&output, (start..start + len).map(|i| self.reduced(i)));
    }

    fn all_to_all<T: Small>(&self) {
        let part = self.draws.len / self.n();
        let input = self.input::<T>(self.me(), part * self.n());
        let mut output = input.clone();
        self.carried.all_to_all(&input, &mut output).expect("an all_to_all");
        let from = |g: usize| (0..part).map(move |i| T::of(self.value(g, self.me() * part + i)));
        self.same(&output, (0..self.n()).flat_map(from));
    }

    fn all_to_all_uneven<T: Small>(&self) {
        // From g to h: what depends on both, and is nothing now and then.
        let count = |g: usize, h: usize| self.count(g + 2 * h);
        let send: Vec<usize> = (0..self.n()).map(|h| count(self.me(), h)).collect();
        let receive: Vec<usize> = (0..self.n()).map(|g| count(g, self.me())).collect();
        let input: Vec<T> =
            send.iter().enumerate().flat_map(|(h, len)| self.input(self.me() + h, *len)).collect();
        let mut output = vec![T::of(0); receive.iter().sum()];
        self.carried.all_to_all_uneven(&input, &send, &mut output, &receive).expect("an all_to_all");
        let from = receive.iter().enumerate().flat_map(|(g, len)| self.input(g + self.me(), *len));
        self.same(&output, from);
    }

    fn ring<T: Small>(&self) {
        if self.n() == 1 {
            return;
        }
        let (next, before) = ((self.me() + 1) % self.n(), (self.me() + self.n() - 1) % self.n());
        let sent = self.group.issue_send(self.input::<T>(self.me(), self.draws.len), GroupRank(next));
        let received = self.group.issue_recv(vec![T::of(0); self.draws.len], GroupRank(before));
        self.same(&received.wait().expect("a recv"), self.input(before, self.draws.len));
        sent.wait().expect("a send");
    }

    fn objects(&self) {
        let object = |g: usize| self.input::<u8>(g, self.count(g));
        let all = || (0..self.n()).map(object).collect::<Vec<_>>();
        let (mine, root, is_root) = (object(self.me()), self.root(), self.root().0 == self.me());
        self.same(&self.group.all_gather_object(&mine).expect("objects"), all());
        let gathered = self.group.gather_object(&mine, root).expect("objects");
        assert_eq!(gathered, is_root.then(all));
        let scattered = self.group.scatter_object(gathered.as_deref(), root).expect("an object");
        self.same(&scattered, mine.iter().copied());
        let sent = self.group.broadcast_object(Some(&mine), root).expect("an object");
        self.same(&sent, object(root.0));
    }
}

fn works_keep_their_order(world: &ProcessGroup) {
    let issue = |step: i64| {
        world.issue(move |world| {
            let mut sum = vec![step; 1000];
            world.all_reduce(&mut sum, ReduceOp::Max).map(|()| sum)
        })
    };
    let works: Vec<Work<Vec<i64>>> = (0..10).map(issue).collect();
    // Out of turn it would be a mismatch.
    world.barrier().expect("a barrier");
    for (step, work) in (0..).zip(works) {
        assert!(work.is_completed());
        assert_eq!(work.wait().expect("an all_reduce"), vec![step; 1000]);
    }
}

fn bad_arguments_concern_the_caller_only(world: &ProcessGroup) {
    let n = world.size();
    let mut output = vec![0u8; n + 1];
    let refused = [
        world.all_gather_into(&[1u8], &mut output),
        world.broadcast(&mut output, GroupRank(n)),
        world.reduce_scatter(&output.clone(), &mut [0; 3], ReduceOp::Sum),
        world.all_gather_uneven(&[1u8], &vec![1; n + 1], &mut output),
        world.send(&[1u8], world.group_rank()),
    ];
    for result in refused {
        assert!(matches!(result, Err(Error::InvalidArgument { .. })), "{result:?}");
    }
    assert_eq!(world.failure(), None);
}

/// Ways in which a call can differ from `all_reduce(sum, f32, 12 bytes)`.
pub const ODD_CALLS: [fn(&ProcessGroup) -> sconce_mesh::Result<()>; 7] = [
    |group| group.all_reduce(&mut [1f32; 3], ReduceOp::Max),
    |group| group.all_reduce(&mut [1i32; 3], ReduceOp::Sum),
    |group| group.all_reduce(&mut [1f32; 4], ReduceOp::Sum),
    |group| group.broadcast(&mut [1f32; 3], GroupRank(0)),
    |group| group.all_gather_object(&[1]).map(drop),
    |group| group.all_to_all_uneven::<f32>(&[], &vec![0; group.size()], &mut [], &vec![0; group.size()]),
    ProcessGroup::barrier,
];

/// The last rank makes the odd call, all others another one: each gets the same `Mismatch`, now and ever after.
///
/// # Panics
/// If a rank gets anything else.
pub fn process_group_mismatch(world: &ProcessGroup, odd: usize) {
    world.barrier().expect("a barrier");
    let last = world.ranks()[world.size() - 1];
    let error = if world.rank() == last {
        ODD_CALLS[odd](world)
    } else {
        world.all_reduce(&mut [1f32; 3], ReduceOp::Sum)
    };
    let error = error.expect_err("a mismatch");
    let Error::Mismatch { expected_rank, expected, got_rank, .. } = &error else { panic!("{error}") };
    assert_eq!((*expected_rank, *got_rank), (world.ranks()[0], last), "{error}");
    assert_eq!(expected, "all_reduce(sum, f32, 12 bytes)");
    assert_eq!(world.barrier(), Err(error));
}

/// The last rank aborts while the others wait for it.
///
/// # Panics
/// If a rank learns anything else.
pub fn process_group_abort(world: &ProcessGroup) {
    world.barrier().expect("a barrier");
    let last = world.ranks()[world.size() - 1];
    if world.rank() == last {
        world.abort();
    }
    let expected = Error::Aborted { group: world.name().into(), rank: last };
    assert_eq!(world.barrier(), Err(expected.clone()));
    assert_eq!(world.failure(), Some(expected));
}
