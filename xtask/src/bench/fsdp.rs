//! `cargo xtask bench fsdp`: passes and steps of sharded models beside plain candle's and torch FSDP's on gloo.

use std::collections::BTreeMap;
use std::process::Command;

use super::table::{Cell, Table};
use super::{Options, cargo_bench, output};

/// What one program measured: `(ranks, model, what)` → seconds.
type Figures = BTreeMap<(usize, String, String), f64>;

/// glibc returns the top of its heap to the system whenever 128 KiB of it are free, and maps larger buffers one by one, so
/// that a step pays a page fault for every 4 KiB of its temporaries. With these settings all programs keep what they have.
const KEEP_MEMORY: [(&str, &str); 2] =
    [("MALLOC_TRIM_THRESHOLD_", "4294967296"), ("MALLOC_MMAP_THRESHOLD_", "1073741824")];

pub(super) fn measure(options: &Options) -> Result<Table, String> {
    let ours = figures(cargo_bench("-p sconce-fsdp --bench step"))?;
    let torch = options.torch_peer("fsdp.py").map(figures).transpose()?;
    Ok(table(&ours, &torch.unwrap_or_default()))
}

fn figures(mut command: Command) -> Result<Figures, String> {
    command.envs(KEEP_MEMORY);
    Ok(parse(&output(command)?))
}

/// The lines that are figures; programs may print others.
fn parse(text: &str) -> Figures {
    let line = |line: &str| {
        let [ranks, model, what, seconds] = line.split('\t').collect::<Vec<_>>().try_into().ok()?;
        Some(((ranks.parse().ok()?, model.to_owned(), what.to_owned()), seconds.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// What a figure is a part of: plain candle's, and of a unit of many parameters that of one.
fn plain(what: &str, kind: &str) -> String {
    let lead = if what.contains("parameters") { "1 parameter" } else { "plain" };
    format!("{lead} {kind}")
}

/// Torch's figure of a kind (`passes`, `step`) stands beside all of ours of that kind.
fn table(ours: &Figures, torch: &Figures) -> Table {
    let mut table = Table::new(["ranks", "model", "what", "sconce", "of plain", "torch", "of torch"]);
    for ((ranks, model, what), seconds) in ours {
        let kind = what.rsplit(' ').next().unwrap_or(what);
        let beside =
            |figures: &Figures, what: &str| figures.get(&(*ranks, model.clone(), what.to_owned())).copied();
        let share = |other: Option<f64>| other.map_or(Cell::None, |other| Cell::Times(seconds / other));
        let torch = beside(torch, kind);
        table.rows.push(vec![
            Cell::Count(*ranks),
            Cell::Text(model.clone()),
            Cell::Text(what.clone()),
            Cell::Seconds(*seconds),
            share(beside(ours, &plain(what, kind))),
            torch.map_or(Cell::None, Cell::Seconds),
            share(torch),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_parameters_are_compared_with_one_and_all_else_with_plain_candle() {
        assert_eq!(plain("400 parameters step", "step"), "1 parameter step");
        assert_eq!(plain("unmodified passes", "passes"), "plain passes");
    }

    #[test]
    fn figures_are_read_and_other_lines_left_out() {
        let figures = parse("hello\n2\tmlp\tplain step\t0.5\n2\tmlp\n");
        let expected = ((2, "mlp".to_owned(), "plain step".to_owned()), 0.5);
        assert_eq!(figures.into_iter().collect::<Vec<_>>(), [expected]);
    }
}
