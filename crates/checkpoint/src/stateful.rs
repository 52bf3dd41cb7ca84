//! One call for everything that a training run keeps: models, optimizers, counters, by name.

use sconce_dtensor::{StateDict, Stateful, StatefulError, Value};

use crate::load::{LoadOptions, load_with};
use crate::plan::LoadReport;
use crate::save::{SaveOptions, SaveReport, save_with};
use crate::{Error, Result};

/// Saves the state of several parts under their names.
///
/// ```
/// use sconce_checkpoint::{LoadOptions, SaveOptions, load_parts, save_parts};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("step-7");
/// let (step, note) = (7i64, "after warm-up".to_owned());
/// save_parts(&path, &[("step", &step), ("note", &note)], SaveOptions::default())?;
///
/// let (mut step, mut note) = (0i64, String::new());
/// load_parts(&path, &mut [("step", &mut step), ("note", &mut note)], LoadOptions::default())?;
/// assert_eq!((step, note.as_str()), (7, "after warm-up"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Ranks: collective over `options.group`.
///
/// # Errors
/// `Tensor` with the words of a part that has no state to give, and as [`save_with`].
pub fn save_parts(
    path: impl AsRef<std::path::Path>,
    parts: &[(&str, &dyn Stateful)],
    options: SaveOptions<'_>,
) -> Result<SaveReport> {
    save_with(path, &state_of(parts.iter().map(|(name, part)| (*name, *part)))?, options)
}

/// Loads the state of several parts by their names, and gives each its own.
///
/// Ranks: collective over `options.group`.
///
/// # Errors
/// `Tensor` with the words of a part that gives or takes no state, and as [`load_with`].
pub fn load_parts(
    path: impl AsRef<std::path::Path>,
    parts: &mut [(&str, &mut dyn Stateful)],
    options: LoadOptions<'_>,
) -> Result<LoadReport> {
    let mut state = state_of(parts.iter().map(|(name, part)| (*name, &**part)))?;
    let report = load_with(path, &mut state, options)?;
    for (name, part) in parts {
        if let Some(value) = state.get(name) {
            part.load_state_dict(value).map_err(|error| refused(name, &error))?;
        }
    }
    Ok(report)
}

fn state_of<'p>(parts: impl Iterator<Item = (&'p str, &'p dyn Stateful)>) -> Result<StateDict<'static>> {
    let value = |(name, part): (&str, &dyn Stateful)| -> Result<(String, Value<'static>)> {
        Ok((name.to_owned(), part.state_dict().map_err(|error| refused(name, &error))?))
    };
    parts.map(value).collect::<Result<Vec<_>>>().map(StateDict::from_iter)
}

fn refused(name: &str, error: &StatefulError) -> Error {
    Error::Tensor { fqn: name.to_owned(), cause: error.to_string() }
}
