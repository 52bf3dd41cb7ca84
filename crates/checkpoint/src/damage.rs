//! Whether a checkpoint is whole: every byte read, every checksum compared, and what is damaged named.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::metadata::{BLOCK_BYTES, Metadata};
#[cfg(feature = "torch")]
use crate::region::Region;
use crate::storage::{PageBuffer, StorageReader as _};
use crate::{Access, Error, FileSystemReader, Format, Result};

/// Blocks that a thread takes at a time.
const JOB_BLOCKS: usize = 4;
/// What it reads at a time: its checksum is taken while it is in the core's cache.
const STEP_BYTES: usize = 256 << 10;

/// What [`find_damage`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DamageReport {
    /// Number of data files.
    pub n_files: usize,
    /// Bytes that were compared with a checksum. Safetensors without a manifest have none: there it is 0, and only
    /// headers were checked.
    pub checked_bytes: u64,
    /// What is damaged, by file and place.
    pub damages: Vec<Damage>,
}

/// A damaged part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Damage {
    /// The file.
    pub file: String,
    /// Where the damaged part begins.
    pub offset_bytes: u64,
    /// What is wrong: a block whose checksum differs, a length, a record.
    pub what: String,
    /// Tensors and values that lie in the part.
    pub fqns: Vec<String>,
}

/// Reads all of the checkpoint at `path` on `n_threads` threads; `progress` is told of bytes as they are checked.
///
/// Our own checkpoints have a CRC32 of each block, PyTorch's of each record (which PyTorch itself does not compare).
///
/// Units: memory is bounded by 4 MiB a thread, but for records that are compressed.
///
/// # Errors
/// `Missing`, `NotACheckpoint`, and what keeps the index itself from being read; damage of data is in the report.
pub fn find_damage(
    path: impl AsRef<Path>,
    n_threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<DamageReport> {
    let path = path.as_ref();
    // Held open while its files are read, so that nobody removes them.
    let reader = FileSystemReader::new(path, Access::positional());
    let (n_files, jobs) = match Format::of(path)? {
        Format::Sconce => sconce(path, &reader)?,
        Format::Safetensors => {
            let reader = crate::hf::Reader::new(path);
            let (n_files, damages) = reader.damages()?;
            if damages.is_empty() {
                // What the files say together.
                reader.read_metadata()?;
            }
            (n_files, damages.into_iter().map(Err).collect())
        }
        torch => torch_jobs(path, torch)?,
    };
    let (mut report, mut early) = (DamageReport { n_files, ..Default::default() }, Vec::new());
    let jobs: Vec<Job> =
        jobs.into_iter().filter_map(|job| job.map_err(|damage| early.push(damage)).ok()).collect();
    let next = AtomicUsize::new(0);
    let found = Mutex::new((0, early));
    std::thread::scope(|scope| {
        for _ in 0..n_threads.clamp(1, jobs.len().max(1)) {
            scope.spawn(|| {
                let mut buffer = PageBuffer::default();
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (checked, damages) = job.run(&mut buffer);
                    progress(checked);
                    let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    found.0 += checked;
                    found.1.extend(damages);
                }
            });
        }
    });
    (report.checked_bytes, report.damages) =
        found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    report.damages.sort();
    Ok(report)
}

/// What a thread checks at a time.
enum Job {
    Blocks(Blocks),
    #[cfg(feature = "torch")]
    Torch(crate::torch::check::Item),
}

struct Blocks {
    path: PathBuf,
    file: Arc<File>,
    name: String,
    first: usize,
    /// Checksum and length of each block.
    blocks: Vec<(u32, usize)>,
    /// What lies where, and which of its files this is.
    held: (Arc<Metadata>, usize),
}

impl Job {
    fn run(&self, buffer: &mut PageBuffer) -> (u64, Vec<Damage>) {
        match self {
            Job::Blocks(blocks) => blocks.run(buffer),
            #[cfg(feature = "torch")]
            Job::Torch(item) => item.check(buffer),
        }
    }
}

impl Blocks {
    fn run(&self, buffer: &mut PageBuffer) -> (u64, Vec<Damage>) {
        let (mut checked, mut damages) = (0, Vec::new());
        for (nth, (expected, len)) in self.blocks.iter().enumerate() {
            let block = self.first + nth;
            let start = block as u64 * BLOCK_BYTES;
            let what = match self.crc_of(start..start + *len as u64, buffer) {
                Ok(got) => {
                    checked += *len as u64;
                    (got != *expected)
                        .then(|| format!("block {block}: CRC32 {got:08x}, expected {expected:08x}"))
                }
                Err(e) => Some(Error::io("read", &self.path, &e).to_string()),
            };
            damages.extend(what.map(|what| self.damage(start, start + *len as u64, what)));
        }
        (checked, damages)
    }

