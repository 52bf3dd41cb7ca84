//! Crashes: saving processes are killed at every system call that touches the directory, and a disk forgets what was not
//! synced. Whatever happens, the old or the new checkpoint loads: never an error, never a mix.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod disk;
mod forgets;
mod killed;
mod ptrace;
mod recorder;
mod scenario;
mod syscall;
mod tracer;
