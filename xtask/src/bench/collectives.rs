//! `cargo xtask bench collectives`: ours beside gloo, ferrotorch and the machine's memcpy, in one table.

use std::collections::BTreeMap;
use std::process::Command;

use super::{USAGE, mesh_bench};
use crate::root;

/// What one program measured: `(ranks, op, bytes)` → figures.
pub(super) type Figures = BTreeMap<(usize, String, usize), Figure>;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Figure {
    seconds: f64,
    /// Seconds that the copies of the algorithm take at the speed of memcpy.
    limit: Option<f64>,
}

/// Measures ours and the peers that `arguments` name.
pub(super) fn run(arguments: &[String]) -> Result<(), String> {
    let mut peers = Vec::new();
    let mut rest = arguments.iter().map(String::as_str);
    while let Some(argument) = rest.next() {
        match argument {
            "--torch" => peers.push(("gloo", gloo(rest.next().ok_or(USAGE)?))),
            "--ferrotorch" => peers.push(("ferrotorch", ferrotorch())),
            _ => return Err(USAGE.to_owned()),
        }
    }
    let ours = figures(mesh_bench("collectives"))?;
    let peers: Result<Vec<_>, String> =
        peers.into_iter().map(|(name, command)| Ok((name, figures(command)?))).collect();
    print(&ours, &peers?);
    Ok(())
}

fn gloo(python: &str) -> Command {
    let mut command = Command::new(python);
    command.arg("xtask/peers/gloo.py");
    command
}

fn ferrotorch() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "-q", "--release", "--manifest-path", "xtask/peers/ferrotorch/Cargo.toml"]);
    command
}

pub(super) fn figures(mut command: Command) -> Result<Figures, String> {
    let what = format!("{command:?}");
    let output = command.current_dir(root()).output().map_err(|e| format!("{what}: {e}"))?;
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
        let key = (fields.first()?.parse().ok()?, (*fields.get(1)?).to_owned(), fields.get(2)?.parse().ok()?);
        let limit = number(4).zip(number(5)).map(|(copied, bandwidth)| copied / bandwidth);
        Some((key, Figure { seconds: number(3)?, limit }))
    };
    text.lines().filter_map(line).collect()
}

pub(super) fn print(ours: &Figures, peers: &[(&str, Figures)]) {
    let names: String = peers.iter().map(|(name, _)| format!("{name:>12} {:>7}", "times")).collect();
    println!("{:>5}  {:<14} {:>9} {:>11} {:>9}{names}", "ranks", "op", "bytes", "sconce", "of limit");
    for ((ranks, op, bytes), figure) in ours {
        let of_limit =
            figure.limit.map_or("-".to_owned(), |l| format!("{:.0} %", 100.0 * l / figure.seconds));
        let beside = |(_, figures): &(&str, Figures)| {
            figures.get(&(*ranks, op.clone(), *bytes)).map_or(format!("{:>12} {:>7}", "-", "-"), |peer| {
                format!("{:>12} {:>7.1}", time(peer.seconds), peer.seconds / figure.seconds)
            })
        };
        let peers: String = peers.iter().map(beside).collect();
        println!("{ranks:>5}  {op:<14} {bytes:>9} {:>11} {of_limit:>9}{peers}", time(figure.seconds));
    }
}

fn time(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.1} us", seconds * 1e6) } else { format!("{:.2} ms", seconds * 1e3) }
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
}