    /// The checksum of a range of the file, taken of each step while it is in the cache.
    fn crc_of(&self, mut range: Range<u64>, buffer: &mut PageBuffer) -> std::io::Result<u32> {
        let mut crc = crc32fast::Hasher::new();
        while !range.is_empty() {
            let bytes = buffer.resized(STEP_BYTES.min((range.end - range.start) as usize));
            self.file.read_exact_at(bytes, range.start)?;
            crc.update(bytes);
            range.start += bytes.len() as u64;
        }
        Ok(crc.finalize())
    }

    fn damage(&self, start: u64, end: u64, what: String) -> Damage {
        let (metadata, file) = &self.held;
        let fqns = metadata.names_within(*file, start..end);
        Damage { file: self.name.clone(), offset_bytes: start, what, fqns }
    }
}

type Jobs = Vec<std::result::Result<Job, Damage>>;

fn sconce(path: &Path, reader: &FileSystemReader) -> Result<(usize, Jobs)> {
    let metadata = Arc::new(reader.read_metadata()?);
    let mut jobs = Vec::new();
    for file in 0..metadata.files.len() {
        file_jobs(path, &metadata, file, &mut jobs);
    }
    Ok((metadata.files.len(), jobs))
}

fn file_jobs(dir: &Path, metadata: &Arc<Metadata>, nth_file: usize, jobs: &mut Jobs) {
    let meta = &metadata.files[nth_file];
    let path = dir.join(&meta.name);
    let damage = |from: u64, what: String| Damage {
        file: meta.name.clone(),
        offset_bytes: from,
        what,
        fqns: metadata.names_within(nth_file, from..u64::MAX),
    };
    let opened = File::open(&path).and_then(|file| file.metadata().map(|found| (file, found.len())));
    let (file, len) = match opened {
        Ok(opened) => opened,
        Err(e) => return jobs.push(Err(damage(0, Error::io("open", &path, &e).to_string()))),
    };
    if len != meta.len_bytes {
        jobs.push(Err(damage(len.min(meta.len_bytes), format!("{len} bytes, expected {}", meta.len_bytes))));
    }
    let crcs = meta.block_crcs.as_deref().unwrap_or_default();
    let block_len = |nth: usize| (meta.len_bytes - nth as u64 * BLOCK_BYTES).min(BLOCK_BYTES);
    // Blocks that are not all there are part of the damage above.
    let there = (0..crcs.len()).take_while(|nth| *nth as u64 * BLOCK_BYTES + block_len(*nth) <= len).count();
    let file = Arc::new(file);
    for first in (0..there).step_by(JOB_BLOCKS) {
        let blocks =
            (first..there.min(first + JOB_BLOCKS)).map(|nth| (crcs[nth], block_len(nth) as usize)).collect();
        let (path, file, name) = (path.clone(), file.clone(), meta.name.clone());
        let held = (metadata.clone(), nth_file);
        jobs.push(Ok(Job::Blocks(Blocks { path, file, name, first, blocks, held })));
    }
}

#[cfg(feature = "torch")]
fn torch_jobs(path: &Path, format: Format) -> Result<(usize, Jobs)> {
    let (n_files, items) = crate::torch::check::items(path, format)?;
    Ok((n_files, items.into_iter().map(|item| item.map(Job::Torch)).collect()))
}

#[cfg(not(feature = "torch"))]
fn torch_jobs(path: &Path, _: Format) -> Result<(usize, Jobs)> {
    crate::open(path).map(|_| (0, Vec::new()))
}

impl Metadata {
    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        let bytes = |tensor: &crate::TensorStorageMetadata| {
            tensor.shape.iter().map(|size| *size as u64).product::<u64>() * tensor.dtype.size_bytes() as u64
        };
        self.tensors.iter().map(bytes).sum()
    }
}

/// The checksum of a region, read in pieces.
#[cfg(feature = "torch")]
pub(crate) fn crc_of(region: &Region, buffer: &mut PageBuffer) -> Result<u32> {
    let mut crc = crc32fast::Hasher::new();
    let mut at = 0;
    while at < region.len() {
        let bytes = buffer.resized((region.len() - at).min(STEP_BYTES as u64) as usize);
        region.read(at, bytes)?;
        crc.update(bytes);
        at += bytes.len() as u64;
    }
    Ok(crc.finalize())
}
