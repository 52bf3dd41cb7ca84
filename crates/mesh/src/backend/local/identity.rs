//! Identity: which process of which host a rank is, as it signs in at the store.

use std::fmt;
use std::fs::{read_link, read_to_string};

use crate::backend::local::system;
use crate::{Error, Rank, Result};

/// A process, told apart from all that had or will have its number, and where it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pid: u32,
    /// When it started, in clock ticks since the system did.
    started: u64,
    /// The kernel and the network namespace, in which ranks find each other.
    host: String,
}

impl Identity {
    /// This process.
    pub(crate) fn own() -> Result<Identity> {
        let pid = std::process::id();
        let started = started(pid).ok_or_else(|| system("reading /proc/self/stat", "no start time"))?;
        Ok(Identity { pid, started, host: host_id()? })
    }

    /// What [`fmt::Display`] wrote.
    pub(super) fn parse(text: &str) -> Option<Identity> {
        let (pid, rest) = text.split_once(' ')?;
        let (started, host) = rest.split_once(' ')?;
        Some(Identity { pid: pid.parse().ok()?, started: started.parse().ok()?, host: host.to_owned() })
    }

    /// Whether another process of this host, which still runs, has signed with it.
    pub(super) fn is_rival_of(&self, own: &Identity) -> bool {
        self != own && self.host == own.host && started(self.pid) == Some(self.started)
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.pid, self.started, self.host)
    }
}

/// The error of ranks that cannot share memory; `None` if all that are known are on one host.
pub(super) fn apart(signed: &[Option<Identity>]) -> Option<Error> {
    let mut known = signed.iter().enumerate().filter_map(|(g, id)| id.as_ref().map(|id| (Rank(g), id)));
    let (first, id) = known.next()?;
    let (other, _) = known.find(|(_, other)| other.host != id.host)?;
    Some(Error::InvalidArgument {
        op: "joining the world",
        what: "hosts of its ranks".into(),
        expected: "one host, as backend `cpu:local` needs (`cpu:mpi` takes several)".into(),
        got: format!("ranks {first} and {other} on different ones"),
    })
}

/// The kernel and the network namespace of this process.
pub(crate) fn host_id() -> Result<String> {
    const BOOT: &str = "/proc/sys/kernel/random/boot_id";
    const NET: &str = "/proc/self/ns/net";
    let boot = read_to_string(BOOT).map_err(|e| system(&format!("reading {BOOT}"), e))?;
    let net = read_link(NET).map_err(|e| system(&format!("reading {NET}"), e))?;
    Ok(format!("{} {}", boot.trim(), net.to_string_lossy()))
}

/// Start time of a process that runs (proc(5), field 22 of `stat`).
fn started(pid: u32) -> Option<u64> {
    let stat = read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses, which may hold anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself_and_a_rival_is_another_that_runs() {
        let own = Identity::own().unwrap();
        assert_eq!(Identity::parse(&own.to_string()), Some(own.clone()));
        assert!(!own.is_rival_of(&own));
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = sleeper.id();
        let rival = Identity { pid, started: started(pid).unwrap(), ..own.clone() };
        assert!(rival.is_rival_of(&own));
        assert!(!Identity { started: rival.started + 1, ..rival.clone() }.is_rival_of(&own));
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert!(!rival.is_rival_of(&own));
        assert_eq!(Identity::parse("here"), None);
    }

    #[test]
    fn ranks_of_two_hosts_are_named() {
        let id = |host: &str| Some(Identity { pid: 1, started: 1, host: host.into() });
        assert_eq!(apart(&[id("a"), None, id("a")]), None);
        let error = apart(&[id("a"), None, id("b")]).unwrap().to_string();
        assert!(error.ends_with("got ranks 0 and 2 on different ones"), "{error}");
    }
}
