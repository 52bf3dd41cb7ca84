//! A tracer of processes: which of their system calls touch a directory, in what order, and death at any one of them.
//!
//! It needs no tool and no privilege: the processes ask their parent to trace them. It follows all their threads.

use std::collections::HashMap;
use std::path::Path;

use libc::pid_t;
use rustix::process::{Pid, Signal, kill_process};

use super::ptrace::{self, Event};
use super::syscall::Call;

/// What happens to a process that is about to make a call that touches the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Continue,
    /// The process dies before the call.
    KillIt,
    /// All traced processes die before the call.
    KillAll,
}

/// How a traced process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Exited(i32),
    Killed,
}

/// Sees each call that touches the directory.
pub(crate) trait Observer {
    /// Before the call has any effect.
    fn entered(&mut self, _: &Call) -> Verdict {
        Verdict::Continue
    }

    /// After it succeeded.
    fn succeeded(&mut self, _: &Call, _returned: u64) {}
}

/// Runs the given children, which call [`ptrace::be_traced`], to their ends, by process id.
///
/// It must be called on the thread that started them.
pub(crate) fn trace(children: &[u32], dir: &Path, observer: &mut dyn Observer) -> HashMap<u32, End> {
    let mut trace = Trace { dir, observer, threads: HashMap::new(), alive: children.to_vec() };
    let mut ends = HashMap::new();
    while !trace.alive.is_empty() {
        if let Some((process, end)) = trace.step(ptrace::wait()) {
            trace.alive.retain(|pid| *pid != process);
            ends.insert(process, end);
        }
    }
    ends
}

struct Trace<'t> {
    dir: &'t Path,
    observer: &'t mut dyn Observer,
    threads: HashMap<pid_t, Thread>,
    alive: Vec<u32>,
}

/// A thread that is known, and the call that it is in.
#[derive(Default)]
struct Thread {
    is_inside: bool,
    call: Option<Call>,
}

impl Trace<'_> {
    fn step(&mut self, event: Event) -> Option<(u32, End)> {
        match event {
            Event::Exited(thread, code) => return self.ended(thread, End::Exited(code)),
            Event::Killed(thread) => return self.ended(thread, End::Killed),
            Event::AtCall(thread) => self.at_call(thread),
            Event::Other(thread) => ptrace::resume(thread, 0),
            Event::Stopped(thread, signal) => {
                // The first stop of a process is its own, of a thread its birth; neither is a signal to pass on.
                let is_first = !self.threads.contains_key(&thread);
                if is_first {
                    ptrace::follow(thread);
                    self.threads.insert(thread, Thread::default());
                }
                ptrace::resume(thread, if is_first { 0 } else { signal });
            }
        }
        None
    }

    fn ended(&mut self, thread: pid_t, end: End) -> Option<(u32, End)> {
        self.threads.remove(&thread);
        let process = thread as u32;
        self.alive.contains(&process).then_some((process, end))
    }

    fn at_call(&mut self, id: pid_t) {
        let thread = self.threads.entry(id).or_default();
        thread.is_inside = !thread.is_inside;
        let Some(registers) = ptrace::registers(id) else { return };
        if thread.is_inside {
            thread.call = Call::decode(id, &registers, self.dir);
            let verdict = thread.call.as_ref().map_or(Verdict::Continue, |call| self.observer.entered(call));
            match verdict {
                Verdict::Continue => {}
                Verdict::KillIt => kill(process_of(id)),
                Verdict::KillAll => self.alive.iter().copied().for_each(kill),
            }
        } else if let Some(call) = thread.call.take() {
            // Errors are returned as small negative numbers.
            if (registers.rax as i64) >= 0 {
                self.observer.succeeded(&call, registers.rax);
            }
        }
        ptrace::resume(id, 0);
    }
}

fn kill(process: u32) {
    if let Some(pid) = Pid::from_raw(process as i32) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// The process of a thread.
fn process_of(thread: pid_t) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    line.and_then(|id| id.trim().parse().ok()).unwrap_or(thread as u32)
}
