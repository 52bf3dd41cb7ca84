//! `cargo xtask bench report`: every benchmark in one run, as `docs/BENCHMARKS.md` with a chart each. What misses its
//! target comes first.

mod chart;
mod targets;

use std::fmt::Write as _;
use std::process::Command;

use super::table::Table;
use super::{Options, measure};
use crate::root;

/// The benchmarks, what each tells, and the column that its chart shows.
const GROUPS: [(&str, &str, &str); 8] = [
    (
        "collectives",
        "Collectives of one host beside gloo, and beside the copies that they cannot do without",
        "times gloo",
    ),
    ("overlap", "An asynchronous all_gather beside a matrix product", "hidden"),
    ("store", "10,000 clients at one store", "seconds"),
    ("redistribute", "DTensor::redistribute beside torch DTensor on gloo", "times torch"),
    ("fsdp", "Passes and steps beside plain candle and torch FSDP on gloo", "of torch"),
    (
        "checkpoint",
        "Saves and loads beside torch DCP, and beside raw writes, cached reads and memcpy",
        "times torch",
    ),
    ("cli", "sconce-ckpt on a large checkpoint beside plain reads and copies", "of reads"),
    ("plan", "Planning for 1,024 ranks beside torch's planner", "times torch"),
];

/// Runs everything and writes the report.
pub(super) fn run(options: &Options) -> Result<(), String> {
    let mut tables = Vec::new();
    for (name, _, _) in GROUPS {
        println!("==> {name}");
        let table = measure(name, options)?;
        print!("{}", table.text());
        tables.push((name, table));
    }
    let dir = root().join("docs/benchmarks");
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut body = String::new();
    for ((name, what, column), (_, table)) in GROUPS.iter().zip(&tables) {
        let _ = writeln!(body, "\n## {name}\n\n{what}.\n\n`cargo xtask bench {name}{}`\n", torch(options));
        if let Some(svg) = chart::bars(&format!("{name}: {column}"), table, column) {
            let file = dir.join(format!("{name}.svg"));
            std::fs::write(&file, svg).map_err(|e| format!("{}: {e}", file.display()))?;
            let _ = writeln!(body, "![{name}: {column}](benchmarks/{name}.svg)\n");
        }
        body += &table.markdown();
    }
    let report = root().join("docs/BENCHMARKS.md");
    std::fs::write(&report, head(options, &tables)? + &body)
        .map_err(|e| format!("{}: {e}", report.display()))?;
    println!("wrote {}", report.display());
    Ok(())
}

fn torch(options: &Options) -> &'static str {
    if options.torch.is_some() { " --torch PYTHON" } else { "" }
}

/// Misses, then the machine and the day.
fn head(options: &Options, tables: &[(&str, Table)]) -> Result<String, String> {
    let mut head = "# Benchmarks\n\n".to_owned();
    let misses = targets::misses(tables);
    if misses.is_empty() {
        head += "Every target that was measured is met.\n";
    } else {
        head += "Targets that are missed on this machine:\n\n";
        misses.iter().for_each(|miss| head += &format!("- {miss}\n"));
    }
    let (cpu, memory) = (proc("/proc/cpuinfo", "model name")?, proc("/proc/meminfo", "MemTotal")?);
    let n_cores = std::thread::available_parallelism().map_err(|e| e.to_string())?;
    let _ = writeln!(
        head,
        "\nMade by `cargo xtask bench report{}` on {} in one run: {n_cores} cores of {cpu}, {memory} of memory{}. Medians. \
         `times` means how many times the other's speed; `of` means the part of that time or limit. Other programs on \
         the machine, and other machines, give other figures: the ratios within a run are what to look at.",
        torch(options),
        said(Command::new("date").args(["-u", "+%Y-%m-%d"]))?,
        match &options.torch {
            Some(python) => format!(
                "; PyTorch {}",
                said(Command::new(python).args(["-c", "import torch; print(torch.__version__)"]))?
            ),
            None => String::new(),
        },
    );
    Ok(head)
}

/// The value of the first line of a file of `name : value` lines.
fn proc(path: &str, name: &str) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let line = text.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned());
    value.ok_or_else(|| format!("{path}: no {name}"))
}

fn said(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
