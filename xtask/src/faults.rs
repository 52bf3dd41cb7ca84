//! `cargo xtask faults`: every cell of the fault matrix, of which `cargo test` runs a sample.

use std::process::Command;

use crate::root;

/// Runs the matrix; `arguments` may be one cell, as a failure prints it.
pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let (name, value) = match arguments {
        [] => ("SCONCE_FAULT_CELLS", "all"),
        [cell] => ("SCONCE_FAULT_CELL", cell.as_str()),
        _ => return Err("usage: cargo xtask faults [CELL]".to_owned()),
    };
    let mut command = Command::new(env!("CARGO"));
    command.args("test -q --workspace --test fault_matrix -- --nocapture".split(' '));
    let status =
        command.env(name, value).current_dir(root()).status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(status.to_string()) }
}
