//! What becomes of a rank's output: shown as it is, or its end kept for a report.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Lines kept of each rank.
const KEPT: usize = 100;

/// Where the output of ranks goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankOutput {
    /// To this process's own output.
    Inherited,
    /// Read and thrown away but for its last lines, which errors show.
    Captured,
}

/// The last lines of a rank, standard output and error together.
#[derive(Debug, Default)]
pub(super) struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Tail {
    /// Reads what the child has piped, until it closes it.
    pub(super) fn of(child: &mut Child) -> Tail {
        let mut tail = Tail::default();
        if let Some(stdout) = child.stdout.take() {
            tail.read(stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            tail.read(stderr);
        }
        tail
    }

    fn read(&mut self, stream: impl Read + Send + 'static) {
        let lines = self.lines.clone();
        self.readers.push(std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() == KEPT {
                    lines.pop_front();
                }
                lines.push_back(String::from_utf8_lossy(&line).into_owned());
            }
        }));
    }

    /// The last lines, once the rank has ended.
    pub(super) fn finish(&mut self) -> String {
        for reader in self.readers.drain(..) {
            // A reader that panicked has kept what it had read.
            let _ = reader.join();
        }
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}
