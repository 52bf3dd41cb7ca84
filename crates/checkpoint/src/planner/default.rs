//! The default planners: everything is saved once, everything that is asked for is loaded.

use std::collections::{HashMap, HashSet};

use sconce_dtensor::{Fqn, LocalTensor, StateDict};

use super::{LoadPlanner, SavePlanner, dedup, layout, overlap};
use crate::metadata::Metadata;
use crate::plan::{GlobalPlan, LoadPlan, SavePlan};
use crate::tree::Node;
use crate::{Error, Result};

/// Saves every box once, the bytes of replicas spread over the ranks.
///
/// # Source
/// `torch.distributed.checkpoint.DefaultSavePlanner`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DefaultSavePlanner;

impl SavePlanner for DefaultSavePlanner {
    /// # Errors
    /// `ValueMismatch`, `ShapeMismatch` and `DTypeMismatch` where ranks disagree, `Uncovered` and `Overlap` where
    /// their boxes are not exactly the tensor.
    fn global_plan(&mut self, plans: Vec<SavePlan>) -> Result<GlobalPlan> {
        let n_ranks = plans.len();
        let held = layout::merge(plans)?;
        held.tensors.iter().try_for_each(layout::check_coverage)?;
        Ok(dedup::assign_writers(held, n_ranks))
    }
}

/// Loads the names of the state from the checkpoint, each box from whatever chunks it meets. Names that only one side
/// has are reported.
///
/// # Source
/// `torch.distributed.checkpoint.DefaultLoadPlanner`, which does not report what the checkpoint has beyond the state.
#[derive(Clone, Copy, Default)]
pub struct DefaultLoadPlanner<'f> {
    /// Whether a box of which the checkpoint lacks a part is loaded as far as it goes.
    pub allow_partial: bool,
    /// Names of the state that are loaded; `None` for all. The others stay, and nothing is reported as unexpected.
    pub select: Option<&'f (dyn Fn(&str) -> bool + Sync)>,
    /// The name in the checkpoint of a name of the state; `None` if they are the same.
    pub rename: Option<&'f (dyn Fn(&str) -> String + Sync)>,
}

impl LoadPlanner for DefaultLoadPlanner<'_> {
    /// # Errors
    /// `ShapeMismatch`, `DTypeMismatch`, `ValueMismatch`; `Uncovered` if the checkpoint lacks a part and that is not
    /// allowed.
    fn local_plan(&mut self, state: &StateDict<'_>, metadata: &Metadata) -> Result<LoadPlan> {
        let (wanted, tensors) = (Node::of(state), state.flat_tensors());
        let tensors = tensors.map_err(|error| Error::tensor("", &error))?;
        let saved: HashMap<String, &Node> = metadata.tree.leaves().into_iter().collect();
        let (mut plan, mut asked_for) = (LoadPlan::default(), HashSet::new());
        for (name, mine) in wanted.leaves() {
            if self.select.is_some_and(|is_selected| !is_selected(&name)) {
                continue;
            }
            let saved_name = self.rename.map_or_else(|| name.clone(), |rename| rename(&name));
            match (mine, saved.get(&saved_name)) {
                (_, None) => plan.report.missing.push(name),
                (Node::Tensor, Some(Node::Tensor)) => {
                    let tensor = tensors.get(&Fqn(name.clone())).copied();
                    self.plan_tensor(&mut plan, name, &saved_name, tensor, metadata)?;
                }
                (mine, Some(theirs)) => {
                    check_kinds(&name, mine, theirs)?;
                    plan.values.push((name, Node::clone(theirs)));
                }
            }
            asked_for.insert(saved_name);
        }
        if self.select.is_none() {
            let names = metadata.tree.leaves().into_iter().map(|(name, _)| name);
            plan.report.unexpected = names.filter(|name| !asked_for.contains(name)).collect();
        }
        Ok(plan)
    }
}

impl DefaultLoadPlanner<'_> {
    fn plan_tensor(
        &self,
        plan: &mut LoadPlan,
        name: String,
        saved_name: &str,
        tensor: Option<&dyn LocalTensor>,
        metadata: &Metadata,
    ) -> Result<()> {
        let Some((tensor, at)) = tensor.zip(metadata.position(saved_name)) else {
            let got = format!("no tensor {saved_name:?} in the metadata");
            return Err(Error::ValueMismatch { fqn: name, expected: "a tensor".to_owned(), got });
        };
        let found = overlap::plan_tensor(&name, tensor, at, &metadata.tensors[at])?;
        plan.items.extend(found.items);
        match found.missing {
            None => {}
            Some(_) if self.allow_partial => plan.report.partial.push(name),
            Some(missing) => {
                let shape = metadata.tensors[at].shape.clone();
                return Err(Error::Uncovered { fqn: name, shape, missing: missing.to_string() });
            }
        }
        Ok(())
    }
}

/// A tensor is loaded into a tensor, and a value into a value of whatever kind.
fn check_kinds(fqn: &str, wanted: &Node, saved: &Node) -> Result<()> {
    if (*wanted == Node::Tensor) == (*saved == Node::Tensor) {
        return Ok(());
    }
    let (expected, got) = (format!("{wanted:?}"), format!("{saved:?}"));
    Err(Error::ValueMismatch { fqn: fqn.to_owned(), expected, got })
}
