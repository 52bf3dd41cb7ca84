//! From → to placements on one mesh: the cheapest steps by what they move. Pure: no tensor, no group.
//!
//! Between two reductions one movement of exactly the lacking elements is as cheap as any sequence of movements, so
//! without pending reductions the plan is one step. With them the order matters (slice, then reduce, then gather may
//! move less than reducing first), and is searched for: states are placements, edges are steps.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use sconce_mesh::ReduceOp;

use super::geometry::Geometry;
use super::step::{Action, Plan, Step};
use crate::{Error, Placement, Result, normalize_placements, placement::picture};

/// The cheapest plan by elements received, of all orders of steps; of equal ones that with the fewest steps.
///
/// # Errors
/// `InvalidPlacement` for placements that do not fit, and for Partial → another Partial, which has no meaning.
///
/// # Source
/// The transitions of `torch/distributed/tensor/_redistribute.py`. torch walks mesh dims one by one; here all shards
/// move in one exchange, and one collective runs over several mesh dims.
pub fn plan(shape: &[usize], mesh_shape: &[usize], from: &[Placement], to: &[Placement]) -> Result<Plan> {
    let (from, to) = (
        normalize_placements(shape.len(), mesh_shape.len(), from)?,
        normalize_placements(shape.len(), mesh_shape.len(), to)?,
    );
    check_reductions(&from, &to)?;
    let search = Search { geometry: Geometry::new(shape, mesh_shape), to: &to };
    let steps = search.run(&from);
    Ok(Plan { shape: shape.to_vec(), mesh_shape: mesh_shape.to_vec(), from, steps })
}

fn check_reductions(from: &[Placement], to: &[Placement]) -> Result<()> {
    for (mesh_dim, pair) in from.iter().zip(to).enumerate() {
        if let (Placement::Partial(op), Placement::Partial(other)) = pair
            && op != other
        {
            let what = format!("a pending {op} cannot become a pending {other} (mesh dim {mesh_dim})");
            return Err(Error::InvalidPlacement { placements: picture(to), what });
        }
    }
    Ok(())
}

type State = Vec<Placement>;

/// Elements received so far, then steps so far.
type Cost = (usize, usize);

struct Search<'a> {
    geometry: Geometry<'a>,
    to: &'a [Placement],
}

