//! Which placements an op runs on: rules for one mesh dim, and the choice of the cheapest for all. Pure.

use std::collections::HashMap;

use crate::redistribute::known_plan;
use crate::{DTensorSpec, Error, Placement, Result};

/// Along one mesh dim: how each operand must lie so that local parts suffice, and how the result then lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) inputs: Vec<Placement>,
    pub(crate) output: Placement,
}

impl Rule {
    pub(crate) fn new(inputs: impl Into<Vec<Placement>>, output: Placement) -> Self {
        Self { inputs: inputs.into(), output }
    }
}

/// Elements moved, then steps.
type Cost = (usize, usize);

/// One rule for each mesh dim, so that bringing the operands there moves the fewest elements.
///
/// # Errors
/// `InvalidPlacement` if no rules fit, which Replicate everywhere always does.
pub(crate) fn cheapest(operands: &[&DTensorSpec], rules: &[Rule]) -> Result<Vec<Rule>> {
    let n_dims = operands[0].mesh.ndim();
    // Rules that take the operands as they lie come first, so that most ops end at the first look.
    let along = |mesh_dim: usize| {
        let mut rules: Vec<&Rule> = rules.iter().collect();
        rules.sort_by_key(|rule| {
            operands
                .iter()
                .zip(&rule.inputs)
                .filter(|(spec, input)| spec.placements[mesh_dim] != **input)
                .count()
        });
        rules
    };
    let mut choices: Vec<Vec<&Rule>> = vec![vec![]];
    for mesh_dim in 0..n_dims {
        let rules = along(mesh_dim);
        choices = choices.iter().flat_map(|c| rules.iter().map(|r| [c.as_slice(), &[*r]].concat())).collect();
    }
    let mut costs = Costs { operands, known: HashMap::new() };
    let mut best: Option<(Cost, Vec<&Rule>)> = None;
    for choice in choices {
        let Some(cost) = costs.of(&choice) else { continue };
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, choice));
        }
        if cost == (0, 0) {
            break;
        }
    }
    match best {
        Some((_, choice)) => Ok(choice.into_iter().cloned().collect()),
        None => Err(Error::InvalidPlacement {
            placements: crate::placement::picture(&operands[0].placements),
            what: "no placements of the operands fit: redistribute them to Replicate".to_owned(),
        }),
    }
}

struct Costs<'a> {
    operands: &'a [&'a DTensorSpec],
    /// By operand and its placements; `None` where it cannot get there.
    known: HashMap<(usize, Vec<Placement>), Option<Cost>>,
}

impl Costs<'_> {
    /// What it takes to bring the operands where one rule a mesh dim asks them to be.
    fn of(&mut self, choice: &[&Rule]) -> Option<Cost> {
        let output: Vec<Placement> = choice.iter().map(|rule| rule.output).collect();
        let mut pending = output.iter().filter(|p| p.is_partial());
        if pending.next().is_some_and(|first| pending.any(|other| other != first)) {
            return None;
        }
        let mut total = (0, 0);
        for (nth, spec) in self.operands.iter().enumerate() {
            let to: Vec<Placement> = choice.iter().map(|rule| rule.inputs[nth]).collect();
            let cost = *self.known.entry((nth, to)).or_insert_with_key(|(_, to)| {
                let plan = known_plan(&spec.shape, spec.mesh.shape(), &spec.placements, to).ok()?;
                Some((plan.received_numel(), plan.steps.len()))
            });
            let cost = cost?;
            total = (total.0 + cost.0, total.1 + cost.1);
        }
        Some(total)
    }
}
