//! Configs: the hyperparameters of every group, and which of a saved state are whose.

use sconce_dtensor::{StateDict, Value};

use super::ParamGroup;
use crate::{Error, Fsdp, Result};

/// Hyperparameters that are saved, loaded and agreed on.
pub(super) trait Hyper: Copy {
    /// As an entry of torch's `param_groups`.
    fn state_dict(&self) -> StateDict<'static>;
    /// Takes what a saved group says; the rest stays.
    fn load(&mut self, group: &StateDict<'_>);
    /// All of them, for other ranks.
    fn numbers(&self) -> Vec<f64>;
    /// Takes what [`Hyper::numbers`] gave on some rank.
    fn set_numbers(&mut self, numbers: &[f64]);
    /// The learning rate.
    fn lr(&self) -> f64;
    fn set_lr(&mut self, lr: f64);
}

/// The hyperparameters of every group, the optimizer's own first.
#[derive(Debug, Clone)]
pub(super) struct Configs<C>(Vec<C>);

impl<C: Hyper> Configs<C> {
    pub(super) fn new(own: C, groups: &[ParamGroup<C>]) -> Self {
        Self(std::iter::once(own).chain(groups.iter().map(|group| group.config)).collect())
    }

    pub(super) fn get(&self, group: usize) -> &C {
        &self.0[group]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &C> {
        self.0.iter()
    }

    pub(super) fn lrs(&self) -> Vec<f64> {
        self.0.iter().map(C::lr).collect()
    }

    pub(super) fn set_lr(&mut self, lr: f64) {
        self.0.iter_mut().for_each(|config| config.set_lr(lr));
    }

    pub(super) fn set_group_lr(&mut self, group: usize, lr: f64) {
        self.0[group].set_lr(lr);
    }

    /// These with what a saved state says of them. `params` are the names of each group's parameters; what is saved on
    /// some ranks only is every rank's.
    ///
    /// Ranks: collective over the mesh.
    ///
    /// # Errors
    /// `ValueMismatch` if parameters of one group had different hyperparameters when they were saved; `RefusedElsewhere`
    /// on the other ranks.
    pub(super) fn loaded(&self, fsdp: &Fsdp, saved: &StateDict<'_>, params: &[Vec<String>]) -> Result<Self> {
        let groups: Vec<&StateDict<'_>> = match saved.get("param_groups") {
            Some(Value::List(groups)) => groups.iter().filter_map(Value::as_map).collect(),
            _ => Vec::new(),
        };
        let mine = self.0.iter().zip(params).enumerate();
        let mine: Result<Vec<Option<C>>> =
            mine.map(|(nth, (config, params))| find(*config, params, nth, &groups)).collect();
        let message = match &mine {
            Ok(found) => found.iter().map(|config| config.map_or(Vec::new(), |c| c.numbers())).collect(),
            Err(_) => Vec::new(),
        };
        let all = fsdp.groups.mesh.all_gather_object(&encode(&message))?;
        mine?;
        let ranks = fsdp.groups.mesh.ranks();
        let refused: Vec<_> = all.iter().zip(ranks).filter(|(m, _)| m.is_empty()).map(|(_, r)| *r).collect();
        if !refused.is_empty() {
            return Err(Error::RefusedElsewhere { ranks: refused });
        }
        let mut loaded = self.clone();
        for (nth, config) in loaded.0.iter_mut().enumerate() {
            let found = all.iter().filter_map(|message| decode(message, nth)).find(|found| !found.is_empty());
            found.iter().for_each(|numbers| config.set_numbers(numbers));
        }
        Ok(loaded)
    }
}

/// What is saved of the group with these parameters: the group that names them, or the one in its place where groups name
/// none; nothing for a group without parameters.
fn find<C: Hyper>(config: C, params: &[String], nth: usize, groups: &[&StateDict<'_>]) -> Result<Option<C>> {
    let Some(first) = params.first() else { return Ok(None) };
    let with = |group: &&&StateDict<'_>| {
        let mut config = config;
        config.load(group);
        config
    };
    let named: Vec<Vec<&str>> = groups.iter().map(|group| names(group)).collect();
    if named.iter().all(Vec::is_empty) {
        return Ok(groups.get(nth).map(|group| with(&group)));
    }
    let holds = |names: &[&str]| params.iter().any(|param| names.contains(&param.as_str()));
    let holding = groups.iter().zip(&named).filter(|(_, names)| holds(names)).map(|(group, _)| with(&group));
    let holding: Vec<C> = holding.collect();
    if holding.windows(2).any(|pair| pair[0].numbers() != pair[1].numbers()) {
        let expected = "one saved group, or equal ones, for all parameters of a group".to_owned();
        return Err(Error::ValueMismatch { fqn: first.clone(), expected, got: "several".to_owned() });
    }
    Ok(holding.first().copied())
}

fn names<'s>(group: &'s StateDict<'_>) -> Vec<&'s str> {
    match group.get("params") {
        Some(Value::List(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// A length before the numbers of each group. Never empty: an empty message refuses.
fn encode(groups: &[Vec<f64>]) -> Vec<u8> {
    let group = |numbers: &Vec<f64>| {
        let len = (numbers.len() as u64).to_le_bytes();
        len.into_iter().chain(numbers.iter().flat_map(|n| n.to_le_bytes())).collect::<Vec<u8>>()
    };
    groups.iter().flat_map(group).collect()
}

fn decode(message: &[u8], nth: usize) -> Option<Vec<f64>> {
    let mut words = message.as_chunks::<8>().0.iter();
    for before in (0..=nth).rev() {
        let len = u64::from_le_bytes(*words.next()?) as usize;
        let numbers: Vec<f64> = words.by_ref().take(len).map(|word| f64::from_le_bytes(*word)).collect();
        if before == 0 {
            return Some(numbers);
        }
    }
    None
}
