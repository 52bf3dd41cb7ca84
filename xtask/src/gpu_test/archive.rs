//! The cases in one file, by cargo-nextest, for machines with a device and without Rust; and out of it again.
//!
//! Running needs `tar`, `zstd` and the program `xtask`, which lies beside the archive's own build.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{BINARIES, Binaries, named};
use crate::root;

/// Builds and packs the cases, and lists them if they start here.
pub(super) fn make(file: &Path) -> Result<(), String> {
    has_compiler()?;
    let mut command = Command::new(env!("CARGO"));
    command.args(["nextest", "archive", "-p", "sconce-testkit", "--features", "nccl"]);
    command.args(BINARIES.iter().flat_map(|name| ["--test", name]));
    command.args(["--archive-format", "tar-zst", "--archive-file"]).arg(absolute(file)?);
    let status = command.current_dir(root()).status().map_err(|e| format!("cargo nextest: {e}"))?;
    if !status.success() {
        return Err("no archive; it takes cargo-nextest, and what docs/GPU.md says of building".to_owned());
    }
    for binary in unpacked(file)? {
        let output = Command::new(&binary).args(["on_cuda", "--ignored", "--list"]).output();
        let output = output.map_err(|e| format!("{}: {e}", binary.display()))?;
        print!("{}", String::from_utf8_lossy(&output.stdout));
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            println!("!!! NOT LISTED: {} does not start here: {}", binary.display(), why.trim());
        }
    }
    println!("==> {}: run it by `xtask gpu-test --from-archive {0}`", file.display());
    Ok(())
}

/// The binaries of an archive, in a folder beside it.
pub(super) fn unpacked(file: &Path) -> Result<Binaries, String> {
    let dir = file.with_extension("unpacked");
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut command = Command::new("tar");
    let status = command.arg("--zstd").arg("-xf").arg(file).arg("-C").arg(&dir).status();
    if !status.map_err(|e| format!("tar: {e}"))?.success() {
        return Err(format!("{}: tar cannot unpack it", file.display()));
    }
    let deps = dir.join("target/debug/deps");
    let entries = std::fs::read_dir(&deps).map_err(|e| format!("{}: {e}", deps.display()))?;
    let found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    BINARIES.iter().map(|name| named(&found, name)).collect()
}

/// Refuses to pack what the stand-in for nvcc built: it has no kernels.
fn has_compiler() -> Result<(), String> {
    let nvcc = std::env::var_os("NVCC").unwrap_or_else(|| "nvcc".into());
    let output = Command::new(&nvcc).arg("--version").output();
    let output = output.map_err(|e| format!("{}: {e}: building the cases needs an nvcc", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match output.status.success() && !text.contains("stub") {
        true => Ok(()),
        false => Err(format!("{}: not a real nvcc: {text}", nvcc.display())),
    }
}

fn absolute(file: &Path) -> Result<PathBuf, String> {
    std::path::absolute(file).map_err(|e| format!("{}: {e}", file.display()))
}
