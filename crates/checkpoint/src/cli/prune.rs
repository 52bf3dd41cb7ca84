//! `prune`: old checkpoints of a directory go, each at once and whole.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::Found;
use super::args::Prune;
use super::output::Output;
use crate::storage::remove::{Removal, remove as remove_unused};
use crate::{Error, Format, Result};

pub(super) fn run(args: &Prune, out: &mut Output) -> Result<Found> {
    let found = checkpoints(&args.path)?;
    let first_kept = found.len().saturating_sub(args.keep_last as usize);
    let mut failed = Ok(Found::Nothing);
    for (nth, (step, path)) in found.iter().enumerate() {
        let is_multiple = args.keep_every.is_some_and(|every| every > 0 && step % every == 0);
        let is_kept = nth >= first_kept || is_multiple;
        let removed = if is_kept || args.dry_run { Ok(false) } else { remove(path) };
        let is_gone = matches!(removed, Ok(true));
        out.object(&json!({ "path": path.display().to_string(), "kept": is_kept, "removed": is_gone }));
        let done = match (is_kept, args.dry_run, &removed) {
            (true, ..) => "kept",
            (false, true, _) => "would be removed",
            (false, false, Ok(true)) => "removed",
            (false, false, Ok(false)) => "in use, kept",
            (false, false, Err(_)) => "could not be removed",
        };
        out.line(format!("{}  {done}", path.display()));
        // The others are removed all the same.
        if let (Err(error), Ok(_)) = (removed, &failed) {
            failed = Err(error);
        }
    }
    failed
}

/// Committed checkpoints whose names end in a number, by that number. Anything else is left alone.
pub(super) fn checkpoints(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, &e))? {
        let path = entry.map_err(|e| Error::io("list", dir, &e))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let step = name[name.len() - digits..].parse().ok();
        let is_checkpoint = path.is_dir()
            && !name.contains(".tmp")
            && matches!(Format::of(&path), Ok(Format::Sconce | Format::TorchDcp));
        if let Some(step) = step.filter(|_| is_checkpoint) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes a checkpoint, unless somebody reads it or writes to it: whether it is gone.
fn remove(path: &Path) -> Result<bool> {
    if Format::of(path)? == Format::Sconce {
        return match remove_unused(path)? {
            Removal::Gone => Ok(true),
            Removal::Read | Removal::Written => Ok(false),
            Removal::Foreign => {
                let why = std::io::Error::other("it holds files that are not a checkpoint's");
                Err(Error::io("remove", path, &why))
            }
        };
    }
    // Out of the way by one rename, so that nobody sees half of it.
    let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(".pruned.tmp");
    let aside = path.with_file_name(name);
    std::fs::rename(path, &aside).map_err(|e| Error::io("rename", path, &e))?;
    std::fs::remove_dir_all(&aside).map_err(|e| Error::io("remove", &aside, &e))?;
    Ok(true)
}
