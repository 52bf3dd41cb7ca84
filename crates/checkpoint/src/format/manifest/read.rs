//! The bytes of a manifest to metadata. Nothing is believed: lengths, checksums, ranges and names are checked first.

use std::path::Path;

use sconce_dtensor::{DType, TensorBox};
use zerocopy::FromBytes;
use zerocopy::little_endian::{U32, U64};

use super::rows::{ChunkRow, FileRow, Prelude, TensorRow};
use super::{Head, MAGIC, Section};
use crate::format::{MAJOR_VERSION, is_confined};
use crate::metadata::{BLOCK_BYTES, ChunkStorageMetadata, FileMetadata, Metadata, TensorStorageMetadata};
use crate::{Error, Result};

/// The columns, borrowed from the manifest's bytes.
struct Columns<'m> {
    tensors: &'m [TensorRow],
    chunks: &'m [ChunkRow],
    dims: &'m [U64],
    files: &'m [FileRow],
    blocks: &'m [U32],
    names: &'m [u8],
}

/// What is wrong with a manifest.
struct Damage<'p> {
    path: &'p Path,
}

/// The metadata of a manifest that was read from `path`.
///
/// # Errors
/// `NotACheckpoint`, `Version`, `Corrupt`.
pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<Metadata> {
    let damage = Damage { path };
    let (head, columns) = split(&damage, bytes)?;
    let head: Head = serde_json::from_slice(head)
        .map_err(|e| damage.of("head", size_of::<Prelude>(), "JSON of format 1", e.to_string()))?;
    let columns = Columns::find(&damage, &head, columns)?;
    if !columns.are_rows_used_once() {
        return Err(damage.of("tensors", 0, "each row in one place only", "shared rows".into()));
    }
    let files = columns.files.iter().map(|row| columns.file(row)).collect::<Option<Vec<_>>>();
    let files = files
        .ok_or_else(|| damage.of("files", 0, "names and blocks inside the manifest", "others".into()))?;
    let tensors = columns.tensors.iter().map(|row| columns.tensor(row, &files));
    let tensors = tensors.collect::<Option<Vec<_>>>();
    let tensors = tensors
        .ok_or_else(|| damage.of("tensors", 0, "boxes inside their tensors and files", "others".into()))?;
    if !tensors.is_sorted_by(|a, b| a.fqn < b.fqn) {
        return Err(damage.of("tensors", 0, "names in order, each once", "others".into()));
    }
    Ok(Metadata { tensors, files, tree: head.tree })
}

/// The head and the columns behind it, once prelude and head are whole.
fn split<'m>(damage: &Damage<'_>, bytes: &'m [u8]) -> Result<(&'m [u8], &'m [u8])> {
    let short = |what: &str| damage.of(what, 0, "more bytes", format!("{} bytes", bytes.len()));
    let (prelude, rest) = Prelude::ref_from_prefix(bytes).map_err(|_| short("prelude"))?;
    if prelude.magic != MAGIC {
        let (path, reason) = (damage.path.to_owned(), "its manifest does not begin as one".to_owned());
        return Err(Error::NotACheckpoint { path, reason });
    }
    let checked = &bytes[..size_of::<Prelude>() - size_of::<U32>()];
    damage.check_crc("prelude", 0, prelude.crc32.get(), checked)?;
    if prelude.major.get() > MAJOR_VERSION {
        let (path, got) = (damage.path.to_owned(), prelude.major.get());
        return Err(Error::Version { path, supported: MAJOR_VERSION, got });
    }
    let head_len = usize::try_from(prelude.head_len.get()).map_err(|_| short("head"))?;
    let (head, columns) = rest.split_at_checked(head_len).ok_or_else(|| short("head"))?;
    damage.check_crc("head", size_of::<Prelude>(), prelude.head_crc32.get(), head)?;
    Ok((head, columns))
}

impl<'m> Columns<'m> {
    fn find(damage: &Damage<'_>, head: &Head, bytes: &'m [u8]) -> Result<Self> {
        let s = &head.sections;
        let mut left = Sectioned { damage, bytes, taken: 0 };
        let columns = Self {
            tensors: left.rows("tensors", s.tensors)?,
            chunks: left.rows("chunks", s.chunks)?,
            dims: left.rows("dims", s.dims)?,
            files: left.rows("files", s.files)?,
            blocks: left.rows("blocks", s.blocks)?,
            names: left.rows("names", s.names)?,
        };
        if left.bytes.is_empty() {
            return Ok(columns);
        }
        Err(damage.of("end", left.taken, "no more bytes", format!("{} more", left.bytes.len())))
    }

    /// Whether tensors, chunks and files take no more rows than there are. Shared ones would make much of a few bytes.
    fn are_rows_used_once(&self) -> bool {
        let tensors = self.tensors.iter();
        let chunks: u128 = tensors.clone().map(|row| u128::from(row.chunk_count.get())).sum();
        let dims_of = |row: &TensorRow| u128::from(row.ndim) * (1 + 2 * u128::from(row.chunk_count.get()));
        let dims: u128 = tensors.clone().map(dims_of).sum();
        let names = tensors.map(|row| row.name_len).chain(self.files.iter().map(|row| row.name_len));
        let names: u128 = names.map(|len| u128::from(len.get())).sum();
        let blocks = self.files.iter().map(|row| u128::from(row.len_bytes.get().div_ceil(BLOCK_BYTES)));
        let within = |used: u128, there: usize| used <= there as u128;
        within(chunks, self.chunks.len())
            && within(dims, self.dims.len())
            && within(names, self.names.len())
            && within(blocks.sum(), self.blocks.len())
    }

