//! What the machine has: driver and devices as the driver's own tool says them, and what a program of ours sees of them.

use std::fmt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::finished;

/// A machine with devices.
pub(super) struct Machine {
    driver: String,
    pub(super) devices: usize,
    pub(super) nccl: u32,
}

impl Machine {
    /// Name and driver version of each device, a line each.
    pub(super) fn driver() -> Result<String, String> {
        let mut command = Command::new("nvidia-smi");
        command.args(["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]);
        let output =
            command.output().map_err(|e| format!("nvidia-smi: {e}: there is no NVIDIA driver here"))?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match output.status.success() && !text.is_empty() {
            true => Ok(text),
            false => Err(format!("nvidia-smi sees no device: {text}")),
        }
    }

    /// Asks the driver's tool, and `binary`, which is linked as the cases are.
    pub(super) fn look(binary: &Path) -> Result<Machine, String> {
        let driver = Self::driver()?;
        let mut command = Command::new(binary);
        command.args(["versions_are_told", "--ignored", "--nocapture", "--color=never"]);
        let output = finished(command, Duration::from_secs(120))?;
        let (devices, nccl) = told(&output).ok_or_else(|| {
            format!("the test binary does not start; docs/GPU.md names its libraries:\n{output}")
        })?;
        if devices == 0 {
            return Err("the driver gives this process no device".to_owned());
        }
        Ok(Machine { driver, devices, nccl })
    }
}

/// Devices and NCCL's version out of `sconce-gpu: 2 devices, NCCL 23007`.
fn told(output: &str) -> Option<(usize, u32)> {
    let (_, said) = output.split_once("sconce-gpu: ")?;
    let (devices, rest) = said.split_once(" devices, NCCL ")?;
    let nccl: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((devices.parse().ok()?, nccl.parse().ok()?))
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, rest) = (self.nccl / 10_000, self.nccl % 10_000);
        write!(f, "{} devices, NCCL {major}.{}.{}\n{}", self.devices, rest / 100, rest % 100, self.driver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_binary_tells_is_read() {
        assert_eq!(told("running 1 test\nsconce-gpu: 2 devices, NCCL 23007\ntest …"), Some((2, 23_007)));
        assert_eq!(told("error while loading shared libraries: libnccl.so.2"), None);
        let machine = Machine { driver: "H100".to_owned(), devices: 1, nccl: 22_809 };
        assert_eq!(machine.to_string(), "1 devices, NCCL 2.28.9\nH100");
    }
}
