//! `watch`: checkpoints of a directory are reported when they are committed.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::Found;
use super::args::Watch;
use super::output::{Output, size};
use super::pieces::Source;
use super::{prune, verify};
use crate::Result;

pub(super) fn run(args: &Watch, out: &mut Output) -> Result<Found> {
    let interval =
        Duration::try_from_secs_f64(args.interval.clamp(0.01, 3600.0)).unwrap_or(Duration::from_secs(1));
    let mut seen = HashSet::new();
    let mut found = Found::Nothing;
    loop {
        for (_, path) in prune::checkpoints(&args.path)? {
            // A commit is one rename: what is there is whole, and a new one in its place has another inode.
            let Ok(inode) = std::fs::metadata(&path).map(|found| std::os::unix::fs::MetadataExt::ino(&found))
            else {
                continue;
            };
            if !seen.insert((path.clone(), inode)) {
                continue;
            }
            match tell(&path, args, out) {
                Ok(Found::Nothing) => {}
                Ok(Found::Something) => found = Found::Something,
                // Pruned meanwhile.
                Err(_) if !path.exists() => {}
                Err(error) => {
                    out.error(&error);
                    found = Found::Something;
                }
            }
            if out.is_closed() || args.count.is_some_and(|count| seen.len() >= count) {
                return Ok(found);
            }
        }
        std::thread::sleep(interval);
    }
}

/// Reports one checkpoint, and whether it is damaged.
fn tell(path: &Path, args: &Watch, out: &mut Output) -> Result<Found> {
    let Source { metadata, .. } = Source::open(path, args.values)?;
    let (tensors, bytes) = (metadata.tensors.len(), metadata.tensor_bytes());
    out.object(&json!({ "path": path.display().to_string(), "tensors": tensors, "bytes": bytes }));
    out.line(format!("{}  {tensors} tensors, {}", path.display(), size(bytes)));
    if !args.verify {
        return Ok(Found::Nothing);
    }
    let report = crate::find_damage(path, 1, &|_| {})?;
    verify::show(&path.display().to_string(), &report, out);
    Ok(if report.damages.is_empty() { Found::Nothing } else { Found::Something })
}
