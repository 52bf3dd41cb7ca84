//! Names: which parameters an option is about.

use std::fmt;
use std::sync::Arc;

/// A choice of parameters by their full names. The default chooses none.
///
/// ```
/// use sconce_fsdp::Names;
///
/// let frozen = Names::below(["encoder", "head.bias"]);
/// assert!(frozen.contains("encoder.0.weight") && !frozen.contains("encoders.0.weight"));
/// let norms = Names::matching(|fqn| fqn.ends_with("norm.weight"));
/// assert!(norms.contains("blocks.0.norm.weight"));
/// ```
#[derive(Clone, Default)]
pub struct Names(Option<Chosen>);

type Chosen = Arc<dyn Fn(&str) -> bool + Send + Sync>;

impl Names {
    /// The parameters that `chosen` says; it must answer the same on every rank.
    pub fn matching(chosen: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(chosen)))
    }

    /// The parameters with one of these names, or below one of these prefixes.
    pub fn below<S: Into<String>>(prefixes: impl IntoIterator<Item = S>) -> Self {
        let prefixes: Vec<String> = prefixes.into_iter().map(Into::into).collect();
        Self::matching(move |fqn| prefixes.iter().any(|prefix| is_below(fqn, prefix)))
    }

    /// Whether `fqn` is chosen.
    pub fn contains(&self, fqn: &str) -> bool {
        self.0.as_ref().is_some_and(|chosen| chosen(fqn))
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Names(chosen by a function)" } else { "Names(none)" })
    }
}

fn is_below(fqn: &str, prefix: &str) -> bool {
    let rest = fqn.strip_prefix(prefix);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}