impl Search<'_> {
    /// Dijkstra's algorithm.
    fn run(&self, from: &[Placement]) -> Vec<Step> {
        let mut best: HashMap<State, (Cost, Option<(State, Step)>)> = HashMap::new();
        best.insert(from.to_vec(), ((0, 0), None));
        // Of equal costs the one found first is taken, so that all ranks take the same.
        let mut found = vec![from.to_vec()];
        let mut open = BinaryHeap::from([Reverse(((0, 0), 0))]);
        while let Some(Reverse((cost, nth))) = open.pop() {
            let state = found[nth].clone();
            if state == self.to {
                break;
            }
            if best.get(&state).is_some_and(|(known, _)| *known < cost) {
                continue;
            }
            for step in self.steps_from(&state) {
                let next = (cost.0 + step.received_numel, cost.1 + 1);
                if best.get(&step.placements).is_none_or(|(known, _)| next < *known) {
                    open.push(Reverse((next, found.len())));
                    found.push(step.placements.clone());
                    best.insert(step.placements.clone(), (next, Some((state.clone(), step))));
                }
            }
        }
        let mut steps = Vec::new();
        let mut at = self.to.to_vec();
        while let Some((_, Some((before, step)))) = best.remove(&at) {
            steps.push(step);
            at = before;
        }
        steps.reverse();
        steps
    }

    /// The mesh dims whose reduction is still to be done, and its op.
    fn pending(&self, state: &[Placement]) -> Option<(Vec<usize>, ReduceOp)> {
        let dims: Vec<usize> =
            (0..state.len()).filter(|dim| state[*dim].is_partial() && state[*dim] != self.to[*dim]).collect();
        match state.get(*dims.first()?)? {
            Placement::Partial(op) => Some((dims, *op)),
            _ => None,
        }
    }

    fn steps_from(&self, state: &[Placement]) -> Vec<Step> {
        let mut steps = self.terms(state);
        let movable: Vec<usize> = (0..state.len()).filter(|dim| !state[*dim].is_partial()).collect();
        let targets = match self.pending(state) {
            Some((pending, op)) => {
                steps.extend(self.reductions(state, &pending, op));
                self.assignments(state, &movable, true)
            }
            // Nothing is in the way of the target but terms that are still to be made.
            None => {
                let (unmade, fixed): (Vec<_>, Vec<_>) =
                    movable.into_iter().partition(|dim| self.to[*dim].is_partial());
                self.assignments(&with(state, &fixed, |dim| self.to[dim]), &unmade, true)
            }
        };
        let moves = targets.into_iter().filter_map(|to| {
            let (action, received_numel) = self.geometry.movement(state, &to)?;
            Some(Step { action, placements: to, received_numel })
        });
        steps.extend(moves);
        steps
    }

    /// Steps that make the terms that the target asks for: of what is replicated, and sums of what is split.
    fn terms(&self, state: &[Placement]) -> Vec<Step> {
        let mut steps = Vec::new();
        for mesh_dim in 0..state.len() {
            let Placement::Partial(op) = self.to[mesh_dim] else { continue };
            let to = with(state, &[mesh_dim], |_| self.to[mesh_dim]);
            let mixes = state.iter().any(|p| p.is_partial() && *p != self.to[mesh_dim]);
            let adds_up = match state[mesh_dim] {
                Placement::Replicate => true,
                Placement::Shard(_) => op == ReduceOp::Sum && self.geometry.adds_up(mesh_dim, state, &to),
                Placement::Partial(_) => false,
            };
            if adds_up && !mixes {
                let action = Action::MakePartial { mesh_dim, op };
                steps.push(Step { action, placements: to, received_numel: 0 });
            }
        }
        steps
    }

    fn reductions(&self, state: &[Placement], pending: &[usize], op: ReduceOp) -> Vec<Step> {
        let mut steps = Vec::new();
        for mesh_dims in subsets(pending) {
            let action = Action::AllReduce { mesh_dims: mesh_dims.clone(), op };
            steps.push(self.reduction(&mesh_dims, action, with(state, &mesh_dims, |_| Placement::Replicate)));
            let scattered = self.assignments(state, &mesh_dims, false).into_iter();
            steps.extend(scattered.filter(|to| self.geometry.shrinks(state, to)).map(|to| {
                let action = Action::ReduceScatter { mesh_dims: mesh_dims.clone(), op };
                self.reduction(&mesh_dims, action, to)
            }));
        }
        steps
    }

    fn reduction(&self, mesh_dims: &[usize], action: Action, to: State) -> Step {
        let received_numel = self.geometry.reduction_numel(mesh_dims, &action, &to);
        Step { action, placements: to, received_numel }
    }

    /// `state` with every choice of Shard, and of Replicate if asked for, along `mesh_dims`.
    fn assignments(&self, state: &[Placement], mesh_dims: &[usize], replicate: bool) -> Vec<State> {
        let shards = (0..self.geometry.shape.len()).map(|dim| Placement::Shard(dim as isize));
        let choices: Vec<Placement> = shards.chain(replicate.then_some(Placement::Replicate)).collect();
        let mut states = vec![state.to_vec()];
        for dim in mesh_dims {
            let extended = states.iter().flat_map(|state| {
                choices.iter().map(|choice| with(state, &[*dim], |_| *choice)).collect::<Vec<_>>()
            });
            states = extended.collect();
        }
        states
    }
}

/// `state` with other placements along `mesh_dims`.
fn with(state: &[Placement], mesh_dims: &[usize], placement: impl Fn(usize) -> Placement) -> State {
    let mut state = state.to_vec();
    mesh_dims.iter().for_each(|dim| state[*dim] = placement(*dim));
    state
}

/// All subsets that are not empty; larger ones first, so that of equal costs one collective over more dims is taken.
fn subsets(dims: &[usize]) -> Vec<Vec<usize>> {
    let subset =
        |bits: usize| (0..dims.len()).filter(|nth| bits >> nth & 1 == 1).map(|nth| dims[nth]).collect();
    let mut all: Vec<Vec<usize>> = (1..1usize << dims.len()).map(subset).collect();
    all.sort_by_key(|subset| Reverse(subset.len()));
    all
}

#[cfg(test)]
mod tests;
