//! Two hosts out of one: network namespaces joined by a cable, between which ranks have no memory in common.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{OPTIONS, logged, work_dir};

/// The cable's network, of those that nobody routes (RFC 1918).
const NETWORK: &str = "10.213.97.0/24";
const ADDRESSES: [&str; 2] = ["10.213.97.1", "10.213.97.2"];

pub(super) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Whether this user may make namespaces of networks and of host names.
pub(super) fn may_be_made() -> bool {
    let mut probe = Command::new("unshare");
    probe.args(["--net", "--uts", "true"]).stdout(Stdio::null()).stderr(Stdio::null());
    is_root() && probe.status().is_ok_and(|status| status.success())
}

/// The two hosts, until they are dropped.
pub(super) struct TwoHosts {
    names: [String; 2],
}

impl TwoHosts {
    pub(super) fn make() -> Result<TwoHosts, String> {
        let names = ["a", "b"].map(|host| format!("sc{}{host}", std::process::id()));
        let hosts = TwoHosts { names };
        let [a, b] = &hosts.names;
        ip(&["netns", "add", a])?;
        ip(&["netns", "add", b])?;
        ip(&["link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b])?;
        for (name, address) in hosts.names.iter().zip(ADDRESSES) {
            ip(&["-n", name, "addr", "add", &format!("{address}/24"), "dev", name])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
            ip(&["-n", name, "link", "set", name, "up"])?;
        }
        Ok(hosts)
    }

    /// `mpirun` on the first host, with as many ranks on each; the second is entered in place of by ssh.
    pub(super) fn command(
        &self,
        ranks_each: usize,
        program: &Path,
        arguments: &[&str],
    ) -> Result<Command, String> {
        let agent = work_dir()?.join("agent.sh");
        let [a, b] = &self.names;
        let enter = |name: &str, command: &str| {
            format!("exec ip netns exec {name} unshare --uts sh -c \"hostname {name}; exec {command}\"")
        };
        let text = format!("#!/bin/sh\nshift\n{}\n", enter(b, "$*"));
        std::fs::write(&agent, text).map_err(|e| format!("{}: {e}", agent.display()))?;
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&agent, mode).map_err(|e| format!("{}: {e}", agent.display()))?;
        let [first, second] = ADDRESSES;
        let mpirun = format!(
            "mpirun {} --allow-run-as-root --mca plm_rsh_agent {} --mca btl tcp,self --mca btl_tcp_if_include {NETWORK} \
             --mca oob_tcp_if_include {NETWORK} --host {first}:{ranks_each},{second}:{ranks_each} -n {} {} {} {}",
            OPTIONS.join(" "),
            agent.display(),
            2 * ranks_each,
            logged()?.display(),
            program.display(),
            arguments.join(" ")
        );
        let mut command = Command::new("sh");
        command.args(["-c", &enter(a, &mpirun)]);
        Ok(command)
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        for name in &self.names {
            // One that was never made cannot be deleted.
            let _absent = ip(&["netns", "del", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output =
        Command::new("ip").args(arguments).output().map_err(|e| format!("ip: {e}; install iproute2"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("ip {}: {errors}", arguments.join(" "))) }
}
