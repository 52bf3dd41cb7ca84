//! `cargo xtask bench cli`: what `sconce-ckpt` takes for a large checkpoint, beside plain reads and copies of its files.

use std::process::Command;

use super::USAGE;
use crate::root;

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
struct Figure {
    place: String,
    what: String,
    bytes: f64,
    seconds: f64,
    peak: f64,
}

/// Measures; `SCONCE_BENCH_MIB` makes the checkpoint smaller than 4 GiB, `SCONCE_BENCH_PLACES` names directories.
pub(super) fn run(arguments: &[String]) -> Result<(), String> {
    if !arguments.is_empty() {
        return Err(USAGE.to_owned());
    }
    let places = std::env::var("SCONCE_BENCH_PLACES")
        .unwrap_or_else(|_| format!("/dev/shm:{}", root().join("target").display()));
    let mut command = Command::new(env!("CARGO"));
    let bench = "bench -q -p sconce-checkpoint --no-default-features --features cli --bench cli";
    command.args(bench.split(' ')).env("SCONCE_BENCH_PLACES", places).current_dir(root());
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    let figures: Vec<Figure> = String::from_utf8_lossy(&output.stdout).lines().filter_map(parse).collect();
    println!(
        "{:<6} {:<36} {:>8} {:>8} {:>9} {:>9} {:>8}",
        "place", "what", "s", "GiB/s", "of reads", "of copies", "peak MB"
    );
    figures.iter().for_each(|figure| println!("{}", row(figure, &figures)));
    Ok(())
}

fn row(figure: &Figure, all: &[Figure]) -> String {
    let Figure { place, what, bytes, seconds, peak } = figure;
    let share = |limit: &str| {
        let limit = all.iter().find(|other| other.place == *place && other.what == limit)?;
        (*bytes > 0.0).then(|| format!("{:.2}", limit.seconds / seconds))
    };
    let cell = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let rate = (*bytes > 0.0).then(|| format!("{:.2}", bytes / seconds / f64::from(1 << 30)));
    let peak = (*peak > 0.0).then(|| format!("{:.1}", peak / 1e6));
    format!(
        "{place:<6} {what:<36} {seconds:>8.2} {:>8} {:>9} {:>9} {:>8}",
        cell(rate),
        cell(share("limit read")),
        cell(share("limit copy")),
        cell(peak)
    )
}

fn parse(line: &str) -> Option<Figure> {
    let fields: Vec<&str> = line.split('\t').collect();
    let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
    let (place, what) = ((*fields.first()?).to_owned(), (*fields.get(1)?).to_owned());
    Some(Figure { place, what, bytes: number(2)?, seconds: number(3)?, peak: number(4)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_limit_of_the_same_place() {
        let lines = [
            "tmpfs\tlimit read\t1024\t1\t0",
            "disk\tlimit read\t1024\t4\t0",
            "disk\tverify\t1024\t5\t1e7",
            "noise",
        ];
        let figures: Vec<Figure> = lines.iter().filter_map(|line| parse(line)).collect();
        assert_eq!(figures.len(), 3);
        assert!(row(&figures[2], &figures).contains(" 0.80 "), "{}", row(&figures[2], &figures));
    }
}
