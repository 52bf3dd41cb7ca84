//! `cargo xtask bench redistribute`: ours beside torch's DTensor on gloo, in one run and one table.

use std::process::Command;

use super::USAGE;
use super::collectives::{figures, print};

/// Measures ours, and torch by the Python that `arguments` name.
pub(super) fn run(arguments: &[String]) -> Result<(), String> {
    let mut peers = Vec::new();
    match arguments {
        [] => {}
        [torch, python] if torch == "--torch" => {
            let mut command = Command::new(python);
            command.arg("xtask/peers/redistribute.py");
            peers.push(("torch", figures(command)?));
        }
        _ => return Err(USAGE.to_owned()),
    }
    let mut ours = Command::new(env!("CARGO"));
    ours.args("bench -q -p sconce-dtensor --bench redistribute".split(' '));
    print(&figures(ours)?, &peers);
    Ok(())
}
