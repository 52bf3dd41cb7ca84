//! All of CI, in order: the cheap and telling first.

use std::process::Command;
use std::time::Instant;

use crate::{cuda_check, demo, mpi_test, root, s3_test, soak, surface, tidy};

/// Feature sets that must build and lint clean: the default, none, and each alone.
const FEATURE_SETS: &[&str] = &[
    "--workspace --all-targets",
    "-p sconce-mesh --all-targets --no-default-features",
    "-p sconce-mesh --all-targets --no-default-features --features tcp-store",
    "-p sconce-mesh --all-targets --no-default-features --features launcher",
    "-p sconce-mesh --all-targets --no-default-features --features candle",
    "-p sconce-mesh --all-targets --no-default-features --features tcp-store,test-faults",
    "-p sconce-mesh --all-targets --no-default-features --features tracing",
    "-p sconce-dtensor --no-default-features",
    "-p sconce-dtensor --no-default-features --features candle",
    "-p sconce-checkpoint --all-targets --no-default-features",
    "-p sconce-checkpoint --all-targets --no-default-features --features mmap",
    "-p sconce-checkpoint --all-targets --no-default-features --features preemption",
    "-p sconce-checkpoint --no-default-features --features candle",
    "-p sconce-checkpoint --all-targets --no-default-features --features torch",
    "-p sconce-checkpoint --all-targets --no-default-features --features cli",
    "-p sconce-checkpoint --all-targets --no-default-features --features object-store",
    "-p sconce-fsdp --all-targets",
    "-p sconce-fsdp --all-targets --features tracing",
];

/// Those that need an MPI and libclang.
const MPI_FEATURE_SETS: [&str; 2] = [
    "-p sconce-mesh --all-targets --no-default-features --features mpi",
    "-p sconce-testkit --all-targets --features mpi",
];

/// Runs everything; stops at the first failure.
pub(crate) fn run() -> Result<(), String> {
    cargo("fmt --all --check", &[])?;
    tidy::run()?;
    surface::run()?;
    let has_mpi = mpi_test::has_mpi();
    let mpi_sets = if has_mpi { &MPI_FEATURE_SETS[..] } else { &[] };
    for set in FEATURE_SETS.iter().chain(mpi_sets) {
        cargo(&format!("clippy {set} -- -D warnings"), &[])?;
    }
    cuda_check::run()?;
    cargo("doc --workspace --no-deps", &[("RUSTDOCFLAGS", "-D warnings")])?;
    let readme = std::fs::read_to_string(root().join("README.md")).map_err(|e| format!("README.md: {e}"))?;
    let [main_job, tests] = readme_commands(&readme)?;
    shell(&tests)?;
    // What the workspace's features hide: crates without candle, signals, sconce-ckpt, and the launcher.
    cargo("test -p sconce-checkpoint --no-default-features --features preemption,cli", &[])?;
    cargo("test -p sconce-checkpoint --no-default-features --features object-store", &[])?;
    match s3_test::installed() {
        Ok(server) => s3_test::run_with(&server)?,
        Err(error) => {
            println!("\n!!! LEFT OUT: a server that speaks S3, which could not be installed: {error}")
        }
    }
    // Full and read-only disks are small file systems that the tests mount.
    let mount =
        "id -u | grep -qx 0 || { echo '!!! LEFT OUT: full and read-only disks, which need root'; exit 0; }";
    shell(&format!("{mount}; cargo test --workspace --test every_byte disk -- --ignored"))?;
    cargo("test -p sconce-mesh --no-default-features --features launcher", &[])?;
    shell(&format!("{main_job} -- --steps 6"))?;
    // Without `-p`: what the tests have built has the features of the whole workspace.
    cargo("run -q --example tensor_parallel", &[])?;
    // Trainers that take the checkpoints alone, with and without a tensor library.
    cargo("run -q --example plain_trainer", &[])?;
    cargo("run -q -p sconce-checkpoint --no-default-features --example raw_bytes", &[])?;
    // What others wrote: a model to fine-tune, a checkpoint of PyTorch's.
    cargo("run -q --example finetune", &[])?;
    cargo(
        "run -q --features sconce-checkpoint/torch --example load_torch -- \
         crates/testkit/fixtures/torch/dcp/hsdp_even/checkpoint",
        &[],
    )?;
    demo::run(&["elastic".to_owned()])?;
    cargo("test -p sconce-mesh --no-default-features --features tracing --lib span", &[])?;
    soak::run(&["--minutes", "0.2"].map(str::to_owned))?;
    if has_mpi {
        return mpi_test::run();
    }
    println!("\n!!! LEFT OUT: feature `mpi`, neither built nor run: there is no `mpicc` here");
    Ok(())
}

/// The first two commands of the README's first shell block: the main job and the tests.
fn readme_commands(readme: &str) -> Result<[String; 2], String> {
    let block = readme.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next());
    let mut lines =
        block.unwrap_or_default().lines().map(str::trim).filter(|line| line.starts_with("cargo "));
    match (lines.next(), lines.next()) {
        (Some(main_job), Some(tests)) => Ok([main_job.to_owned(), tests.to_owned()]),
        _ => Err("README.md: its first ```sh block must hold the two commands".to_owned()),
    }
}

fn cargo(arguments: &str, env: &[(&str, &str)]) -> Result<(), String> {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments.split_whitespace()).envs(env.iter().copied());
    step(&format!("cargo {arguments}"), command)
}

fn shell(line: &str) -> Result<(), String> {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    step(line, command)
}

fn step(what: &str, mut command: Command) -> Result<(), String> {
    println!("\n==> {what}");
    let started = Instant::now();
    let status = command.current_dir(root()).status().map_err(|e| format!("{what}: {e}"))?;
    println!("==> {:.0} s", started.elapsed().as_secs_f64());
    if status.success() { Ok(()) } else { Err(format!("{what}: {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_holds_the_two_commands_as_design_names_them() {
        let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
        let expected = ["cargo run --release -p sconce-fsdp --example train_hsdp", "cargo test --workspace"];
        assert_eq!(readme_commands(&readme).unwrap(), expected);
    }
}
