//! RankProcesses: the ranks of one host as child processes. It starts, watches and ends them; it restarts none.

mod output;

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpgid, getppid, kill_process_group, pidfd_open,
    set_parent_process_death_signal,
};

use crate::env::{AGENT_STORE, STORE_HOSTED, STORE_TOKEN};
use crate::{Error, Rank, RankEnv, Result, TcpStoreServer};
pub use output::RankOutput;
use output::Tail;

/// The process that ranks must not outlive.
const PARENT: &str = "SCONCE_PARENT_PID";

/// Rank processes that this process started. Dropping it kills those that still run.
///
/// It hosts the store at which the ranks meet, so that no port has to be agreed on before.
///
/// ```no_run
/// # // Starts processes of the running program.
/// use std::{process::Command, time::Duration};
/// use sconce_mesh::{RankOutput, RankProcesses};
///
/// let command = |_: &_| Command::new(std::env::current_exe().unwrap());
/// let mut ranks = RankProcesses::spawn(4, RankOutput::Inherited, command)?;
/// ranks.wait(None, Duration::from_secs(5))?;
/// # Ok::<(), sconce_mesh::Error>(())
/// ```
#[derive(Debug)]
pub struct RankProcesses {
    ranks: Vec<RankProcess>,
    /// How often they were looked at.
    looks: usize,
    /// Serves as long as ranks may join; on one node of several.
    _store: Option<TcpStoreServer>,
}

/// One node among several whose ranks make one world. Every node has as many ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Number of nodes.
    pub n_nodes: usize,
    /// This one, which starts the ranks from `node_rank · n_ranks`.
    pub node_rank: usize,
    /// Ranks on each node.
    pub n_ranks: usize,
    /// Address of node 0, whose launcher hosts the store.
    pub master_addr: String,
    /// Port of the store.
    pub master_port: u16,
    /// The secret that ranks prove to the store, the same on all nodes.
    pub token: String,
}

#[derive(Debug)]
struct RankProcess {
    rank: Rank,
    child: Child,
    pidfd: OwnedFd,
    tail: Tail,
    /// Whether its process group is its own: then what it leaves behind ends with it.
    leads_group: bool,
    exit: Option<Exit>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy)]
struct Exit {
    status: ExitStatus,
    by_itself: bool,
    /// How often the launcher had looked before: ranks of the same look ended at about the same time.
    look: usize,
}

impl Exit {
    /// Sorts the ends that say most about what went wrong first: by itself before killed by us, early before late, and
    /// of those that were seen together a signal before an exit code, which is more often a consequence.
    fn blame(&self) -> (bool, usize, bool) {
        (!self.by_itself, self.look, self.status.signal().is_none())
    }
}

/// How one rank ended.
#[derive(Debug, Clone)]
pub struct RankExit {
    /// The rank.
    pub rank: Rank,
    /// Its exit code or signal.
    pub status: ExitStatus,
    /// False if the launcher killed it at the deadline.
    pub by_itself: bool,
    /// The end of what it printed, if that was captured.
    pub last_lines: String,
}

impl RankExit {
    /// How it ended, as a person would say: `failed with exit code 3`.
    pub fn outcome(&self) -> String {
        match (self.by_itself, self.status.signal()) {
            _ if self.status.success() => "ended well".to_owned(),
            (false, _) => {
                "was still running at the deadline, or after another rank's end, and was killed".to_owned()
            }
            (true, Some(signal)) => format!("died of signal {signal}"),
            (true, None) => format!("failed with exit code {}", self.status.code().unwrap_or(-1)),
        }
    }
}

impl RankProcesses {
    /// Starts `n` ranks of this host; `command` makes each one's command, to which the launcher adds torchrun's
    /// variables, the store and its token.
    ///
    /// # Errors
    /// `Store` if none can be hosted, `Backend` if a process cannot be started.
    pub fn spawn(
        n: usize,
        output: RankOutput,
        mut command: impl FnMut(&RankEnv) -> Command,
    ) -> Result<RankProcesses> {
        let token = crate::token::random_hex()?;
        let store = TcpStoreServer::bind(([127, 0, 0, 1], 0).into(), &token)?;
        let (master_addr, master_port) = (store.addr().ip().to_string(), store.addr().port());
        let node = Node { n_nodes: 1, node_rank: 0, n_ranks: n, master_addr, master_port, token };
        Self::start(&node, Some(store), &output, &mut command)
    }

