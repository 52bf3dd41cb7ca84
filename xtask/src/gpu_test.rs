//! `cargo xtask gpu-test`: the cases of CUDA tensors, on rank processes over the devices that there are. It fails where it
//! cannot run them, and if it ran none.
//!
//! `--archive FILE` builds the cases on a machine without a device and packs them; `--from-archive FILE` runs them on one
//! that has no Rust.

mod archive;
mod layout;
mod machine;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::root;
use layout::{Layout, STAGED, layouts};
use machine::Machine;

const USAGE: &str = "usage: cargo xtask gpu-test [--archive FILE | --from-archive FILE]";

/// The test binaries with cases of CUDA tensors, all of `sconce-testkit`. The first tells what it sees.
const BINARIES: [&str; 4] = ["gpu", "conformance", "devices", "hsdp_checkpoint"];

/// Of one binary. The first use of a kernel compiles it.
const LIMIT: Duration = Duration::from_secs(900);

/// Runs what the arguments say.
pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => run_cases(&built()?),
        ["--archive", file] => archive::make(Path::new(file)),
        ["--from-archive", file] => run_cases(&archive::unpacked(Path::new(file))?),
        _ => Err(USAGE.to_owned()),
    }
}

/// Where the binaries of [`BINARIES`] lie, in that order.
type Binaries = Vec<PathBuf>;

fn built() -> Result<Binaries, String> {
    machine::Machine::driver()?;
    let mut command = Command::new(env!("CARGO"));
    command.args(["test", "-p", "sconce-testkit", "--features", "nccl", "--no-run"]);
    command.args(BINARIES.iter().flat_map(|name| ["--test", name]));
    command.arg("--message-format=json-render-diagnostics");
    let output = command.current_dir(root()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|e| format!("cargo test --no-run: {e}"))?;
    if !output.status.success() {
        return Err("the cases do not build; docs/GPU.md says what building them needs".to_owned());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.lines().filter_map(|line| line.split("\"executable\":\"").nth(1));
    let found: Vec<PathBuf> = found.filter_map(|rest| rest.split('"').next()).map(PathBuf::from).collect();
    BINARIES.iter().map(|name| named(&found, name)).collect()
}

/// The binary of this name among those with a hash behind it.
fn named(found: &[PathBuf], name: &str) -> Result<PathBuf, String> {
    let is_it = |path: &&PathBuf| {
        let stem = path.file_name().and_then(|file| file.to_str()).and_then(|file| file.rsplit_once('-'));
        stem.is_some_and(|(stem, _)| stem == name)
    };
    found.iter().find(is_it).cloned().ok_or_else(|| format!("no test binary {name:?} among {found:?}"))
}

/// Runs the cases in the best layout over NCCL that this machine has, and then staged through host memory.
fn run_cases(binaries: &Binaries) -> Result<(), String> {
    let machine = Machine::look(&binaries[0])?;
    println!("==> {machine}");
    let mut n_passed = 0;
    for layout in layouts(machine.devices, machine.nccl) {
        match run_layout(binaries, &layout) {
            Ok(n) => {
                n_passed = n;
                break;
            }
            Err(error) if layout.is_experiment => {
                println!("\n!!! LEFT OUT: {layout}, an experiment of NCCL's that failed here: {error}");
            }
            Err(error) => return Err(format!("{layout}: {error}")),
        }
    }
    let staged = run_layout(binaries, &STAGED).map_err(|error| format!("{STAGED}: {error}"))?;
    if n_passed == 0 || staged == 0 {
        return Err("no case ran".to_owned());
    }
    println!("\n==> gpu-test: {n_passed} cases over NCCL, {staged} staged through host memory");
    Ok(())
}

/// Runs all cases and returns how many passed.
fn run_layout(binaries: &Binaries, layout: &Layout) -> Result<usize, String> {
    println!("\n==> {layout}");
    let mut passed = 0;
    for binary in &binaries[1..] {
        let mut command = Command::new(binary);
        command.args(["on_cuda", "--ignored", "--test-threads=1", "--color=never"]).envs(layout.env());
        let output = finished(command, LIMIT)?;
        print!("{output}");
        passed += n_passed(&output).ok_or_else(|| format!("{} failed", binary.display()))?;
    }
    if passed == 0 { Err("no case ran".to_owned()) } else { Ok(passed) }
}

/// What a command printed once it ended, however it did.
fn finished(mut command: Command, limit: Duration) -> Result<String, String> {
    let log = std::env::temp_dir().join(format!("sconce-gpu-test-{}.log", std::process::id()));
    let failed = |e: std::io::Error| format!("{command:?}: {e}");
    let file = std::fs::File::create(&log).map_err(failed)?;
    let errors = file.try_clone().map_err(|e| format!("{}: {e}", log.display()))?;
    let child = command.stdin(Stdio::null()).stdout(file).stderr(errors).spawn();
    let mut child = child.map_err(|e| format!("{command:?}: {e}"))?;
    let started = Instant::now();
    let ended = loop {
        match child.try_wait().map_err(|e| format!("{command:?}: {e}"))? {
            Some(_) => break true,
            None if started.elapsed() > limit => break false,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    if !ended {
        // It may have ended by itself meanwhile.
        let _ended = child.kill().and_then(|()| child.wait());
    }
    let output = std::fs::read(&log).map_err(|e| format!("{}: {e}", log.display()))?;
    let _removed = std::fs::remove_file(&log);
    let output = String::from_utf8_lossy(&output).into_owned();
    if ended { Ok(output) } else { Err(format!("still ran after {limit:?}:\n{output}")) }
}

/// How many cases passed, if none failed.
fn n_passed(output: &str) -> Option<usize> {
    let (_, result) = output.split_once("test result: ok. ")?;
    result.split_once(" passed; 0 failed")?.0.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_that_failed_or_did_not_end_has_passed_nothing() {
        assert_eq!(n_passed("running 5 tests\n\ntest result: ok. 5 passed; 0 failed; 0 ignored"), Some(5));
        assert_eq!(n_passed("test result: ok. 0 passed; 0 failed; 4 ignored"), Some(0));
        assert_eq!(n_passed("test result: FAILED. 4 passed; 1 failed; 0 ignored"), None);
        assert_eq!(n_passed("running 5 tests\nerror while loading shared libraries"), None);
    }

    #[test]
    fn a_binary_is_found_by_its_name_before_the_hash() {
        let found = ["/t/deps/gpu-0a", "/t/deps/gpu-test-1b"].map(PathBuf::from);
        assert_eq!(named(&found, "gpu"), Ok(found[0].clone()));
        assert!(named(&found, "devices").is_err());
    }
}
