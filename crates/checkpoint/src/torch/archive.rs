//! Archives of `torch.save`, written: one tensor or one value each.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rawzip::{DataDescriptorOutput, Header, ZipArchiveWriter, extra_fields::ExtraFieldId};
use sconce_dtensor::{LocalTensor, TensorBox};

use super::dtypes::TorchDType;
use super::pickle::Writer;
use crate::threads::deal;
use crate::tree::Node;
use crate::{Error, Result};

/// torch aligns its storages to this, with an extra field of the local header.
const ALIGN_BYTES: u64 = 64;
const PADDING_FIELD: u16 = u16::from_le_bytes(*b"FB");
/// A local header without name and extra field.
const LOCAL_HEADER_BYTES: u64 = 30;
/// Headers and small pieces are put together up to this before they are written.
const BUFFER_BYTES: usize = 256 << 10;

/// A file of archives, one after the other.
pub(super) struct ArchiveFile {
    path: PathBuf,
    file: File,
    len_bytes: u64,
}

/// One box of a tensor.
pub(super) struct Part<'t> {
    pub(super) fqn: &'t str,
    pub(super) tensor: &'t dyn LocalTensor,
    pub(super) index: usize,
}

impl ArchiveFile {
    /// Creates `path`, which must not exist.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::io("create", path, &e))?;
        Ok(Self { path: path.to_owned(), file, len_bytes: 0 })
    }

    /// Appends each part as a tensor of its own, on several threads; where they begin.
    pub(super) fn add_parts(&mut self, parts: &[Part<'_>], threads: usize) -> Result<Vec<u64>> {
        let pickles: Vec<_> = parts.iter().map(Part::pickle).collect();
        let mut starts = Vec::with_capacity(parts.len());
        for (part, pickle) in parts.iter().zip(&pickles) {
            starts.push(self.len_bytes);
            self.len_bytes += self.told(archive_len(pickle, Some(part.len_bytes())))?;
        }
        deal(parts.len(), threads, |nth| {
            let part = &parts[nth];
            let mut write = |out: &mut dyn Write| part.write(out);
            let storage: Storage<'_> = (part.len_bytes(), &mut write);
            self.told(self.write_at(starts[nth], &pickles[nth], Some(storage)))
        })?;
        Ok(starts)
    }

    /// Appends an empty tensor; where it begins and how long it is.
    pub(super) fn add_empty(&mut self, dtype: sconce_dtensor::DType, shape: &[usize]) -> Result<(u64, u64)> {
        self.add_small(&pickle_of(dtype, shape), Some((0, &mut |_| Ok(0))))
    }

    /// Appends a value; where it begins and how long it is.
    pub(super) fn add_value(&mut self, node: &Node) -> Result<(u64, u64)> {
        let mut pickle = Writer::new();
        pickle.node(node);
        self.add_small(&pickle.finish(), None)
    }

    /// Ends the file, on the device with `sync`; its length.
    pub(super) fn finish(self, sync: bool) -> Result<u64> {
        if sync {
            self.file.sync_all().map_err(|e| Error::io("sync", &self.path, &e))?;
        }
        Ok(self.len_bytes)
    }

    fn add_small(&mut self, pickle: &[u8], storage: Option<Storage<'_>>) -> Result<(u64, u64)> {
        let start = self.len_bytes;
        let len = self.told(self.write_at(start, pickle, storage))?;
        self.len_bytes += len;
        Ok((start, len))
    }

    /// Writes an archive that begins at an offset of the file; its length.
    fn write_at(&self, at: u64, pickle: &[u8], storage: Option<Storage<'_>>) -> Result<u64, Fault> {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, At { file: &self.file, at });
        archive(&mut out, pickle, storage)?;
        out.flush()?;
        Ok(out.get_ref().at - at)
    }

    fn told<T>(&self, outcome: Result<T, Fault>) -> Result<T> {
        outcome.map_err(|fault| match fault {
            Fault::Tensor(error) => error,
            Fault::Io(e) => Error::io("write", &self.path, &e),
        })
    }
}

impl Part<'_> {
    fn len_bytes(&self) -> u64 {
        sconce_dtensor::box_len_bytes(self.tensor, self.index) as u64
    }

    fn pickle(&self) -> Vec<u8> {
        tensor_pickle(self.tensor, &self.tensor.local_boxes()[self.index])
    }

    fn write(&self, out: &mut dyn Write) -> Written {
        let len = self.len_bytes() as usize;
        let (mut crc, mut count, mut outcome) = (crc32fast::Hasher::new(), 0, Ok(()));
        let read = self.tensor.read_box_range(self.index, 0..len, &mut |bytes| {
            if outcome.is_ok() {
                crc.update(bytes);
                count += bytes.len();
                outcome = out.write_all(bytes);
            }
        });
        // What the tensor itself could not read is told as it is.
        read.map_err(|error| Fault::Tensor(Error::tensor(self.fqn, &error)))?;
        outcome?;
        match count == len {
            true => Ok(crc.finalize()),
            false => Err(std::io::Error::other("a tensor that changed while it was saved").into()),
        }
    }
}