    /// Starts the ranks of one node of several; on node 0 also the store, where its name says.
    ///
    /// # Errors
    /// As [`RankProcesses::spawn`].
    pub fn spawn_node(
        node: &Node,
        output: RankOutput,
        mut command: impl FnMut(&RankEnv) -> Command,
    ) -> Result<RankProcesses> {
        let addr = format!("{}:{}", node.master_addr, node.master_port);
        let store =
            if node.node_rank == 0 { Some(TcpStoreServer::bind_to(&addr, &node.token)?) } else { None };
        Self::start(node, store, &output, &mut command)
    }

    fn start(
        node: &Node,
        store: Option<TcpStoreServer>,
        output: &RankOutput,
        command: &mut dyn FnMut(&RankEnv) -> Command,
    ) -> Result<RankProcesses> {
        let mut started = RankProcesses { ranks: Vec::new(), looks: 0, _store: store };
        for local_rank in 0..node.n_ranks {
            let env = RankEnv {
                rank: Rank(node.node_rank * node.n_ranks + local_rank),
                local_rank,
                world_size: node.n_nodes * node.n_ranks,
                local_world_size: node.n_ranks,
                master_addr: node.master_addr.clone(),
                master_port: node.master_port,
            };
            let mut command = command(&env);
            command.envs(env.to_vars()).env(STORE_TOKEN, &node.token).env(STORE_HOSTED, "1");
            // This launcher may itself run under torchrun.
            command.env_remove(AGENT_STORE);
            command.env(PARENT, std::process::id().to_string()).stdin(Stdio::null());
            started.ranks.push(RankProcess::start(env.rank, command, output)?);
        }
        Ok(started)
    }

    /// The ranks and their process ids.
    pub fn pids(&self) -> Vec<(Rank, u32)> {
        self.ranks.iter().map(|process| (process.rank, process.child.id())).collect()
    }

    /// One pidfd a rank (pidfd_open(2)), which names it also after its end.
    ///
    /// # Errors
    /// `Backend` if there are too many open files.
    pub fn pidfds(&self) -> Result<Vec<OwnedFd>> {
        self.ranks.iter().map(|p| p.pidfd.try_clone().map_err(|e| system("dup", &e))).collect()
    }

    /// Kills a rank with SIGKILL, as a fault would.
    ///
    /// # Errors
    /// `Backend` if it cannot be signalled.
    pub fn kill(&mut self, rank: Rank) -> Result<()> {
        let process = self.ranks.iter_mut().find(|process| process.rank == rank);
        process.map_or(Ok(()), |process| process.child.kill().map_err(|e| system("kill", &e)))
    }

    /// Waits until every rank has ended and tells how.
    ///
    /// Once a rank has failed, the others have `grace` to end by themselves; what still runs then, or at the
    /// deadline, is killed.
    ///
    /// # Errors
    /// `Backend` if a process cannot be waited for.
    pub fn exits(&mut self, deadline: Option<Duration>, grace: Duration) -> Result<Vec<RankExit>> {
        let mut end = deadline.and_then(|limit| Instant::now().checked_add(limit));
        let mut failed = false;
        while self.running().count() > 0 && end.is_none_or(|end| Instant::now() < end) {
            self.poll(end)?;
            self.reap(true)?;
            if !failed && self.first_failure().is_some() {
                failed = true;
                let after_grace = Instant::now() + grace;
                end = Some(end.map_or(after_grace, |end| end.min(after_grace)));
            }
        }
        self.kill_all();
        self.reap(false)?;
        Ok(self.ranks.iter_mut().filter_map(RankProcess::ended).collect())
    }

    /// Waits until every rank has ended well.
    ///
    /// # Errors
    /// `RankFailed` for the first rank that failed or was killed at the deadline; as [`RankProcesses::exits`].
    pub fn wait(&mut self, deadline: Option<Duration>, grace: Duration) -> Result<()> {
        let exits = self.exits(deadline, grace)?;
        let first = self.first_failure();
        match exits.into_iter().find(|exit| Some(exit.rank) == first) {
            None => Ok(()),
            Some(exit) => Err(Error::RankFailed {
                rank: exit.rank,
                outcome: exit.outcome(),
                last_lines: exit.last_lines,
            }),
        }
    }

    fn running(&self) -> impl Iterator<Item = &RankProcess> {
        self.ranks.iter().filter(|process| process.exit.is_none())
    }

