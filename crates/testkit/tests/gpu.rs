//! What `cargo xtask gpu-test` asks before it runs the cases: what this process sees of NCCL and of the devices.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

#[test]
#[ignore = "needs a CUDA device: cargo xtask gpu-test"]
fn versions_are_told() {
    println!("sconce-gpu: {}", seen());
}

#[cfg(feature = "nccl")]
fn seen() -> String {
    let devices = sconce_mesh::cuda::device_count().expect("the driver counts devices");
    let nccl = sconce_mesh::cuda::nccl_version().expect("NCCL says its version");
    format!("{devices} devices, NCCL {nccl}")
}

#[cfg(not(feature = "nccl"))]
fn seen() -> String {
    panic!("this build has no NCCL: cargo xtask gpu-test")
}
