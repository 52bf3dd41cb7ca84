//! `cargo xtask bench checkpoint`: ours beside torch's and beside what the machine can do at all, in one table.

use std::collections::BTreeMap;
use std::process::Command;

use super::USAGE;
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

/// Measures ours, and torch's if `arguments` name a Python that has it.
pub(super) fn run(arguments: &[String]) -> Result<(), String> {
    let python = match arguments {
        [] => None,
        [flag, python] if flag == "--torch" => Some(python),
        _ => return Err(USAGE.to_owned()),
    };
    let places = std::env::var("SCONCE_BENCH_PLACES")
        .unwrap_or_else(|_| format!("/dev/shm:{}", root().join("target").display()));
    let mut ours = Command::new(env!("CARGO"));
    ours.args("bench -q -p sconce-checkpoint --no-default-features --bench checkpoint".split(' '));
    let ours = figures(ours, &places)?;
    let torch = python.map(|python| {
        let mut command = Command::new(python);
        command.arg("xtask/peers/checkpoint.py");
        figures(command, &places)
    });
    print(&ours, &torch.transpose()?.unwrap_or_default());
    Ok(())
}

fn figures(mut command: Command, places: &str) -> Result<Figures, String> {
    let what = format!("{command:?}");
    command.env("SCONCE_BENCH_PLACES", places).current_dir(root());
    let output = command.output().map_err(|e| format!("{what}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{what}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
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

fn print(ours: &Figures, torch: &Figures) {
    let heads = ["GiB/s", "of limit", "read", "torch", "times", "read"];
    let heads: String = heads.map(|head| format!(" {head:>8}")).concat();
    println!("{:<6} {:>5}  {:<32}{heads}", "place", "ranks", "what");
    for (key @ (place, ranks, what), figure) in ours {
        let limit = match what.split(' ').next() {
            Some("save") => Some("limit write"),
            Some("load") => Some("limit read"),
            Some("staging") => Some("limit memcpy"),
            _ => None,
        };
        let limit = limit.and_then(|limit| ours.get(&(place.clone(), *ranks, limit.to_owned())));
        let of_limit = limit.map(|limit| format!("{:.2}", limit.seconds / figure.seconds));
        let read =
            |figure: &Figure| (figure.read > 0.0).then(|| format!("{:.2}", figure.read / figure.bytes));
        let peer = torch.get(key);
        let cells = [
            Some(rate(figure)),
            of_limit,
            read(figure),
            peer.map(rate),
            peer.map(|peer| format!("{:.1}", peer.seconds / figure.seconds)),
            peer.and_then(read),
        ];
        let cells: String = cells.map(|cell| format!(" {:>8}", cell.as_deref().unwrap_or("-"))).concat();
        println!("{place:<6} {ranks:>5}  {what:<32}{cells}");
    }
}

fn rate(figure: &Figure) -> String {
    format!("{:.2}", figure.bytes / figure.seconds / f64::from(1 << 30))
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
