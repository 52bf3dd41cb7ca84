//! Where checkpoints lie: the traits, and the directory of format 1 that is their default.

pub(crate) mod commit;
mod directory;
pub(crate) mod file;
mod held;
mod local_file;
pub(crate) mod lock;
#[cfg(feature = "mmap")]
mod mmap;
pub(crate) mod pages;
pub(crate) mod place;
pub(crate) mod remove;
pub(crate) mod shards;
mod unchanged;

use sconce_dtensor::StateDict;

pub use directory::{FileSystemReader, FileSystemWriter};
pub use local_file::{Access, LocalFile};
pub(crate) use pages::PageBuffer;

use crate::metadata::{FileMetadata, Metadata};
use crate::plan::{Layout, WritePlan, WrittenFile};
use crate::save::SaveReport;
use crate::{Error, Result};

/// Where a save puts its bytes.
///
/// Calls come in this order, each once a save; the coordinator is the group's first rank:
/// 1. `prepare` on the coordinator, once the global plan is valid;
/// 2. `write` on every rank, with what `prepare` returned;
/// 3. `finish` on the coordinator, when every rank has written: afterwards the checkpoint is there, whole;
/// 4. `discard` on the coordinator instead, or after it, if 2 or 3 failed on any rank.
///
/// Before `finish` returns nothing may take the place of an earlier checkpoint, and after an error nothing may have.
///
/// # Source
/// `torch.distributed.checkpoint.storage.StorageWriter`: `set_up_storage_writer` and `prepare_global_plan` are
/// `prepare`, `prepare_local_plan` is the planner's `finish_plan`.
pub trait StorageWriter: Send {
    /// Makes the place in which all ranks write, and returns what they must know of it: a few bytes.
    fn prepare(&mut self, layout: &Layout) -> Result<Vec<u8>>;

    /// Writes this rank's boxes of `state` and says where they lie.
    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>>;

    /// Publishes what the ranks wrote; `written` is by group rank. [`Metadata::located`] joins both.
    fn finish(&mut self, layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<SaveReport>;

    /// Removes what was written, best effort.
    fn discard(&mut self);
}

/// Where a load finds its bytes, in whatever format they are.
///
/// Calls come in this order on every rank:
/// 1. `read_metadata` once;
/// 2. `open` for each file of which the rank's plan reads a part, once, possibly from several threads;
/// 3. [`DataFile::read_at`] on those files, from several threads.
///
/// A reader of a foreign format describes its bytes by [`Metadata`]: a chunk is a range of a file, row-major, wherever
/// it lies (inside a zip record, behind a header). Bytes that are not stored so (compressed, strided) get a file name
/// of the reader's own making, and `open` returns a [`DataFile`] that undoes it. Resharding, partial loads, loads in
/// place and checks follow from the metadata alone.
///
/// # Source
/// `torch.distributed.checkpoint.storage.StorageReader`, whose `read_data` each reader writes anew.
pub trait StorageReader: Send + Sync {
    /// What the checkpoint holds. Nothing in it need be trusted: chunks outside their files are refused by the load.
    fn read_metadata(&self) -> Result<Metadata>;

    /// Opens a file of the metadata; one that is not `len_bytes` long is an error.
    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>>;

    /// Where this reader reads, for messages.
    fn path(&self) -> &std::path::Path;
}

/// An open data file.
pub trait DataFile: Send + Sync {
    /// Copies the bytes from `offset_bytes` on to `to`, all of it or an error.
    fn read_at(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()>;

    /// What is going to be read, in order and without overlaps, so that a storage with long ways begins early. A hint:
    /// other reads may come, and these may come in any order or not at all.
    fn will_read(&self, ranges_bytes: Vec<std::ops::Range<u64>>) {
        let _ = ranges_bytes;
    }

    /// The whole file in memory, if it is mapped.
    fn mapped(&self) -> Option<&[u8]> {
        None
    }

    /// Its name in messages.
    fn path(&self) -> &std::path::Path;
}

impl Metadata {
    /// Refuses chunks that are not inside their tensors and files, and files of which a block has no checksum while others
    /// have: what a reader says is not believed.
    pub(crate) fn check_ranges(&self, at: &std::path::Path) -> Result<()> {
        for file in &self.files {
            let expected = file.len_bytes.div_ceil(crate::BLOCK_BYTES);
            let got = file.block_crcs.as_ref().map(|crcs| crcs.len() as u64);
            if got.is_some_and(|got| got != expected) {
                return Err(Error::Corrupt {
                    path: at.to_owned(),
                    what: format!("checksums of {}", file.name),
                    offset_bytes: 0,
                    fqns: Vec::new(),
                    expected: format!("one of each of {expected} blocks"),
                    got: format!("{}", got.unwrap_or(0)),
                });
            }
        }
        for tensor in &self.tensors {
            for chunk in &tensor.chunks {
                let len =
                    chunk.bounds.sizes.iter().try_fold(tensor.dtype.size_bytes(), |n, d| n.checked_mul(*d));
                let end = len.and_then(|len| chunk.offset_bytes.checked_add(len as u64));
                let file = self.files.get(chunk.file);
                let is_inside = file.zip(end).is_some_and(|(file, end)| end <= file.len_bytes);
                if !is_inside || !chunk.bounds.fits(&tensor.shape) {
                    return Err(Error::Corrupt {
                        path: at.to_owned(),
                        what: format!("box {} of {}", chunk.bounds, tensor.fqn),
                        offset_bytes: chunk.offset_bytes,
                        fqns: Vec::new(),
                        expected: format!("a box of {:?} inside its file", tensor.shape),
                        got: "one outside".to_owned(),
                    });
                }
            }
        }
        Ok(())
    }
}
