//! `cargo xtask bench fsdp`: passes and steps of sharded models beside plain candle's and torch FSDP's on gloo.

use std::collections::BTreeMap;
use std::process::Command;

use super::USAGE;
use crate::root;

/// What one program measured: `(ranks, model, what)` → seconds.
type Figures = BTreeMap<(usize, String, String), f64>;

/// glibc returns the top of its heap to the system whenever 128 KiB of it are free, and maps larger buffers one by one, so
/// that a step pays a page fault for every 4 KiB of its temporaries. With these settings all programs keep what they have.
const KEEP_MEMORY: [(&str, &str); 2] =
    [("MALLOC_TRIM_THRESHOLD_", "4294967296"), ("MALLOC_MMAP_THRESHOLD_", "1073741824")];

/// Measures ours, and torch's if `--torch PYTHON` names an interpreter.
pub(super) fn run(arguments: &[String]) -> Result<(), String> {
    let torch = match arguments {
        [] => None,
        [option, python] if option == "--torch" => Some(python),
        _ => return Err(USAGE.to_owned()),
    };
    let mut ours = Command::new(env!("CARGO"));
    ours.args(["bench", "-q", "-p", "sconce-fsdp", "--bench", "step"]);
    let ours = figures(ours)?;
    let torch = torch.map(|python| {
        let mut command = Command::new(python);
        command.arg("xtask/peers/fsdp.py");
        figures(command)
    });
    print(&ours, &torch.transpose()?.unwrap_or_default());
    Ok(())
}

fn figures(mut command: Command) -> Result<Figures, String> {
    let what = format!("{command:?}");
    let output =
        command.envs(KEEP_MEMORY).current_dir(root()).output().map_err(|e| format!("{what}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{what}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// The lines that are figures; programs may print others.
fn parse(text: &str) -> Figures {
    let line = |line: &str| {
        let [ranks, model, what, seconds] = line.split('\t').collect::<Vec<_>>().try_into().ok()?;
        Some(((ranks.parse().ok()?, model.to_owned(), what.to_owned()), seconds.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

fn print(ours: &Figures, torch: &Figures) {
    println!(
        "{:>5}  {:<12} {:<18} {:>11} {:>14} {:>11} {:>14}",
        "ranks", "model", "what", "sconce", "of plain", "torch", "of torch"
    );
    for ((ranks, model, what), seconds) in ours {
        let kind = what.rsplit(' ').next().unwrap_or(what);
        let beside = |figures: &Figures, what: String| figures.get(&(*ranks, model.clone(), what)).copied();
        let share =
            |other: Option<f64>| other.map_or("-".to_owned(), |other| format!("{:.3}", seconds / other));
        let torch = beside(torch, kind.to_owned());
        let time = |seconds: f64| format!("{:.2} ms", seconds * 1e3);
        println!(
            "{ranks:>5}  {model:<12} {what:<18} {:>11} {:>14} {:>11} {:>14}",
            time(*seconds),
            share(beside(ours, format!("plain {kind}"))),
            torch.map_or("-".to_owned(), time),
            share(torch)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_and_other_lines_left_out() {
        let figures = parse("hello\n2\tmlp\tplain step\t0.5\n2\tmlp\n");
        let expected = ((2, "mlp".to_owned(), "plain step".to_owned()), 0.5);
        assert_eq!(figures.into_iter().collect::<Vec<_>>(), [expected]);
    }
}
