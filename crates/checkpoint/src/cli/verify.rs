//! `verify`: every byte read, every checksum compared.

use std::time::Instant;

use serde_json::json;

use super::Found;
use super::args::Verify;
use super::output::{Output, rate};
use super::pieces::Source;
use crate::{Damage, DamageReport, Result};

pub(super) fn run(args: &Verify, out: &mut Output) -> Result<Found> {
    let total = Source::open(&args.path).map(|source| source.metadata.tensor_bytes()).unwrap_or(0);
    let bar = out.progress(total, "verifying");
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let started = Instant::now();
    let report = crate::find_damage(&args.path, threads, &|bytes| bar.inc(bytes))?;
    let took = started.elapsed();
    bar.finish_and_clear();
    show(&args.path.display().to_string(), &report, out);
    out.object(&json!({
        "path": args.path, "files": report.n_files, "checked_bytes": report.checked_bytes,
        "seconds": took.as_secs_f64(), "damages": report.damages.len(),
    }));
    if report.checked_bytes > 0 {
        out.line(format!("{} files, {}", report.n_files, rate(report.checked_bytes, took)));
    } else {
        out.line(format!("{} files have no checksums: their headers are sound", report.n_files));
    }
    Ok(if report.damages.is_empty() { Found::Nothing } else { Found::Something })
}

/// The damages, one a line.
pub(super) fn show(path: &str, report: &DamageReport, out: &mut Output) {
    let rows = report.damages.iter().map(|damage| {
        let Damage { file, offset_bytes, what, fqns } = damage;
        out.object(&json!({ "file": file, "offset_bytes": offset_bytes, "what": what, "fqns": fqns }));
        vec![file.clone(), what.clone(), short(fqns), offset_bytes.to_string()]
    });
    let rows: Vec<_> = rows.collect();
    let count = rows.len();
    out.table(&["file", "damage", "tensors", "at byte"], 3, rows);
    match count {
        0 => out.line(format!("{path}: whole")),
        1 => out.line(format!("{path}: DAMAGED in 1 place")),
        count => out.line(format!("{path}: DAMAGED in {count} places")),
    }
}

fn short(fqns: &[String]) -> String {
    match fqns {
        [] => "none".to_owned(),
        [a, b, c, rest @ ..] if !rest.is_empty() => format!("{a}, {b}, {c} and {} more", rest.len()),
        few => few.join(", "),
    }
}
