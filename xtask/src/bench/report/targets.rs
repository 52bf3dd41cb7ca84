//! What the figures should be, and which are not.

use crate::bench::table::{Cell, Table};

/// A bound on a column of some rows of a benchmark.
struct Target {
    bench: &'static str,
    /// Words that all occur in what a row is about.
    rows: &'static [&'static str],
    column: &'static str,
    bound: Bound,
}

#[derive(Debug, Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

use Bound::{AtLeast, AtMost};

const fn target(
    bench: &'static str,
    rows: &'static [&'static str],
    column: &'static str,
    bound: Bound,
) -> Target {
    Target { bench, rows, column, bound }
}

const TARGETS: &[Target] = &[
    target("collectives", &["MiB"], "times gloo", AtLeast(3.0)),
    target("collectives", &["MiB"], "of limit", AtLeast(0.6)),
    target("collectives", &["all_reduce", " 4 KiB"], "times gloo", AtLeast(20.0)),
    target("collectives", &["all_gather", "64 MiB"], "times gloo", AtLeast(6.0)),
    target("overlap", &[], "hidden", AtLeast(0.8)),
    target("store", &[], "seconds", AtMost(2.0)),
    target("store", &[], "memory", AtMost(50e6)),
    target("redistribute", &[], "times torch", AtLeast(3.0)),
    target("fsdp", &["2 mlp step"], "of torch", AtMost(0.6)),
    target("fsdp", &["4 mlp step"], "of torch", AtMost(0.6)),
    target("fsdp", &["2 transformer step"], "of torch", AtMost(1.0)),
    target("fsdp", &["4 transformer step"], "of torch", AtMost(1.0)),
    target("fsdp", &["1 mlp passes"], "of torch", AtMost(1.3)),
    target("fsdp", &["1 mlp unmodified"], "of plain", AtMost(1.03)),
    target("fsdp", &["400 parameters"], "of plain", AtMost(1.05)),
    target("checkpoint", &["save"], "of limit", AtLeast(0.9)),
    target("checkpoint", &["tmpfs 4", "save"], "times torch", AtLeast(1.8)),
    target("checkpoint", &["load fsdp"], "of limit", AtLeast(0.7)),
    target("checkpoint", &["load fsdp"], "times torch", AtLeast(4.0)),
    target("checkpoint", &["4 load hsdp"], "of limit", AtLeast(0.7)),
    target("checkpoint", &["4 load hsdp"], "times torch", AtLeast(4.0)),
    target("checkpoint", &["4 load rows as columns"], "read", AtMost(1.05)),
    target("checkpoint", &["4 load rows as columns"], "times torch", AtLeast(8.0)),
    target("checkpoint", &["load hsdp of 4 as fsdp of 2"], "of limit", AtLeast(0.65)),
    target("checkpoint", &["load hsdp of 4 as fsdp of 2"], "times torch", AtLeast(2.5)),
    target("cli", &["verify"], "of reads", AtLeast(0.7)),
    target("cli", &["convert"], "of copies", AtLeast(0.7)),
    target("cli", &[], "peak memory", AtMost(64.0 * 1024.0 * 1024.0)),
    target("cli", &["inspect"], "sconce", AtMost(1.0)),
    target("plan", &["global"], "seconds", AtMost(2.0)),
    target("plan", &["manifest"], "size", AtMost(100e6)),
    target("plan", &["read"], "seconds", AtMost(0.5)),
    target("plan", &["global"], "times torch", AtLeast(20.0)),
];

/// A line for each figure that misses its target, in the order of the tables.
pub(super) fn misses(tables: &[(&str, Table)]) -> Vec<String> {
    let mut misses = Vec::new();
    for (bench, table) in tables {
        for row in &table.rows {
            let about = Table::about(row);
            let of_row = TARGETS.iter().filter(|target| {
                target.bench == *bench && target.rows.iter().all(|word| about.contains(word))
            });
            misses.extend(of_row.filter_map(|target| {
                let cell = table.cell(row, target.column)?;
                let (missed, asked) = match target.bound {
                    AtLeast(n) => (cell.number()? < n, format!("at least {n}")),
                    AtMost(n) => (cell.number()? > n, format!("at most {n}")),
                };
                missed.then(|| {
                    format!("{bench}, {about}: {} {}, {asked} was asked for", target.column, shown(cell))
                })
            }));
        }
    }
    misses
}

fn shown(cell: &Cell) -> String {
    cell.number().map_or_else(|| "-".to_owned(), |n| format!("{n:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_misses_is_told() {
        let mut table = Table::new(["ranks", "op", "bytes", "times gloo", "of limit"]);
        let row = |op: &str, bytes, times, share| {
            vec![Cell::Count(4), Cell::Text(op.to_owned()), Cell::Bytes(bytes), Cell::Times(times), share]
        };
        let mib = f64::from(1 << 20);
        table.rows = vec![
            row("all_reduce", 4096.0, 21.0, Cell::None),
            row("all_to_all", 64.0 * mib, 2.9, Cell::Share(0.7)),
            row("all_gather", 64.0 * mib, 6.5, Cell::Share(0.59)),
        ];
        assert_eq!(
            misses(&[("collectives", table)]),
            [
                "collectives, 4 all_to_all 64 MiB: times gloo 2.90, at least 3 was asked for",
                "collectives, 4 all_gather 64 MiB: of limit 0.59, at least 0.6 was asked for",
            ]
        );
    }
}
