//! `verify`: every byte read, every checksum compared.

use std::time::Instant;

use serde_json::json;

use super::Found;
use super::args::{Values, Verify};
use super::output::{Output, count, rate};
use super::pieces::Source;
use crate::{Damage, DamageReport, Result};

pub(super) fn run(args: &Verify, out: &mut Output) -> Result<Found> {
    let tensors = Values { tensors_only: true };
    let total = Source::open(&args.path, tensors).map(|source| source.metadata.tensor_bytes()).unwrap_or(0);
    let bar = out.progress(total, "verifying");
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let started = Instant::now();
    let report = crate::find_damage(&args.path, threads, &|bytes| bar.inc(bytes))?;
    let took = started.elapsed();
    bar.finish_and_clear();
    show(&args.path.display().to_string(), &report, out);
    out.object(&json!({
        "path": args.path.display().to_string(), "files": report.n_files, "checked_bytes": report.checked_bytes,
        "seconds": took.as_secs_f64(), "damages": report.damages.len(),
    }));
    if report.checked_bytes > 0 {
        out.line(format!("{}, {}", count(report.n_files, "file"), rate(report.checked_bytes, took)));
    } else {
        let files = count(report.n_files, "file");
        out.line(format!("{files} without checksums: only headers and lengths were checked"));
    }
    Ok(if report.damages.is_empty() { Found::Nothing } else { Found::Something })
}

/// The damages by file, each with its place and the tensors that it concerns.
pub(super) fn show(path: &str, report: &DamageReport, out: &mut Output) {
    let mut last = None;
    for Damage { file, offset_bytes, what, fqns } in &report.damages {
        out.object(
            &json!({ "path": path, "file": file, "offset_bytes": offset_bytes, "what": what, "fqns": fqns }),
        );
        if last.replace(file) != Some(file) {
            out.line(file);
        }
        out.line(format!("  byte {offset_bytes}: {what}"));
        out.line(format!("    in {}", short(fqns)));
    }
    match report.damages.len() {
        0 => out.line(format!("{path}: whole")),
        n => out.line(format!("{path}: DAMAGED in {}", count(n, "place"))),
    }
}

fn short(fqns: &[String]) -> String {
    match fqns {
        [] => "no tensor".to_owned(),
        [a, b, c, rest @ ..] if !rest.is_empty() => format!("{a}, {b}, {c} and {} more", rest.len()),
        few => few.join(", "),
    }
}
