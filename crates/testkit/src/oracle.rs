//! What a redistribute must give and may cost, told so plainly that it is obviously right: ranks hold lists of indices,
//! and costs are counted. It shares no code with sconce-dtensor.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::rc::Rc;

use sconce_mesh::ReduceOp;

/// How a tensor lies along one mesh dim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// Chunks of this tensor dim.
    Shard(usize),
    /// All of it.
    Replicate,
    /// A term.
    Partial(ReduceOp),
}

/// The indices that a rank holds of each tensor dim.
pub type Held = Vec<Vec<usize>>;

/// All coordinates of a mesh, row-major.
pub fn coordinates(mesh: &[usize]) -> Vec<Vec<usize>> {
    mesh.iter().fold(vec![vec![]], |all, len| {
        all.iter().flat_map(|at| (0..*len).map(|i| [at.as_slice(), &[i]].concat())).collect()
    })
}

/// What the rank at `at` holds: each mesh dim in turn splits what is left of its tensor dim into chunks, as torch.chunk
/// does.
pub fn held(shape: &[usize], mesh: &[usize], at: &[usize], places: &[Place]) -> Held {
    let mut held: Held = shape.iter().map(|len| (0..*len).collect()).collect();
    for (mesh_dim, place) in places.iter().enumerate() {
        if let Place::Shard(dim) = *place {
            let full = held[dim].len().div_ceil(mesh[mesh_dim]).max(1);
            held[dim] = held[dim].chunks(full).nth(at[mesh_dim]).map_or(vec![], <[usize]>::to_vec);
        }
    }
    held
}

/// The values at the held indices, row-major, of the tensor whose value at each index `value` gives.
pub fn values(shape: &[usize], held: &Held, value: impl Fn(usize) -> f32) -> Vec<f32> {
    let mut flat = vec![0];
    for (dim, indices) in held.iter().enumerate() {
        flat = flat.iter().flat_map(|at| indices.iter().map(move |i| at * shape[dim] + i)).collect();
    }
    flat.into_iter().map(value).collect()
}

/// Number of held elements.
pub fn numel(held: &Held) -> usize {
    held.iter().map(Vec::len).product()
}

fn common(a: &Held, b: &Held) -> usize {
    a.iter().zip(b).map(|(a, b)| a.iter().filter(|i| b.contains(i)).count()).product()
}

/// Elements of `to` that ranks lack under `from`, over all ranks: what any plan between placements without terms moves
/// at least.
pub fn lacking(shape: &[usize], mesh: &[usize], from: &[Place], to: &[Place]) -> usize {
    let each = coordinates(mesh).into_iter().map(|at| {
        let wanted = held(shape, mesh, &at, to);
        numel(&wanted) - common(&wanted, &held(shape, mesh, &at, from))
    });
    each.sum()
}

/// Elements that all ranks receive in the cheapest sequence of collectives, each along a single mesh dim, from one list of
/// placements to the other: all placements in the order of what it costs to come to them.
pub fn cheapest_sequence(shape: &[usize], mesh: &[usize], from: &[Place], to: &[Place]) -> usize {
    let ops: Vec<ReduceOp> = from.iter().chain(to).filter_map(|place| op(*place)).collect();
    let shards = (0..shape.len()).map(Place::Shard);
    let terms = ops.into_iter().map(Place::Partial);
    let mut choices: Vec<Place> = shards.chain([Place::Replicate]).chain(terms).collect();
    choices.dedup();
    let mut holdings = Holdings { shape, mesh, known: HashMap::new() };
    let mut costs: HashMap<Vec<Place>, usize> = HashMap::from([(from.to_vec(), 0)]);
    let mut open = BinaryHeap::from([Reverse((0, from.to_vec()))]);
    while let Some(Reverse((cost, now))) = open.pop() {
        if now == to {
            return cost;
        }
        if cost > costs[&now] {
            continue;
        }
        for (mesh_dim, choice) in (0..mesh.len()).flat_map(|dim| choices.iter().map(move |c| (dim, *c))) {
            let mut next = now.clone();
            next[mesh_dim] = choice;
            let Some(step) = step_cost(&mut holdings, mesh_dim, &now, &next) else { continue };
            if costs.get(&next).is_none_or(|known| cost + step < *known) {
                costs.insert(next.clone(), cost + step);
                open.push(Reverse((cost + step, next)));
            }
        }
    }
    unreachable!("no sequence of collectives leads from {from:?} to {to:?}")
}

