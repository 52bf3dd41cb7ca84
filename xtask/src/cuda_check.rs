//! Lints all CUDA code on a machine without a CUDA toolkit, GPU or driver: a stand-in for nvcc makes empty kernels, which
//! is all that type-checking asks for. Nothing that is built here can run.

use std::process::Command;
use std::time::Instant;

use crate::root;

/// Every crate that has CUDA code, and the feature sets under which it must lint clean.
const FEATURE_SETS: [&str; 3] = [
    "-p sconce-mesh -p sconce-testkit --all-targets --features cuda,nccl",
    "-p sconce-mesh -p sconce-dtensor -p sconce-fsdp -p sconce-checkpoint --features cuda,nccl",
    "-p sconce-mesh -p sconce-dtensor -p sconce-fsdp -p sconce-checkpoint --features cuda",
];

/// What runs here is build scripts and macros, which are not worth optimizing.
const UNOPTIMIZED: &str = "profile.dev.package.\"*\".opt-level=0";

/// Lints; stops at the first failure.
pub(crate) fn run() -> Result<(), String> {
    for set in FEATURE_SETS {
        let mut command = Command::new(env!("CARGO"));
        command
            .args(["--config", UNOPTIMIZED, "clippy"])
            .args(set.split_whitespace())
            .args(["--", "-D", "warnings"]);
        println!("\n==> cargo clippy {set}, with a stand-in for nvcc");
        let started = Instant::now();
        let status = command.current_dir(root()).envs(environment()?).status();
        let status = status.map_err(|e| format!("cargo clippy: {e}"))?;
        println!("==> {:.0} s", started.elapsed().as_secs_f64());
        if !status.success() {
            return Err(format!("cargo clippy {set}: {status}"));
        }
    }
    Ok(())
}

/// The toolkit is said to be 13.0 and the card an H100. A target folder of its own: the build of candle's kernels keeps
/// what it made, whichever nvcc made it.
fn environment() -> Result<[(&'static str, String); 4], String> {
    let absolute = |path: &str| {
        let path = root().canonicalize().map_err(|e| e.to_string())?.join(path);
        path.into_os_string().into_string().map_err(|path| format!("{path:?} is no UTF-8"))
    };
    Ok([
        ("NVCC", absolute("xtask/cuda/nvcc-stub")?),
        ("CUDARC_CUDA_VERSION", "13000".to_owned()),
        ("CUDA_COMPUTE_CAP", "90".to_owned()),
        ("CARGO_TARGET_DIR", absolute("target/cuda-stub")?),
    ])
}
