//! PyTorch loads what we wrote, and we load what it wrote of that. It installs nothing.

use std::process::Command;

use crate::root;

/// Runs the tests that need a PyTorch, with the one of `--torch PYTHON`.
pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let [flag, python] = arguments else {
        return Err("usage: cargo xtask interop --torch PYTHON".to_owned());
    };
    if flag != "--torch" {
        return Err(format!("{flag}: expected --torch PYTHON"));
    }
    let version =
        Command::new(python).args(["-c", "import torch, safetensors; print(torch.__version__)"]).output();
    let version = version.map_err(|e| format!("{python}: {e}"))?;
    if !version.status.success() {
        return Err(format!(
            "{python} has no torch and safetensors: {}",
            String::from_utf8_lossy(&version.stderr)
        ));
    }
    println!("torch {}", String::from_utf8_lossy(&version.stdout).trim());
    let test = "test -p sconce-checkpoint --no-default-features --features torch --test interop -- --ignored --nocapture";
    let mut command = Command::new(env!("CARGO"));
    command.args(test.split(' ')).env("SCONCE_TORCH_PYTHON", python).current_dir(root());
    let status = command.status().map_err(|e| format!("cargo {test}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("cargo {test}: {status}")) }
}
