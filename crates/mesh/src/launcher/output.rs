//! What becomes of a rank's output: where it goes, and its end, which is kept for a report.

use std::collections::VecDeque;
use std::fs::{File, create_dir_all};
use std::io::{BufRead, BufReader, IsTerminal, Read, Write, stderr, stdout};
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{Error, Rank, Result};

/// Lines kept of each rank.
const KEPT: usize = 100;

/// How long what a rank has printed may be on its way once it has ended. A process that it left behind, in a session of its
/// own, may hold the pipe open for ever.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// Where the output of ranks goes. In all but the first case its last lines are kept for errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RankOutput {
    /// To this process's own output.
    Inherited,
    /// Nowhere else.
    Captured,
    /// To this process's own output, each line behind its rank, which is coloured on a terminal.
    Prefixed,
    /// To a file `rank-R.log` in this directory, standard output and error together, behind what is in it.
    Files(PathBuf),
}

impl RankOutput {
    /// Whether the launcher reads what ranks print.
    pub(super) fn is_read(&self) -> bool {
        *self != RankOutput::Inherited
    }

    /// Where the lines of `rank` go besides.
    fn copies(&self, rank: Rank) -> Result<[Copy; 2]> {
        match self {
            RankOutput::Inherited | RankOutput::Captured => Ok([Copy::Nowhere, Copy::Nowhere]),
            RankOutput::Prefixed => Ok([
                Copy::Shown { prefix: prefix(rank, stdout().is_terminal()), error: false },
                Copy::Shown { prefix: prefix(rank, stderr().is_terminal()), error: true },
            ]),
            RankOutput::Files(dir) => {
                let path = dir.join(format!("rank-{rank}.log"));
                let file =
                    create_dir_all(dir).and_then(|()| File::options().append(true).create(true).open(&path));
                let file = file.map_err(|e| Error::Backend {
                    backend: "launcher",
                    call: format!("opening {}", path.display()),
                    cause: e.to_string(),
                })?;
                let file = Arc::new(file);
                Ok([Copy::Written(Arc::clone(&file)), Copy::Written(file)])
            }
        }
    }
}

/// Where the lines of one stream go besides the tail.
enum Copy {
    Nowhere,
    Shown { prefix: String, error: bool },
    Written(Arc<File>),
}

impl Copy {
    /// What cannot be shown is lost; the rank must not fail for it.
    fn line(&self, line: &[u8]) {
        let _lost = match self {
            Copy::Nowhere => Ok(()),
            Copy::Written(file) => (&**file).write_all(&[line, b"\n"].concat()),
            // One write a line, so that lines of ranks do not mix.
            Copy::Shown { prefix, error: false } => {
                stdout().lock().write_all(&[prefix.as_bytes(), line, b"\n"].concat())
            }
            Copy::Shown { prefix, error: true } => {
                stderr().lock().write_all(&[prefix.as_bytes(), line, b"\n"].concat())
            }
        };
    }
}

/// `[2] `, in one of six colours of ECMA-48 where it can be seen.
fn prefix(rank: Rank, coloured: bool) -> String {
    if coloured { format!("\x1b[{}m[{rank}]\x1b[0m ", 31 + rank.0 % 6) } else { format!("[{rank}] ") }
}

/// The last lines of a rank, standard output and error together.
#[derive(Debug, Default)]
pub(super) struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Tail {
    /// Reads what the child has piped, until it closes it.
    ///
    /// # Errors
    /// `Backend` if a file cannot be made.
    pub(super) fn of(child: &mut Child, rank: Rank, output: &RankOutput) -> Result<Tail> {
        let mut tail = Tail::default();
        let [out, error] = output.copies(rank)?;
        if let Some(stdout) = child.stdout.take() {
            tail.read(stdout, out);
        }
        if let Some(stderr) = child.stderr.take() {
            tail.read(stderr, error);
        }
        Ok(tail)
    }

    fn read(&mut self, stream: impl Read + Send + 'static, copy: Copy) {
        let lines = self.lines.clone();
        self.readers.push(std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(std::io::Result::ok) {
                copy.line(&line);
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
        let ended = Instant::now();
        for reader in self.readers.drain(..) {
            while !reader.is_finished() && ended.elapsed() < ON_ITS_WAY {
                std::thread::sleep(Duration::from_millis(1));
            }
            if reader.is_finished() {
                // A reader that panicked has kept what it had read.
                let _ = reader.join();
            }
        }
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}