    /// Waits until every rank has ended, one has failed, or `end`; true if `end` came first.
    ///
    /// # Errors
    /// `Backend` if a process cannot be waited for.
    pub fn outlast(&mut self, end: Instant) -> Result<bool> {
        while self.running().count() > 0 && self.first_failure().is_none() {
            if Instant::now() >= end {
                return Ok(true);
            }
            self.poll(Some(end))?;
            self.reap(true)?;
        }
        Ok(false)
    }

    /// The rank, of those that have ended, that failed first and by itself; else one that had to be killed.
    ///
    /// Of ranks that ended at about the same time it is one that died of a signal: the others, whose peer was lost,
    /// are more likely to have exited.
    pub fn first_failure(&self) -> Option<Rank> {
        let failed = self.ranks.iter().filter_map(|p| p.exit.map(|exit| (p.rank, exit)));
        let failed = failed.filter(|(_, exit)| !exit.status.success());
        failed.min_by_key(|(_, exit)| exit.blame()).map(|(rank, _)| rank)
    }

    /// Sleeps until a rank ends or `end`.
    fn poll(&self, end: Option<Instant>) -> Result<()> {
        let mut fds: Vec<_> = self.running().map(|p| PollFd::new(&p.pidfd, PollFlags::IN)).collect();
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left =
            left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(system("poll", &errno)),
        }
    }

    fn reap(&mut self, by_itself: bool) -> Result<()> {
        for process in self.ranks.iter_mut().filter(|p| p.exit.is_none()) {
            process.end_what_it_left();
            let status = if by_itself { process.child.try_wait() } else { process.child.wait().map(Some) };
            let status = status.map_err(|e| system("wait", &e))?;
            process.exit = status.map(|status| Exit { status, by_itself, look: self.looks });
        }
        self.looks += 1;
        Ok(())
    }

    fn kill_all(&mut self) {
        for process in self.ranks.iter_mut().filter(|p| p.exit.is_none()) {
            // With what it has started, if it leads a process group. It may have ended meanwhile.
            let _ended = match process.leads_group {
                true => kill_process_group(Pid::from_child(&process.child), Signal::KILL).map_err(Into::into),
                false => process.child.kill(),
            };
        }
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        self.kill_all();
        // Nobody is left to report to.
        let _ = self.reap(false);
    }
}

impl RankProcess {
    fn start(rank: Rank, mut command: Command, output: &RankOutput) -> Result<RankProcess> {
        if output.is_read() {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = command.spawn().map_err(|e| system("spawn", &e))?;
        let tail = Tail::of(&mut child, rank, output)?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| system("pidfd_open", &e))?;
        let leads_group = getpgid(Some(pid)).is_ok_and(|group| group == pid);
        Ok(RankProcess { rank, child, pidfd, tail, leads_group, exit: None })
    }

    /// Kills the rest of its process group if it has ended: they hold its output open, which would be waited for.
    ///
    /// It comes before the process is reaped, so that its number is nobody else's yet.
    fn end_what_it_left(&self) {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now));
        if self.leads_group && ended == Ok(1) {
            // It may have left nothing.
            let _none = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }
    }

    fn ended(&mut self) -> Option<RankExit> {
        let Exit { status, by_itself, .. } = self.exit?;
        Some(RankExit { rank: self.rank, status, by_itself, last_lines: self.tail.finish() })
    }
}

/// Makes this rank die with the launcher that started it. A rank calls it before anything else; without a launcher
/// it does nothing.
///
/// # Errors
/// `Environment` if the launcher is gone already, `Backend` if the system refuses.
pub fn die_with_parent() -> Result<()> {
    let Ok(parent) = std::env::var(PARENT) else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| system("prctl", &e))?;
    // The parent may have died before the request was made.
    let now = getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if now.as_deref() == Some(parent.as_str()) {
        return Ok(());
    }
    Err(Error::Environment {
        name: PARENT.to_owned(),
        expected: "the pid of this process's parent",
        got: Some(parent),
    })
}

/// Takes from `command` what [`die_with_parent`] looks for: its process is not the launcher's child, or has done so already.
pub fn forget_parent(command: &mut Command) {
    command.env_remove(PARENT);
}

fn system(call: &str, cause: &dyn std::fmt::Display) -> Error {
    Error::Backend { backend: "launcher", call: call.to_owned(), cause: cause.to_string() }
}
