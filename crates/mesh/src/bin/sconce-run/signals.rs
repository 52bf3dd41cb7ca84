//! Signals that ask the launcher to end, or that users send to their programs, go on to the ranks.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Signal, pidfd_send_signal};
use sconce_mesh::{Error, RankProcesses, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

/// Every signal that goes on, in both libraries' words, and whether it asks to end.
const SIGNALS: [(i32, Signal, bool); 6] = [
    (SIGHUP, Signal::HUP, true),
    (SIGINT, Signal::INT, true),
    (SIGQUIT, Signal::QUIT, true),
    (SIGTERM, Signal::TERM, true),
    (SIGUSR1, Signal::USR1, false),
    (SIGUSR2, Signal::USR2, false),
];

pub(crate) struct Forwarder {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    ranks: Mutex<Vec<OwnedFd>>,
    asked_to_end: AtomicBool,
}

impl Forwarder {
    pub(crate) fn start() -> Result<Forwarder> {
        let mut signals = Signals::new(SIGNALS.map(|(number, _, _)| number))
            .map_err(|e| failed("sigaction", &e.to_string()))?;
        let shared = Arc::new(Shared::default());
        let forwarded = Arc::clone(&shared);
        std::thread::spawn(move || signals.forever().for_each(|number| forwarded.forward(number)));
        Ok(Forwarder { shared })
    }

    /// Makes these the ranks that get the signals. One that asked to end while they were started is theirs as well.
    pub(crate) fn forward_to(&self, ranks: &RankProcesses) -> Result<()> {
        let mut forwarded = self.lock();
        *forwarded = ranks.pidfds()?;
        if self.was_asked_to_end() {
            send(&forwarded, Signal::TERM);
        }
        Ok(())
    }

    pub(crate) fn was_asked_to_end(&self) -> bool {
        self.shared.asked_to_end.load(Ordering::Relaxed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<OwnedFd>> {
        self.shared.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn forward(&self, number: i32) {
        let Some((_, signal, ends)) = SIGNALS.into_iter().find(|(other, _, _)| *other == number) else {
            return;
        };
        // Under the lock: ranks that are started meanwhile see it, or are in the list.
        let ranks = self.ranks.lock().unwrap_or_else(PoisonError::into_inner);
        self.asked_to_end.fetch_or(ends, Ordering::Relaxed);
        send(&ranks, signal);
    }
}

fn send(ranks: &[OwnedFd], signal: Signal) {
    for rank in ranks {
        // A rank that has ended needs none.
        let _ended = pidfd_send_signal(rank, signal);
    }
}

fn failed(call: &str, cause: &str) -> Error {
    Error::Backend { backend: "launcher", call: call.to_owned(), cause: cause.to_owned() }
}
