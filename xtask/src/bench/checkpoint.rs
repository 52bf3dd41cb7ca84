//! `cargo xtask bench checkpoint`: ours beside torch's and beside what the machine can do at all, in one table.

use std::collections::BTreeMap;
use std::process::Command;

use super::table::{Cell, Table};
use super::{Options, cargo_bench, output};
use crate::root;

/// `(place, ranks, what)` → figures.
type Figures = BTreeMap<(String, usize, String), Figure>;

#[derive(Debug, Clone, Copy, PartialEq)]
struct Figure {
    bytes: f64,
    seconds: f64,
    /// Bytes read by all ranks.
    read: f64,
}

pub(super) fn measure(options: &Options) -> Result<Table, String> {
    let places = std::env::var("SCONCE_BENCH_PLACES")
        .unwrap_or_else(|_| format!("/dev/shm:{}", root().join("target").display()));
    let figures = |mut command: Command| {
        command.env("SCONCE_BENCH_PLACES", &places);
        Ok::<_, String>(parse(&output(command)?))
    };
    let ours = figures(cargo_bench("-p sconce-checkpoint --no-default-features --bench checkpoint"))?;
    let torch = options.torch_peer("checkpoint.py").map(figures).transpose()?;
    Ok(table(&ours, &torch.unwrap_or_default()))
}

/// The lines that are figures; programs may print others.
fn parse(text: &str) -> Figures {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
        let key = ((*fields.first()?).to_owned(), fields.get(1)?.parse().ok()?, (*fields.get(2)?).to_owned());
        Some((key, Figure { bytes: number(3)?, seconds: number(4)?, read: number(5)? }))
    };
    text.lines().filter_map(line).collect()
}

fn table(ours: &Figures, torch: &Figures) -> Table {
    let columns = [
        "place",
        "ranks",
        "what",
        "sconce",
        "rate",
        "of limit",
        "read",
        "torch",
        "times torch",
        "torch reads",
    ];
    let mut table = Table::new(columns);
    for (key @ (place, ranks, what), figure) in ours {
        let limit = match what.split(' ').next() {
            Some("save") => Some("limit write"),
            // Each rank is filled with what it holds, whoever else holds it.
            Some("load") if what == "load hsdp" => Some("limit read of replicas"),
            Some("load") => Some("limit read"),
            Some("staging") => Some("limit memcpy"),
            _ => None,
        };
        let limit = limit.and_then(|limit| ours.get(&(place.clone(), *ranks, limit.to_owned())));
        let read = |figure: &Figure| {
            if figure.read > 0.0 { Cell::Times(figure.read / figure.bytes) } else { Cell::None }
        };
        let peer = torch.get(key);
        table.rows.push(vec![
            Cell::Text(place.clone()),
            Cell::Count(*ranks),
            Cell::Text(what.clone()),
            Cell::Seconds(figure.seconds),
            Cell::Rate(figure.bytes / figure.seconds),
            limit.map_or(Cell::None, |limit| Cell::Share(limit.seconds / figure.seconds)),
            read(figure),
            peer.map_or(Cell::None, |peer| Cell::Rate(peer.bytes / peer.seconds)),
            peer.map_or(Cell::None, |peer| Cell::Times(peer.seconds / figure.seconds)),
            peer.map_or(Cell::None, read),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_and_other_lines_left_out() {
        let figures = parse("hello\ntmpfs\t4\tsave fsdp\t1024\t0.5\t0\ndisk\t2\tload fsdp\tmany\t0.5\t1\n");
        assert_eq!(figures.len(), 1);
        let key = ("tmpfs".to_owned(), 4, "save fsdp".to_owned());
        assert_eq!(figures[&key], Figure { bytes: 1024.0, seconds: 0.5, read: 0.0 });
    }
}
