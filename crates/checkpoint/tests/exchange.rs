//! Blocks of which several ranks want a part: read once by one of them, and every byte that arrives was verified.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use common::{part, ranks, state};
use sconce_checkpoint::{
    Access, BLOCK_BYTES, DataFile, Error, FileMetadata, FileSystemReader, LoadOptions, Metadata, Result,
    SaveOptions, StorageReader, Verify, load_from, load_with, read_metadata, save_with,
};
use sconce_dtensor::{DType, LocalTensor, StateDict, TensorBox, TensorBuf, chunk_range};

/// How often each block was read, by file name.
type Reads = Mutex<BTreeMap<(String, u64), usize>>;

/// A reader that counts, and damages what is read of a block for the second time.
struct Watched<'w> {
    inner: FileSystemReader,
    reads: &'w Reads,
    damages_again: bool,
}

struct WatchedFile {
    inner: Box<dyn DataFile>,
    reads: &'static Reads,
    name: String,
    damages_again: bool,
}

impl StorageReader for Watched<'static> {
    fn read_metadata(&self) -> Result<Metadata> {
        self.inner.read_metadata()
    }

    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        let (inner, name) = (self.inner.open(file)?, file.name.clone());
        Ok(Box::new(WatchedFile { inner, reads: self.reads, name, damages_again: self.damages_again }))
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }
}

impl DataFile for WatchedFile {
    fn read_at(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset_bytes, to)?;
        let last = (offset_bytes + to.len() as u64 - 1) / BLOCK_BYTES;
        for block in offset_bytes / BLOCK_BYTES..=last {
            let mut reads = self.reads.lock().unwrap();
            let n = reads.entry((self.name.clone(), block)).or_default();
            *n += 1;
            if self.damages_again && *n > 1 {
                to[0] ^= 1;
            }
        }
        Ok(())
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }
}

fn watched(path: &Path, reads: &'static Reads, damages_again: bool) -> Watched<'static> {
    Watched { inner: FileSystemReader::new(path, Access::positional()), reads, damages_again }
}

fn new_reads() -> &'static Reads {
    Box::leak(Box::default())
}

/// Odd sizes, and more blocks a rank than are read at a time.
const SHAPE: [usize; 2] = [4 * 1024 + 3, 3 * 1024 + 1];

fn chunk(dim: usize, n: usize, nth: usize) -> TensorBox {
    let range = chunk_range(SHAPE[dim], n, nth);
    let mut part = TensorBox::whole(&SHAPE);
    (part.offsets[dim], part.sizes[dim]) = (range.start, range.len());
    part
}

/// A checkpoint of `n` ranks that each hold rows.
fn saved_rows(path: &Path, n: usize) {
    ranks(n, |group| {
        let options = SaveOptions { group: Some(&group), sync: false, ..SaveOptions::default() };
        save_with(path, &state(&SHAPE, &[chunk(0, n, group.rank().0)], true), options).unwrap();
    });
}

/// Loads on `n` ranks what `wanted` says of each, and returns how often each block was read.
fn load_watched(path: &Path, n: usize, wanted: impl Fn(usize) -> TensorBox + Sync) -> Vec<usize> {
    let reads = new_reads();
    ranks(n, |group| {
        let mine = [wanted(group.rank().0)];
        let mut loaded = state(&SHAPE, &mine, false);
        let options = LoadOptions { group: Some(&group), ..LoadOptions::default() };
        load_from(&watched(path, reads, false), &mut loaded, options).unwrap();
        assert!(loaded.tensor::<TensorBuf>("t").unwrap() == &part(&SHAPE, &mine, true));
    });
    let n_blocks: usize =
        read_metadata(path).unwrap().files.iter().map(|f| f.block_crcs.as_ref().unwrap().len()).sum();
    let reads: Vec<usize> = reads.lock().unwrap().values().copied().collect();
    assert_eq!(reads.len(), n_blocks, "every block was read");
    reads
}

#[test]
fn whatever_ranks_want_of_it_each_block_is_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    saved_rows(&path, 3);
    // Rows as columns; every rank all of it, as replicas; rows cut elsewhere; one rank all, the others columns.
    let whole = TensorBox::whole(&SHAPE);
    let some = |nth: usize| if nth == 1 { whole.clone() } else { chunk(1, 3, nth) };
    for reads in [
        load_watched(&path, 4, |nth| chunk(1, 4, nth)),
        load_watched(&path, 2, |_| whole.clone()),
        load_watched(&path, 4, |nth| chunk(0, 4, nth)),
        load_watched(&path, 3, some),
    ] {
        assert!(reads.iter().all(|n| *n == 1), "{reads:?}");
    }
}

#[test]
fn bytes_that_changed_since_they_were_verified_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    saved_rows(&path, 2);
    let reads = new_reads();
    let errors = ranks(2, |group| {
        let mut loaded = state(&SHAPE, &[chunk(1, 2, group.rank().0)], false);
        // All blocks are well when they are looked at, and damaged when they are read to be copied.
        let options =
            LoadOptions { group: Some(&group), verify: Verify::BeforeRead, ..LoadOptions::default() };
        load_from(&watched(&path, reads, true), &mut loaded, options).unwrap_err()
    });
    let Error::Ranks { step, failures } = &errors[0] else { panic!("{}", errors[0]) };
    assert_eq!((step.as_str(), failures.len(), &errors[1]), ("read", 2, &errors[0]));
    assert!(
        failures
            .iter()
            .all(|failure| matches!(&failure.error, Error::Corrupt { fqns, .. } if !fqns.is_empty()))
    );
}

/// A tensor that breaks when it is written to for the nth time.
struct Breaks {
    inner: TensorBuf,
    writes_left: usize,
}

impl LocalTensor for Breaks {
    fn dtype(&self) -> DType {
        self.inner.dtype()
    }
    fn global_shape(&self) -> &[usize] {
        self.inner.global_shape()
    }
    fn local_boxes(&self) -> &[TensorBox] {
        self.inner.local_boxes()
    }
    fn read_box(&self, index: usize, read: &mut dyn FnMut(&[u8])) -> sconce_dtensor::Result<()> {
        self.inner.read_box(index, read)
    }
    fn write_box(&mut self, index: usize, write: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        match self.writes_left.checked_sub(1) {
            Some(left) => self.writes_left = left,
            None => return Err(sconce_dtensor::Error::ReadOnly { what: "a broken tensor".to_owned() }),
        }
        self.inner.write_box(index, write)
    }
    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        self.inner.deep_copy()
    }
}

#[test]
fn a_tensor_that_cannot_be_written_on_one_rank_is_the_same_error_on_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c");
    saved_rows(&path, 3);
    for writes_left in [1, 2, 20, 60] {
        let errors = ranks(3, |group| {
            let mine = [chunk(1, 3, group.rank().0)];
            let mut loaded = StateDict::new();
            let inner = part(&SHAPE, &mine, false);
            let writes_left = if group.rank().0 == 1 { writes_left } else { usize::MAX };
            loaded.insert_tensor("t", Breaks { inner, writes_left });
            let options = LoadOptions { group: Some(&group), ..LoadOptions::default() };
            load_with(&path, &mut loaded, options).unwrap_err()
        });
        assert!(errors.iter().all(|error| error == &errors[0]), "{errors:?}");
        let message = errors[0].to_string();
        assert!(message.contains("read failed on rank 1") && message.contains("broken tensor"), "{message}");
    }
}
