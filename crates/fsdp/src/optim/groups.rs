//! Parameter groups: which elements of a shard have which hyperparameters. Pure.

use std::ops::Range;

use crate::flat_param::FlatParameter;
use crate::{Names, ParamLayout};

/// Hyperparameters for some parameters; others have the optimizer's own.
///
/// # Source
/// `param_groups` of `torch.optim.Optimizer`.
#[derive(Debug, Clone)]
pub struct ParamGroup<C> {
    /// The parameters. One that several groups choose is the first one's.
    pub params: Names,
    /// Their hyperparameters.
    pub config: C,
}

/// The group of a parameter: 0 is the optimizer's own, the others follow in order.
pub(super) fn group_of<C>(groups: &[ParamGroup<C>], param: &ParamLayout) -> usize {
    groups.iter().position(|group| group.params.contains(&param.fqn)).map_or(0, |nth| nth + 1)
}

/// The runs of one shard's trainable elements that have one group, in order; padding belongs to its neighbour.
pub(super) fn runs(
    flat: &FlatParameter,
    shard: usize,
    group_of: impl Fn(&ParamLayout) -> usize,
) -> Vec<(Range<usize>, usize)> {
    let mut runs: Vec<(Range<usize>, usize)> = Vec::new();
    for (index, param) in flat.trainable().iter().enumerate() {
        let run = flat.run(index, shard);
        let end = run.shard_offset + run.len;
        match runs.last_mut() {
            _ if run.len == 0 => {}
            Some((range, group)) if *group == group_of(param) => range.end = end,
            _ => runs.push((run.shard_offset..end, group_of(param))),
        }
    }
    if let Some((range, _)) = runs.last_mut() {
        range.end = flat.trainable_shard_numel();
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_tile_every_shard_and_join_neighbours_of_one_group() {
        let params = [("a.weight", 6), ("a.bias", 3), ("b.weight", 4), ("c.weight", 4)];
        let flat = FlatParameter::new(params.map(|(n, s)| (n.to_owned(), vec![s])), 2);
        let groups = [ParamGroup { params: Names::matching(|fqn| fqn.ends_with("bias")), config: () }];
        let of_shard = |shard| runs(&flat, shard, |param| group_of(&groups, param));
        assert_eq!(of_shard(0), [(0..6, 0), (6..9, 1)]);
        assert_eq!(of_shard(1), [(0..9, 0)]);
    }
}