/// What all ranks hold, by placements.
struct Holdings<'a> {
    shape: &'a [usize],
    mesh: &'a [usize],
    known: HashMap<Vec<Place>, Rc<Vec<Held>>>,
}

impl Holdings<'_> {
    fn of(&mut self, places: &[Place]) -> Rc<Vec<Held>> {
        let all =
            || coordinates(self.mesh).iter().map(|at| held(self.shape, self.mesh, at, places)).collect();
        self.known.entry(places.to_vec()).or_insert_with(|| Rc::new(all())).clone()
    }
}

fn op(place: Place) -> Option<ReduceOp> {
    match place {
        Place::Partial(op) => Some(op),
        Place::Shard(_) | Place::Replicate => None,
    }
}

/// What one collective along `mesh_dim` moves, which is all that differs; `None` if none does it.
fn step_cost(holdings: &mut Holdings<'_>, mesh_dim: usize, from: &[Place], to: &[Place]) -> Option<usize> {
    let mut pending = to.iter().filter_map(|place| op(*place));
    if pending.next().is_some_and(|first| pending.any(|other| other != first)) {
        return None;
    }
    let (mesh, before, after) = (holdings.mesh, holdings.of(from), holdings.of(to));
    let n = mesh[mesh_dim];
    let mut cost = 0;
    for (nth, at) in coordinates(mesh).iter().enumerate() {
        let (has, wants) = (&before[nth], &after[nth]);
        match (from[mesh_dim], to[mesh_dim]) {
            (a, b) if a == b => return None,
            (Place::Partial(_), Place::Partial(_)) => return None,
            (Place::Replicate, Place::Partial(_)) => {}
            // Zeros around shards make terms of a sum, if the shards along the dim are all there is, each once.
            (Place::Shard(_), Place::Partial(ReduceOp::Sum)) => {
                let shards = along(mesh, mesh_dim, nth).map(|other| &before[other]);
                if shards.map(|shard| common(shard, wants)).sum::<usize>() != numel(wants) {
                    return None;
                }
            }
            (Place::Shard(_), Place::Partial(_)) => return None,
            // Each rank takes n − 1 terms of what it wants, all of which the ranks along the dim must hold.
            (Place::Partial(_), Place::Shard(_)) if common(has, wants) < numel(wants) => return None,
            (Place::Partial(_), Place::Shard(_)) => cost += (n - 1) * numel(wants),
            // The same for its part, and then the others' parts: 2 (n − 1) / n of the tensor on each of n ranks.
            (Place::Partial(_), _) if at[mesh_dim] == 0 => cost += 2 * (n - 1) * numel(wants),
            (Place::Partial(_), _) => {}
            _ => {
                let mut others: Vec<&Held> = along(mesh, mesh_dim, nth).map(|other| &before[other]).collect();
                others.sort();
                others.dedup();
                let found: usize = others.iter().map(|other| common(other, wants)).sum();
                if found < numel(wants) {
                    return None;
                }
                cost += numel(wants) - common(has, wants);
            }
        }
    }
    Some(cost)
}

/// The positions whose coordinates differ from those of the `nth` along one mesh dim at most.
fn along(mesh: &[usize], mesh_dim: usize, nth: usize) -> impl Iterator<Item = usize> {
    let stride: usize = mesh[mesh_dim + 1..].iter().product();
    let first = nth - nth / stride % mesh[mesh_dim] * stride;
    (0..mesh[mesh_dim]).map(move |i| first + i * stride)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Place::{Partial, Replicate, Shard};

    #[test]
    fn six_rows_over_four_ranks_are_two_two_two_and_none() {
        let rows = coordinates(&[4])
            .iter()
            .map(|at| held(&[6], &[4], at, &[Shard(0)]).remove(0))
            .collect::<Vec<_>>();
        assert_eq!(rows, [vec![0, 1], vec![2, 3], vec![4, 5], vec![]]);
    }

    #[test]
    fn costs_are_those_of_the_textbook() {
        let sum = Partial(ReduceOp::Sum);
        for (from, to, cost) in [
            (Shard(0), Replicate, 3 * 64),
            (Replicate, Shard(0), 0),
            (Shard(0), Shard(1), 48),
            (sum, Replicate, 2 * 3 * 64),
            (sum, Shard(0), 3 * 64),
            (Replicate, sum, 0),
        ] {
            assert_eq!(cheapest_sequence(&[8, 8], &[4], &[from], &[to]), cost, "{from:?} -> {to:?}");
        }
    }
}
