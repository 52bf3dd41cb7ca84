//! `cargo xtask fixtures --torch PYTHON`: makes the files that torch wrote again, and shows where they differ from those
//! that are checked in. With `--write` it replaces them.
//!
//! A fixture that can be made again is a folder with a `generate.py`, which writes its files into the directory that it is
//! given. Checkpoints, folders of the name `checkpoint`, hold the identifier of their save and are never the same twice:
//! what they hold is compared, which lies beside them, and not their bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::root;

/// Folders whose files are not compared.
const CHECKPOINT: &str = "checkpoint";

const USAGE: &str = "usage: cargo xtask fixtures --torch PYTHON [--write]";

/// Makes all fixtures, and fails if one differs and is not to be replaced.
pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let (python, write) = match arguments {
        [torch, python] if torch == "--torch" => (python, false),
        [torch, python, write] if torch == "--torch" && write == "--write" => (python, true),
        _ => return Err(USAGE.to_owned()),
    };
    let mut differing = Vec::new();
    for fixture in with_generator(&root().join("crates/testkit/fixtures/torch"))? {
        let name = fixture.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let made = root().join("target/fixtures").join(&name);
        make(python, &fixture, &made)?;
        let files = differences(&fixture, &made)?;
        println!("{name}: {}", if files.is_empty() { "as checked in".to_owned() } else { files.join(", ") });
        for file in &files {
            show(&fixture.join(file), &made.join(file));
        }
        if write {
            copy_all(&made, &fixture)?;
        }
        differing.extend(files.into_iter().map(|file| format!("{name}/{file}")));
    }
    if differing.is_empty() || write { Ok(()) } else { Err(format!("differ: {}", differing.join(", "))) }
}

fn with_generator(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut fixtures: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| p.join("generate.py").exists())
        .collect();
    fixtures.sort();
    Ok(fixtures)
}

fn make(python: &str, fixture: &Path, made: &Path) -> Result<(), String> {
    if made.exists() {
        fs::remove_dir_all(made).map_err(|e| format!("{}: {e}", made.display()))?;
    }
    fs::create_dir_all(made).map_err(|e| format!("{}: {e}", made.display()))?;
    let output = Command::new(python).arg(fixture.join("generate.py")).arg(made).output();
    let output = output.map_err(|e| format!("{python}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{}: {}\n{errors}", fixture.join("generate.py").display(), output.status))
}

/// Names of the made files, below both folders, that differ from the checked-in ones, or that are new.
fn differences(fixture: &Path, made: &Path) -> Result<Vec<String>, String> {
    let mut differing = Vec::new();
    for entry in fs::read_dir(made).map_err(|e| format!("{}: {e}", made.display()))? {
        let path = entry.map_err(|e| e.to_string())?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == CHECKPOINT {
            continue;
        }
        if path.is_dir() {
            let below = differences(&fixture.join(&name), &path)?;
            differing.extend(below.into_iter().map(|file| format!("{name}/{file}")));
            continue;
        }
        let new = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        // One that is not checked in yet differs as well.
        if fs::read(fixture.join(&name)).ok() != Some(new) {
            differing.push(name);
        }
    }
    differing.sort();
    Ok(differing)
}

fn copy_all(from: &Path, to: &Path) -> Result<(), String> {
    fs::create_dir_all(to).map_err(|e| format!("{}: {e}", to.display()))?;
    for entry in fs::read_dir(from).map_err(|e| format!("{}: {e}", from.display()))? {
        let entry = entry.map_err(|e| format!("{}: {e}", from.display()))?;
        let (old, new) = (entry.path(), to.join(entry.file_name()));
        if old.is_dir() {
            copy_all(&old, &new)?;
        } else {
            fs::copy(&old, &new).map_err(|e| format!("{}: {e}", new.display()))?;
        }
    }
    Ok(())
}

/// Prints the first lines that differ.
fn show(old: &Path, new: &Path) {
    let arguments = ["diff", "--no-index", "--stat", "--unified=0", "-p"];
    if let Ok(output) = Command::new("git").args(arguments).arg(old).arg(new).output() {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in text.lines().take(12) {
            println!("  {}", line.chars().take(160).collect::<String>());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_and_new_files_are_named() {
        let dir = std::env::temp_dir().join(format!("xtask-fixtures-{}", std::process::id()));
        let (old, new) = (dir.join("old"), dir.join("new"));
        for (at, name, text) in [
            (&old, "same", "1"),
            (&old, "changed", "1"),
            (&new, "same", "1"),
            (&new, "changed", "2"),
            (&new, "added", ""),
            (&old, "folder/same", "1"),
            (&new, "folder/same", "1"),
            (&new, "folder/added", "1"),
            (&old, "case/checkpoint/.metadata", "1"),
            (&new, "case/checkpoint/.metadata", "2"),
        ] {
            fs::create_dir_all(at.join(name).parent().unwrap()).unwrap();
            fs::write(at.join(name), text).unwrap();
        }
        assert_eq!(differences(&old, &new).unwrap(), ["added", "changed", "folder/added"]);
        fs::remove_dir_all(dir).unwrap();
    }
}
