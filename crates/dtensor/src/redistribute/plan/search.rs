//! The search for the cheapest steps where terms are pending: states are placements, edges are steps, and the A* algorithm
//! finds the way.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::rc::Rc;

use sconce_mesh::ReduceOp;

use super::{Action, Geometry, Layout, Placement, Step, movement_action};

/// For each mesh dim a choice: of tensor dims, that dim is split; then come Replicate and the terms of each reduction.
type State = Vec<usize>;

/// Elements received so far, then steps so far.
type Cost = (usize, usize);

/// The steps from one list of placements to another, with terms on some side.
pub(super) fn cheapest(geometry: Geometry<'_>, from: &[Placement], to: &[Placement]) -> Vec<Step> {
    let mut search = Search::new(geometry, from, to);
    search.run();
    search.steps()
}

/// A step, up to what is found in the states at its ends.
#[derive(Debug, Clone)]
enum Edge {
    Movement,
    MakePartial(usize),
    AllReduce(Vec<usize>),
    ReduceScatter(Vec<usize>),
}

/// The cheapest way to a state that is known.
struct Known {
    cost: Cost,
    /// The state before, the step from there, and what it moves.
    by: Option<(State, Edge, usize)>,
}

struct Search<'a> {
    geometry: Geometry<'a>,
    choices: Vec<Placement>,
    to: State,
    best: HashMap<State, Known>,
    /// States in the order in which they were found, with what was known to be their cost.
    found: Vec<(Cost, State)>,
    /// By what the whole way costs at least; of equal ones the first found, so that all ranks take the same.
    open: BinaryHeap<Reverse<(Cost, usize)>>,
}

impl<'a> Search<'a> {
    fn new(geometry: Geometry<'a>, from: &[Placement], to: &[Placement]) -> Self {
        let shards = (0..geometry.ndim()).map(|dim| Placement::Shard(dim as isize));
        let mut choices: Vec<Placement> = shards.chain([Placement::Replicate]).collect();
        for placement in from.iter().chain(to) {
            if !choices.contains(placement) {
                choices.push(*placement);
            }
        }
        let state = |placements: &[Placement]| -> State {
            let nth = |p: &Placement| choices.iter().position(|choice| choice == p).unwrap_or(0);
            placements.iter().map(nth).collect()
        };
        let (from, to) = (state(from), state(to));
        let best = HashMap::from([(from.clone(), Known { cost: (0, 0), by: None })]);
        let open = BinaryHeap::from([Reverse(((0, 0), 0))]);
        Self { geometry, to, best, found: vec![((0, 0), from)], open, choices }
    }

    fn run(&mut self) {
        while let Some(Reverse((_, nth))) = self.open.pop() {
            let (cost, state) = self.found[nth].clone();
            if state == self.to {
                return;
            }
            let Some(known) = self.best.get(&state).filter(|known| known.cost == cost) else { continue };
            let moved = matches!(known.by, Some((_, Edge::Movement, _)));
            self.make_terms(cost, &state);
            self.reduce(cost, &state);
            // Two movements in a row move no less than one.
            if !moved {
                self.move_shards(cost, &state);
            }
        }
    }

    /// Makes terms: of what is replicated where the target asks for them, and sums of what is split.
    fn make_terms(&mut self, cost: Cost, state: &[usize]) {
        let (whole, n_choices) = (self.geometry.ndim(), self.choices.len());
        let terms = (0..state.len()).flat_map(|dim| (whole + 1..n_choices).map(move |term| (dim, term)));
        for (dim, term) in terms {
            if state.iter().any(|choice| *choice > whole && *choice != term) {
                continue;
            }
            let next = with(state, dim, term);
            let made = if state[dim] == whole {
                self.to[dim] == term
            } else {
                state[dim] < whole
                    && self.choices[term] == Placement::Partial(ReduceOp::Sum)
                    && self.geometry.adds_up(dim, &self.layout(state), &self.layout(&next))
            };
            if made {
                self.offer(state, cost, next, Edge::MakePartial(dim), 0);
            }
        }
    }

    /// Reduces the terms along every choice of mesh dims, to all of their ranks or to shards.
    fn reduce(&mut self, cost: Cost, state: &[usize]) {
        let whole = self.geometry.ndim();
        let layout = self.layout(state);
        for dims in subsets(&self.pending(state)) {
            let n = self.geometry.group_size(dims.iter().copied());
            let mut next = state.to_vec();
            dims.iter().for_each(|dim| next[*dim] = whole);
            // Each rank takes the others' terms of what it reduces, and then the others' results.
            let all = 2 * (n - 1) * (self.geometry.held_numel(&layout) / n);
            self.offer(state, cost, next.clone(), Edge::AllReduce(dims.clone()), all);
            for_each_choice(&mut next, &dims, whole, &mut |next| {
                let scattered = self.layout(next);
                if self.geometry.lacking(&layout, &scattered) == 0 {
                    let terms = (n - 1) * self.geometry.held_numel(&scattered);
                    self.offer(state, cost, next.to_vec(), Edge::ReduceScatter(dims.clone()), terms);
                }
            });
        }
    }

