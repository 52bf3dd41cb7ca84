//! `cargo xtask bench collectives`: ours beside gloo, ferrotorch and the machine's memcpy, in one table.

use std::collections::BTreeMap;
use std::process::Command;

use super::table::{Cell, Table};
use super::{Options, cargo_bench, output};

/// What one program measured: `(ranks, op, bytes)` → figures.
pub(super) type Figures = BTreeMap<(usize, String, usize), Figure>;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Figure {
    seconds: f64,
    /// Seconds that the copies of the algorithm take at the speed of memcpy.
    limit: Option<f64>,
}

pub(super) fn measure(options: &Options) -> Result<Table, String> {
    let mesh = "-p sconce-mesh --no-default-features --features tcp-store --bench collectives";
    let ours = parse(&output(cargo_bench(mesh))?);
    let mut peers = Vec::new();
    if let Some(gloo) = options.torch_peer("gloo.py") {
        peers.push(("gloo", parse(&output(gloo)?)));
    }
    if options.ferrotorch {
        peers.push(("ferrotorch", parse(&output(ferrotorch())?)));
    }
    Ok(table(&ours, &peers))
}

fn ferrotorch() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "-q", "--release", "--manifest-path", "xtask/peers/ferrotorch/Cargo.toml"]);
    command
}

/// The lines that are figures; programs may print others.
pub(super) fn parse(text: &str) -> Figures {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
        let key = (fields.first()?.parse().ok()?, (*fields.get(1)?).to_owned(), fields.get(2)?.parse().ok()?);
        let limit = number(4).zip(number(5)).map(|(copied, bandwidth)| copied / bandwidth);
        Some((key, Figure { seconds: number(3)?, limit }))
    };
    text.lines().filter_map(line).collect()
}

/// Ours beside the limit and beside each peer.
pub(super) fn table(ours: &Figures, peers: &[(&str, Figures)]) -> Table {
    let beside = peers.iter().flat_map(|(name, _)| [(*name).to_owned(), format!("times {name}")]);
    let columns = ["ranks", "op", "bytes", "sconce", "of limit"].map(str::to_owned);
    let mut table = Table::new(columns.into_iter().chain(beside));
    for (key @ (ranks, op, bytes), figure) in ours {
        let of_limit = figure.limit.map_or(Cell::None, |limit| Cell::Share(limit / figure.seconds));
        let mut row = vec![Cell::Count(*ranks), Cell::Text(op.clone()), Cell::Bytes(*bytes as f64)];
        row.extend([Cell::Seconds(figure.seconds), of_limit]);
        for (_, figures) in peers {
            row.extend(figures.get(key).map_or([Cell::None, Cell::None], |peer| {
                [Cell::Seconds(peer.seconds), Cell::Times(peer.seconds / figure.seconds)]
            }));
        }
        table.rows.push(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_and_other_lines_left_out() {
        let figures = parse("hello\n4\tall_reduce\t4096\t0.5\n2\tbroadcast\t64\t0.5\t100\t400\n");
        let key = |ranks, op: &str, bytes| (ranks, op.to_owned(), bytes);
        assert_eq!(figures.len(), 2);
        assert_eq!(figures[&key(4, "all_reduce", 4096)], Figure { seconds: 0.5, limit: None });
        assert_eq!(figures[&key(2, "broadcast", 64)], Figure { seconds: 0.5, limit: Some(0.25) });
    }

    #[test]
    fn a_peer_that_did_not_measure_a_case_leaves_it_empty() {
        let ours = parse("2\tall_reduce\t4096\t0.5\n2\tbroadcast\t64\t0.5\t100\t400\n");
        let table = table(&ours, &[("gloo", parse("2\tbroadcast\t64\t2\n"))]);
        assert_eq!(table.columns[5..], ["gloo", "times gloo"]);
        assert_eq!(table.rows[0][4..], [Cell::None, Cell::None, Cell::None]);
        assert_eq!(table.rows[1][4..], [Cell::Share(0.5), Cell::Seconds(2.0), Cell::Times(4.0)]);
    }
}
