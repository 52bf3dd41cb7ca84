//! A checkpoint's directory held open for reading: whatever takes its name, its files are read, and nobody removes them.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};

use super::local_file::open_regular;
use super::lock::{self, Share};
use crate::format::MANIFEST_NAME;
use crate::{Error, Result};

/// How long a reader waits for a writer that publishes or a remover: both have the lock of a published checkpoint for a
/// few calls only.
const PATIENCE: Duration = Duration::from_secs(10);

/// An open checkpoint, and the shared lock on its manifest.
#[derive(Debug)]
pub(super) struct Held {
    dir: OwnedFd,
    manifest: File,
}

impl Held {
    /// Opens the checkpoint at `path`.
    ///
    /// # Errors
    /// `Missing`; `NotACheckpoint` if it has no manifest; `Busy` if another process keeps it to itself; `Io`.
    pub(super) fn open(path: &Path) -> Result<Held> {
        let started = Instant::now();
        loop {
            let manifest_path = path.join(MANIFEST_NAME);
            let io = |op: &str, e: &io::Error| Error::io(op, &manifest_path, e);
            let dir = open_directory(path)?;
            let manifest = match open_regular(&dir, MANIFEST_NAME) {
                Ok(manifest) => manifest,
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    let reason =
                        format!("it has no {MANIFEST_NAME}: it was never committed, or is something else");
                    return Err(Error::NotACheckpoint { path: path.to_owned(), reason });
                }
                Err(e) => return Err(io("open", &e)),
            };
            match lock::share(&manifest).map_err(|e| io("lock", &e))? {
                Share::Taken => return Ok(Held { dir, manifest }),
                Share::Removed | Share::Written if started.elapsed() > PATIENCE => {
                    return Err(Error::Busy { path: path.to_owned() });
                }
                Share::Removed => {}
                Share::Written => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// The manifest's bytes.
    pub(super) fn manifest(&self) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.manifest.metadata()?.len()).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.manifest.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Gives a data file a second name.
    pub(super) fn link(&self, name: &str, to: &Path) -> io::Result<()> {
        Ok(linkat(&self.dir, name, CWD, to, AtFlags::empty())?)
    }

    /// Opens a data file.
    pub(super) fn file(&self, name: &str) -> io::Result<File> {
        open_regular(&self.dir, name)
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(|errno| match io::Error::from(errno) {
        e if e.kind() == ErrorKind::NotFound => Error::Missing { path: path.to_owned() },
        e if e.kind() == ErrorKind::NotADirectory => {
            Error::NotACheckpoint { path: path.to_owned(), reason: "it is no directory".to_owned() }
        }
        e => Error::io("open", path, &e),
    })
}
