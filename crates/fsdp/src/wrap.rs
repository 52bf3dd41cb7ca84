//! WrapPolicy: how a model is cut into units. Pure: names and sizes in, prefixes out.

use std::fmt;
use std::sync::Arc;

use crate::{Error, Result};

/// Which modules are units: gathered together before their forward, freed after it.
///
/// What belongs to no unit belongs to the root, which is gathered from the beginning of forward to the end of backward.
/// Except for `Prefixes`, candidates are the modules that the model hands to
/// [`FsdpBuilder::wrap`](crate::FsdpBuilder::wrap); those not chosen run as a part of what they lie in. Units may lie
/// inside units: a parameter belongs to the innermost.
///
/// # Source
/// `torch.distributed.fsdp.wrap`: `size_based_auto_wrap_policy`, `lambda_auto_wrap_policy`, `transformer_auto_wrap_policy`.
#[derive(Clone)]
pub enum WrapPolicy {
    /// The modules of these names: `["blocks.0", "blocks.1"]`.
    Prefixes(Vec<String>),
    /// One unit for each repeated block: the numbered modules below these names. `["blocks"]` chooses `blocks.0`,
    /// `blocks.1`, and so on.
    RepeatedBlocks(Vec<String>),
    /// Modules with at least this many elements that are in no smaller unit.
    MinNumel(usize),
    /// Modules that a function chooses by their name and parameters.
    Predicate(WrapPredicate),
}