    /// Moves shards to every other choice of them, by one exchange of exactly what ranks lack.
    fn move_shards(&mut self, cost: Cost, state: &[usize]) {
        let whole = self.geometry.ndim();
        let movable: Vec<usize> = (0..state.len()).filter(|dim| state[*dim] <= whole).collect();
        let layout = self.layout(state);
        for_each_choice(&mut state.to_vec(), &movable, whole + 1, &mut |next| {
            let wanted = self.layout(next);
            let at_least =
                self.geometry.held_numel(&wanted).saturating_sub(self.geometry.held_numel(&layout));
            if next != state && !self.is_beaten(next, (cost.0 + at_least, cost.1 + 1)) {
                let lacking = self.geometry.lacking(&layout, &wanted);
                self.offer(state, cost, next.to_vec(), Edge::Movement, lacking);
            }
        });
    }

    /// True if a way to `state` at such a cost cannot be part of the cheapest one.
    fn is_beaten(&self, state: &[usize], cost: Cost) -> bool {
        self.best.get(state).is_some_and(|known| known.cost <= cost)
            || self.best.get(&self.to).is_some_and(|known| known.cost <= cost)
    }

    fn offer(&mut self, from: &[usize], cost: Cost, to: State, edge: Edge, received: usize) {
        let cost = (cost.0 + received, cost.1 + 1);
        if self.is_beaten(&to, cost) {
            return;
        }
        let at_least = (cost.0 + self.still_needed(&to), cost.1);
        self.open.push(Reverse((at_least, self.found.len())));
        self.found.push((cost, to.clone()));
        self.best.insert(to, Known { cost, by: Some((from.to_vec(), edge, received)) });
    }

    /// No more elements than any steps from `state` to the target move. No step moves less than it lowers this, so that
    /// the cost of a state is final when it is looked at.
    fn still_needed(&self, state: &[usize]) -> usize {
        let (whole, numel) = (self.geometry.ndim(), self.geometry.numel());
        let layout = self.layout(state);
        let n_terms = self.n_terms(state);
        if self.to.iter().any(|choice| *choice > whole) {
            // Each replica but those that are there is received: terms are made of replicas, or of shards and zeros.
            let replicas = (0..state.len()).filter(|dim| self.to[*dim] == whole);
            let there = self.geometry.held_numel(&layout) / n_terms;
            return (self.geometry.group_size(replicas) * numel).saturating_sub(there);
        }
        let wanted = self.layout(&self.to);
        match n_terms {
            1 => self.geometry.lacking(&layout, &wanted),
            // Each term but one is received where it is reduced, each replica of the result but one where it is wanted.
            _ => (n_terms - 2) * numel + self.geometry.held_numel(&wanted),
        }
    }

    fn pending(&self, state: &[usize]) -> Vec<usize> {
        (0..state.len()).filter(|dim| state[*dim] > self.geometry.ndim()).collect()
    }

    fn n_terms(&self, state: &[usize]) -> usize {
        self.geometry.group_size(self.pending(state).into_iter())
    }

    /// What ranks hold: whole terms.
    fn layout(&self, state: &[usize]) -> Rc<Layout> {
        let whole = self.geometry.ndim();
        if state.iter().all(|choice| *choice <= whole) {
            return self.geometry.layout(state);
        }
        self.geometry.layout(&state.iter().map(|choice| *choice.min(&whole)).collect::<Vec<_>>())
    }

    /// The steps to the target.
    fn steps(mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut at = self.to.clone();
        while let Some(Known { by: Some((before, edge, received_numel)), .. }) = self.best.remove(&at) {
            let (from, placements) = (self.placements(&before), self.placements(&at));
            let op = |dim: usize, placements: &[Placement]| match placements[dim] {
                Placement::Partial(op) => op,
                other => unreachable!("{other} is no term"),
            };
            let action = match edge {
                Edge::Movement => movement_action(&self.geometry, &from, &placements, received_numel),
                Edge::MakePartial(mesh_dim) => {
                    Action::MakePartial { op: op(mesh_dim, &placements), mesh_dim }
                }
                Edge::AllReduce(mesh_dims) => Action::AllReduce { op: op(mesh_dims[0], &from), mesh_dims },
                Edge::ReduceScatter(mesh_dims) => {
                    Action::ReduceScatter { op: op(mesh_dims[0], &from), mesh_dims }
                }
            };
            steps.push(Step { action, placements, received_numel });
            at = before;
        }
        steps.reverse();
        steps
    }

    fn placements(&self, state: &[usize]) -> Vec<Placement> {
        state.iter().map(|choice| self.choices[*choice]).collect()
    }
}

fn with(state: &[usize], mesh_dim: usize, choice: usize) -> State {
    let mut state = state.to_vec();
    state[mesh_dim] = choice;
    state
}

/// `state` with every combination of the first `n_choices` choices along `mesh_dims`.
fn for_each_choice(state: &mut [usize], mesh_dims: &[usize], n_choices: usize, f: &mut dyn FnMut(&[usize])) {
    let Some((first, rest)) = mesh_dims.split_first() else { return f(state) };
    let before = state[*first];
    for choice in 0..n_choices {
        state[*first] = choice;
        for_each_choice(state, rest, n_choices, f);
    }
    state[*first] = before;
}

/// All subsets that are not empty; larger ones first, so that of equal costs one collective over more dims is taken.
fn subsets(dims: &[usize]) -> Vec<Vec<usize>> {
    let subset =
        |bits: usize| (0..dims.len()).filter(|nth| bits >> nth & 1 == 1).map(|nth| dims[nth]).collect();
    let mut all: Vec<Vec<usize>> = (1..1usize << dims.len()).map(subset).collect();
    all.sort_by_key(|subset| Reverse(subset.len()));
    all
}