/// Writes to a place of a file that others write elsewhere.
struct At<'f> {
    file: &'f File,
    at: u64,
}

impl Write for At<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write_at(bytes, self.at)?;
        self.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The length of a storage, and what writes it and returns its CRC32.
type Storage<'w> = (u64, &'w mut dyn FnMut(&mut dyn Write) -> Written);
type Written = Result<u32, Fault>;

/// Why a storage was not written.
enum Fault {
    Tensor(Error),
    Io(std::io::Error),
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Fault::Io(error)
    }
}

type Zip<'z> = ZipArchiveWriter<&'z mut dyn Write>;

/// The length of the archive with a storage of so many bytes: it depends on the names and on lengths alone.
fn archive_len(pickle: &[u8], storage: Option<u64>) -> Result<u64, Fault> {
    struct Count(u64);
    impl Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len() as u64;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    let mut zeros = |out: &mut dyn Write| -> Written {
        let step = [0; 1 << 16];
        let mut left = storage.unwrap_or(0);
        while left > 0 {
            let now = left.min(step.len() as u64);
            out.write_all(&step[..now as usize])?;
            left -= now;
        }
        Ok(0)
    };
    archive(&mut count, pickle, storage.map(|len| (len, &mut zeros as _)))?;
    Ok(count.0)
}

/// One archive with a storage, if any; its checksum comes after it.
fn archive(out: &mut dyn Write, pickle: &[u8], storage: Option<Storage<'_>>) -> Result<(), Fault> {
    let mut zip = ZipArchiveWriter::new(out);
    small(&mut zip, "archive/data.pkl", pickle)?;
    small(&mut zip, "archive/byteorder", b"little")?;
    if let Some((len, write)) = storage {
        let name = "archive/data/0";
        let header = zip.stream_offset() + LOCAL_HEADER_BYTES + name.len() as u64 + 4;
        let padding = vec![b'Z'; (header.next_multiple_of(ALIGN_BYTES) - header) as usize];
        let field = ExtraFieldId::new(PADDING_FIELD);
        let file =
            zip.new_file(name).extra_field(field, &padding, Header::LOCAL).map_err(std::io::Error::other)?;
        let (mut entry, _) = file.start().map_err(std::io::Error::other)?;
        let crc = write(&mut entry)?;
        entry.finish(DataDescriptorOutput::new(crc, len)).map_err(std::io::Error::other)?;
    }
    small(&mut zip, "archive/version", b"3\n")?;
    zip.finish().map_err(std::io::Error::other)?;
    Ok(())
}

fn small(zip: &mut Zip<'_>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let (mut entry, config) = zip.new_file(name).start().map_err(std::io::Error::other)?;
    let mut data = config.wrap(&mut entry);
    data.write_all(bytes)?;
    let (_, descriptor) = data.finish().map_err(std::io::Error::other)?;
    entry.finish(descriptor).map_err(std::io::Error::other)?;
    Ok(())
}

fn tensor_pickle(tensor: &dyn LocalTensor, bounds: &TensorBox) -> Vec<u8> {
    pickle_of(tensor.dtype(), &bounds.sizes)
}

/// `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`; v3 and an untyped storage for the dtypes that
/// torch never gave a storage class.
fn pickle_of(dtype: sconce_dtensor::DType, shape: &[usize]) -> Vec<u8> {
    let theirs = TorchDType::of(dtype);
    let numel: usize = shape.iter().product();
    let is_typed = !theirs.storage().is_empty();
    let mut strides = vec![1; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim] * shape[dim].max(1);
    }
    let mut pickle = Writer::new();
    pickle.class("torch._utils", if is_typed { "_rebuild_tensor_v2" } else { "_rebuild_tensor_v3" });
    pickle.mark();
    pickle.mark();
    pickle.str("storage");
    match is_typed {
        true => pickle.class("torch", theirs.storage()),
        false => pickle.class("torch.storage", "UntypedStorage"),
    }
    pickle.str("0");
    pickle.str("cpu");
    pickle.size(if is_typed { numel } else { numel * dtype.size_bytes() });
    pickle.tuple();
    pickle.persistent();
    pickle.int(0);
    pickle.sizes(shape);
    pickle.sizes(&strides);
    pickle.bool(false);
    pickle.class("collections", "OrderedDict");
    pickle.mark();
    pickle.tuple();
    pickle.call();
    if !is_typed {
        pickle.class("torch", theirs.name());
    }
    pickle.tuple();
    pickle.call();
    pickle.finish()
}