/// Says whether a module is a unit; see [`WrapPolicy::predicate`].
pub type WrapPredicate = Arc<dyn Fn(&str, &[ParamShape<'_>]) -> bool + Send + Sync>;

/// A parameter as a wrap policy sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamShape<'a> {
    /// Its full name.
    pub fqn: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
}

impl WrapPolicy {
    /// The modules for which `chosen(name, parameters)` is true; it must answer the same on every rank.
    pub fn predicate(chosen: impl Fn(&str, &[ParamShape<'_>]) -> bool + Send + Sync + 'static) -> Self {
        Self::Predicate(Arc::new(chosen))
    }

    /// The prefixes of all units but the root, in declaration order of `wrapped`.
    ///
    /// # Errors
    /// `UnknownUnit` for a prefix that is listed twice or matches no parameter of its own, and for the name of blocks of
    /// which none was wrapped.
    pub(crate) fn units(&self, wrapped: &[String], params: &[ParamShape<'_>]) -> Result<Vec<String>> {
        let mut units = match self {
            Self::Prefixes(prefixes) => prefixes.clone(),
            Self::RepeatedBlocks(names) => {
                if let Some(name) = names.iter().find(|name| !wrapped.iter().any(|p| is_numbered(p, name))) {
                    return Err(self.unknown_unit(name, "has no numbered module below it that was wrapped"));
                }
                let numbered = |prefix: &String| names.iter().any(|name| is_numbered(prefix, name));
                wrapped.iter().filter(|prefix| numbered(prefix)).cloned().collect()
            }
            Self::MinNumel(min) => by_size(*min, wrapped, params),
            Self::Predicate(chosen) => {
                let chosen = |prefix: &&String| {
                    let inside = params.iter().filter(|p| is_inside(p.fqn, prefix)).copied();
                    chosen(prefix, &inside.collect::<Vec<_>>())
                };
                wrapped.iter().filter(chosen).cloned().collect()
            }
        };
        // The root is a unit in any case.
        units.retain(|unit| !unit.is_empty());
        self.check(&units, params)?;
        Ok(units)
    }

    /// Whether a module may be wrapped under this name.
    pub(crate) fn may_wrap(&self, prefix: &str) -> bool {
        match self {
            Self::Prefixes(prefixes) => prefixes.iter().any(|unit| unit == prefix),
            _ => true,
        }
    }

    pub(crate) fn unknown_unit(&self, unit: &str, what: &'static str) -> Error {
        let units = match self {
            Self::Prefixes(prefixes) => prefixes.clone(),
            other => vec![format!("{other:?}")],
        };
        Error::UnknownUnit { unit: unit.to_owned(), what, units }
    }

    fn check(&self, units: &[String], params: &[ParamShape<'_>]) -> Result<()> {
        for (nth, unit) in units.iter().enumerate() {
            if units[..nth].contains(unit) {
                return Err(self.unknown_unit(unit, "is listed twice"));
            }
            if !params.iter().any(|p| is_inside(p.fqn, unit)) {
                return Err(self.unknown_unit(unit, "matches no parameter"));
            }
            if !params.iter().any(|p| innermost(p.fqn, units) == Some(unit)) {
                return Err(self.unknown_unit(unit, "has no parameter outside the units inside it"));
            }
        }
        Ok(())
    }
}

/// Whether a parameter is one of the module `prefix`; the empty name is the whole model's.
pub(crate) fn is_inside(fqn: &str, prefix: &str) -> bool {
    prefix.is_empty() || fqn.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'))
}

/// The longest of `units` that a parameter lies below.
pub(crate) fn innermost<'u>(fqn: &str, units: &'u [String]) -> Option<&'u String> {
    units.iter().filter(|unit| is_inside(fqn, unit)).max_by_key(|unit| unit.len())
}

/// Smaller modules first, so that what they take is not counted again.
fn by_size(min: usize, wrapped: &[String], params: &[ParamShape<'_>]) -> Vec<String> {
    let mut inside_out: Vec<&String> = wrapped.iter().collect();
    inside_out.sort_by_key(|prefix| std::cmp::Reverse(prefix.split('.').count()));
    let mut units: Vec<String> = Vec::new();
    for prefix in inside_out {
        let free = |p: &&ParamShape<'_>| is_inside(p.fqn, prefix) && innermost(p.fqn, &units).is_none();
        let numel: usize = params.iter().filter(free).map(|p| p.shape.iter().product::<usize>()).sum();
        if numel >= min.max(1) {
            units.push(prefix.clone());
        }
    }
    let place = |unit: &String| wrapped.iter().position(|prefix| prefix == unit);
    units.sort_by_key(place);
    units
}

/// `blocks.12` is a numbered module below `blocks`.
fn is_numbered(prefix: &str, name: &str) -> bool {
    let number = prefix.strip_prefix(name).and_then(|rest| rest.strip_prefix('.'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

impl Default for WrapPolicy {
    /// The root alone.
    fn default() -> Self {
        Self::Prefixes(Vec::new())
    }
}

impl<S: Into<String>> FromIterator<S> for WrapPolicy {
    fn from_iter<I: IntoIterator<Item = S>>(prefixes: I) -> Self {
        Self::Prefixes(prefixes.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>> From<Vec<S>> for WrapPolicy {
    fn from(prefixes: Vec<S>) -> Self {
        prefixes.into_iter().collect()
    }
}

impl fmt::Debug for WrapPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefixes(prefixes) => f.debug_tuple("Prefixes").field(prefixes).finish(),
            Self::RepeatedBlocks(names) => f.debug_tuple("RepeatedBlocks").field(names).finish(),
            Self::MinNumel(min) => f.debug_tuple("MinNumel").field(min).finish(),
            Self::Predicate(_) => f.write_str("Predicate"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMS: [ParamShape<'static>; 5] = [
        ParamShape { fqn: "token.weight", shape: &[10, 4] },
        ParamShape { fqn: "blocks.0.up.weight", shape: &[8, 4] },
        ParamShape { fqn: "blocks.0.norm.weight", shape: &[4] },
        ParamShape { fqn: "blocks.1.up.weight", shape: &[8, 4] },
        ParamShape { fqn: "blocks.1.norm.weight", shape: &[4] },
    ];

    fn units(policy: &WrapPolicy) -> Result<Vec<String>> {
        let wrapped = ["blocks.0.up", "blocks.0", "blocks.1.up", "blocks.1", "blocks"].map(str::to_owned);
        policy.units(&wrapped, &PARAMS)
    }

    #[test]
    fn each_policy_chooses_what_it_says() {
        let blocks = WrapPolicy::RepeatedBlocks(vec!["blocks".to_owned()]);
        assert_eq!(units(&blocks).unwrap(), ["blocks.0", "blocks.1"]);
        assert_eq!(units(&WrapPolicy::MinNumel(33)).unwrap(), ["blocks.0", "blocks.1"]);
        // The norms are left over by the layers, and together they reach 8.
        assert_eq!(units(&WrapPolicy::MinNumel(8)).unwrap(), ["blocks.0.up", "blocks.1.up", "blocks"]);
        assert_eq!(units(&WrapPolicy::MinNumel(1000)).unwrap(), Vec::<String>::new());
        let wide = WrapPolicy::predicate(|name, params| name.ends_with("up") && params[0].shape[0] == 8);
        assert_eq!(units(&wide).unwrap(), ["blocks.0.up", "blocks.1.up"]);
        assert_eq!(units(&WrapPolicy::from(vec!["blocks.1"])).unwrap(), ["blocks.1"]);
    }

    #[test]
    fn the_root_is_one_unit_whoever_names_it() {
        assert_eq!(units(&WrapPolicy::from(vec!["", "blocks.1"])).unwrap(), ["blocks.1"]);
        let wrapped = [String::new(), "blocks.0".to_owned()];
        let all = WrapPolicy::predicate(|_, _| true);
        assert_eq!(all.units(&wrapped, &PARAMS).unwrap(), ["blocks.0"]);
    }

    #[test]
    fn blocks_that_nobody_wrapped_are_refused_by_name() {
        let error = units(&WrapPolicy::RepeatedBlocks(vec!["blocks".into(), "layers".into()])).unwrap_err();
        assert!(error.to_string().starts_with("unit \"layers\" has no numbered module"), "{error}");
    }

    #[test]
    fn units_that_match_nothing_or_overlap_are_refused_by_name() {
        for (units_given, expected) in [
            (vec!["block"], "unit \"block\" matches no parameter"),
            (vec!["blocks.0", "blocks.0"], "unit \"blocks.0\" is listed twice"),
            (
                vec!["blocks", "blocks.0", "blocks.1"],
                "unit \"blocks\" has no parameter outside the units inside it",
            ),
        ] {
            let error = units(&WrapPolicy::from(units_given)).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
