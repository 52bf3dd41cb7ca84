//! What the coordinator of a save tells the ranks of the directory in which all of them write.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::commit::Staging;
use crate::Result;
use crate::coordinate::Message;
use crate::plan::Layout;
use crate::threads::share_of_cores;

/// The directory, and how many ranks write there.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    n_writers: usize,
    dir: Vec<u8>,
    /// The earlier checkpoint whose files may be linked.
    since: Option<Vec<u8>>,
}

impl Place {
    /// The place of a save of `layout`, as bytes.
    pub(crate) fn encoded(staging: &Staging, layout: &Layout, since: Option<&Path>) -> Result<Vec<u8>> {
        let writers: HashSet<usize> =
            layout.tensors.iter().flat_map(|tensor| &tensor.chunks).map(|chunk| chunk.writer).collect();
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        Place { n_writers: writers.len(), dir: bytes(staging.dir()), since: since.map(bytes) }.encode()
    }

    /// The same place for ranks of one process that write one after the other, each with all cores.
    #[cfg(feature = "cli")]
    pub(crate) fn by_turns(bytes: &[u8]) -> Result<Vec<u8>> {
        Place { n_writers: 1, ..Self::decode(bytes)? }.encode()
    }

    pub(crate) fn dir(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(&self.dir))
    }

    pub(crate) fn since(&self) -> Option<PathBuf> {
        self.since.as_deref().map(|path| PathBuf::from(OsStr::from_bytes(path)))
    }

    /// How many threads each rank may write with.
    pub(crate) fn threads(&self) -> usize {
        share_of_cores(self.n_writers)
    }
}
