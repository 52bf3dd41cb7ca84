//! `cargo xtask bench plan`: planning for 1,024 ranks, ours beside torch's.

use std::collections::BTreeMap;
use std::process::Command;

use super::USAGE;
use crate::root;

/// Measures ours, and torch's if `arguments` name a Python that has it.
pub(super) fn run(arguments: &[String]) -> Result<(), String> {
    let python = match arguments {
        [] => None,
        [flag, python] if flag == "--torch" => Some(python),
        _ => return Err(USAGE.to_owned()),
    };
    let mut ours = Command::new(env!("CARGO"));
    ours.args("bench -q -p sconce-checkpoint --no-default-features --bench plan".split(' '));
    let ours = figures(ours)?;
    let torch = python.map(|python| {
        let mut command = Command::new(python);
        command.arg("xtask/peers/plan.py");
        figures(command)
    });
    let torch: BTreeMap<String, (f64, f64)> = torch.transpose()?.unwrap_or_default().into_iter().collect();
    println!("{:<32} {:>8} {:>8} {:>9} {:>6} {:>9}", "what", "s", "MB", "torch s", "times", "torch MB");
    for (what, (seconds, bytes)) in ours {
        let peer = torch.get(&what);
        let cell = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        let times = peer.filter(|_| seconds > 0.0).map(|(theirs, _)| format!("{:.0}", theirs / seconds));
        let (theirs, their_mb) = (cell(peer.map(|p| p.0)), cell(peer.map(|p| p.1 / 1e6)));
        let times = times.unwrap_or_else(|| "-".to_owned());
        println!("{what:<32} {seconds:>8.2} {:>8.1} {theirs:>9} {times:>6} {their_mb:>9}", bytes / 1e6);
    }
    Ok(())
}

/// What was measured, and its (seconds, bytes).
type Figure = (String, (f64, f64));

fn figures(mut command: Command) -> Result<Vec<Figure>, String> {
    let what = format!("{command:?}");
    let output = command.current_dir(root()).output().map_err(|e| format!("{what}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{what}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Figure> {
    let fields: Vec<&str> = line.split('\t').collect();
    let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some(((*fields.first()?).to_owned(), (number(1)?, number(2)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_no_figures_are_left_out() {
        assert_eq!(parse("global plan\t0.5\t7"), Some(("global plan".to_owned(), (0.5, 7.0))));
        assert_eq!(parse("a warning"), None);
    }
}
