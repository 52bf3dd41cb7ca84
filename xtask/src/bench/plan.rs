//! `cargo xtask bench plan`: planning for 1,024 ranks, ours beside torch's.

use std::collections::BTreeMap;

use super::table::{Cell, Table};
use super::{Options, cargo_bench, output};

pub(super) fn measure(options: &Options) -> Result<Table, String> {
    let ours = parse(&output(cargo_bench("-p sconce-checkpoint --no-default-features --bench plan"))?);
    let torch = options.torch_peer("plan.py").map(output).transpose()?;
    let torch: BTreeMap<_, _> = parse(&torch.unwrap_or_default()).into_iter().collect();
    let mut table = Table::new(["what", "seconds", "size", "torch", "times torch", "torch's size"]);
    let cell =
        |number: Option<f64>, kind: fn(f64) -> Cell| number.filter(|n| *n > 0.0).map_or(Cell::None, kind);
    for (what, (seconds, bytes)) in ours {
        let peer = torch.get(&what);
        table.rows.push(vec![
            Cell::Text(what.clone()),
            cell(Some(seconds), Cell::Seconds),
            cell(Some(bytes), Cell::Bytes),
            cell(peer.map(|peer| peer.0), Cell::Seconds),
            cell(peer.filter(|_| seconds > 0.0).map(|peer| peer.0 / seconds), Cell::Times),
            cell(peer.map(|peer| peer.1), Cell::Bytes),
        ]);
    }
    Ok(table)
}

/// What was measured, and its (seconds, bytes).
type Figure = (String, (f64, f64));

/// The lines that are figures; programs may print others.
fn parse(text: &str) -> Vec<Figure> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
        Some(((*fields.first()?).to_owned(), (number(1)?, number(2)?)))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_no_figures_are_left_out() {
        assert_eq!(parse("a warning\nglobal plan\t0.5\t7"), [("global plan".to_owned(), (0.5, 7.0))]);
    }
}