    fn name(&self, start: U64, len: U32) -> Option<String> {
        let bytes = range(self.names, start, len.get() as u64)?;
        std::str::from_utf8(bytes).ok().map(str::to_owned)
    }

    fn dims(&self, start: u64, count: u64) -> Option<Vec<usize>> {
        let dims = range(self.dims, start.into(), count)?;
        dims.iter().map(|n| usize::try_from(n.get()).ok()).collect()
    }

    fn file(&self, row: &FileRow) -> Option<FileMetadata> {
        let name = self.name(row.name_start, row.name_len).filter(|name| is_confined(name))?;
        let len_bytes = row.len_bytes.get();
        let blocks = range(self.blocks, row.block_start, len_bytes.div_ceil(BLOCK_BYTES))?;
        let block_crcs = Some(blocks.iter().map(|crc| crc.get()).collect());
        Some(FileMetadata { name, len_bytes, block_crcs })
    }

    fn tensor(&self, row: &TensorRow, files: &[FileMetadata]) -> Option<TensorStorageMetadata> {
        let dtype = *DType::ALL.get(row.dtype as usize)?;
        let ndim = row.ndim as u64;
        let shape = self.dims(row.shape_start.get(), ndim)?;
        shape.iter().try_fold(dtype.size_bytes(), |n, d| n.checked_mul(*d))?;
        let chunks = range(self.chunks, row.chunk_start, row.chunk_count.get())?;
        let chunks =
            chunks.iter().map(|chunk| self.chunk(chunk, &shape, dtype, files)).collect::<Option<_>>()?;
        Some(TensorStorageMetadata { fqn: self.name(row.name_start, row.name_len)?, dtype, shape, chunks })
    }

    fn chunk(
        &self,
        row: &ChunkRow,
        shape: &[usize],
        dtype: DType,
        files: &[FileMetadata],
    ) -> Option<ChunkStorageMetadata> {
        let ndim = shape.len() as u64;
        let start = row.bounds_start.get();
        let (offsets, sizes) = (self.dims(start, ndim)?, self.dims(start.checked_add(ndim)?, ndim)?);
        let bounds = Some(TensorBox { offsets, sizes }).filter(|bounds| bounds.fits(shape))?;
        let file = usize::try_from(row.file.get()).ok()?;
        let len = (bounds.numel() * dtype.size_bytes()) as u64;
        let offset_bytes = row.offset_bytes.get();
        let end = offset_bytes.checked_add(len)?;
        (end <= files.get(file)?.len_bytes).then_some(ChunkStorageMetadata { bounds, file, offset_bytes })
    }
}

/// Sections are taken one after the other.
struct Sectioned<'d, 'm> {
    damage: &'d Damage<'d>,
    bytes: &'m [u8],
    taken: usize,
}

impl<'m> Sectioned<'_, 'm> {
    fn rows<T: FromBytes + zerocopy::Immutable + zerocopy::KnownLayout>(
        &mut self,
        what: &str,
        section: Section,
    ) -> Result<&'m [T]>
    where
        [T]: FromBytes,
    {
        let wrong = || {
            let expected = format!("{} bytes of rows", section.len_bytes);
            self.damage.of(what, self.taken, &expected, format!("{} bytes", self.bytes.len()))
        };
        let len = usize::try_from(section.len_bytes).map_err(|_| wrong())?;
        let (mine, rest) = self.bytes.split_at_checked(len).ok_or_else(wrong)?;
        let rows = <[T]>::ref_from_bytes(mine).map_err(|_| wrong())?;
        self.damage.check_crc(what, self.taken, section.crc32, mine)?;
        self.bytes = rest;
        self.taken += len;
        Ok(rows)
    }
}

impl Damage<'_> {
    fn of(&self, what: &str, offset_bytes: usize, expected: &str, got: String) -> Error {
        let (path, offset_bytes) = (self.path.to_owned(), offset_bytes as u64);
        Error::Corrupt {
            path,
            what: format!("section {what}"),
            offset_bytes,
            fqns: Vec::new(),
            expected: expected.to_owned(),
            got,
        }
    }

    fn check_crc(&self, what: &str, offset_bytes: usize, expected: u32, bytes: &[u8]) -> Result<()> {
        let got = crc32fast::hash(bytes);
        if is_checksum(got, expected) {
            return Ok(());
        }
        Err(self.of(what, offset_bytes, &format!("CRC32 {expected:08x}"), format!("CRC32 {got:08x}")))
    }
}

#[cfg(not(fuzzing))]
fn is_checksum(got: u32, expected: u32) -> bool {
    got == expected
}

/// A fuzzer finds no checksums, and would never see what is behind them.
#[cfg(fuzzing)]
fn is_checksum(_: u32, _: u32) -> bool {
    true
}

/// `count` rows from `start`, if they are there.
fn range<T>(rows: &[T], start: U64, count: u64) -> Option<&[T]> {
    let start = usize::try_from(start.get()).ok()?;
    rows.get(start..start.checked_add(usize::try_from(count).ok()?)?)
}
