//! Archives of `torch.save`, written: one tensor or one value each.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rawzip::{DataDescriptorOutput, Header, ZipArchiveWriter, extra_fields::ExtraFieldId};
use sconce_dtensor::{LocalTensor, TensorBox};

use super::dtypes::TorchDType;
use super::pickle::Writer;
use crate::tree::Node;
use crate::{Error, Result};

/// torch aligns its storages to this, with an extra field of the local header.
const ALIGN_BYTES: u64 = 64;
const PADDING_FIELD: u16 = u16::from_le_bytes(*b"FB");
/// A local header without name and extra field.
const LOCAL_HEADER_BYTES: u64 = 30;

/// A file of archives, one after the other.
pub(super) struct ArchiveFile {
    path: PathBuf,
    file: BufWriter<File>,
    len_bytes: u64,
}

/// Counts what goes to the file.
struct Counted<'f> {
    file: &'f mut BufWriter<File>,
    count: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.count += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl ArchiveFile {
    /// Creates `path`, which must not exist.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::io("create", path, &e))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::with_capacity(1 << 20, file), len_bytes: 0 })
    }

    /// Appends one box of a tensor as a tensor of its own; where it begins and how long it is.
    pub(super) fn add_box(
        &mut self,
        fqn: &str,
        tensor: &dyn LocalTensor,
        index: usize,
    ) -> Result<(u64, u64)> {
        let pickle = tensor_pickle(tensor, &tensor.local_boxes()[index]);
        let len = sconce_dtensor::box_len_bytes(tensor, index);
        self.add(&pickle, Some(len as u64), |out| {
            let mut outcome = Ok(());
            let read = tensor.read_box_range(index, 0..len, &mut |bytes| {
                if outcome.is_ok() {
                    outcome = out(bytes);
                }
            });
            // What the tensor itself could not read is told as it is.
            read.map_err(|error| Fault::Tensor(Error::tensor(fqn, &error)))?;
            outcome.map_err(Fault::Io)
        })
    }

    /// Appends an empty tensor.
    pub(super) fn add_empty(&mut self, dtype: sconce_dtensor::DType, shape: &[usize]) -> Result<(u64, u64)> {
        let pickle = pickle_of(dtype, shape);
        self.add(&pickle, Some(0), |_| Ok(()))
    }

    /// Appends a value.
    pub(super) fn add_value(&mut self, node: &Node) -> Result<(u64, u64)> {
        let mut pickle = Writer::new();
        pickle.node(node);
        self.add(&pickle.finish(), None, |_| Ok(()))
    }

    /// Ends the file, on the device with `sync`; its length.
    pub(super) fn finish(self, sync: bool) -> Result<u64> {
        let Self { path, file, len_bytes } = self;
        let file = file.into_inner().map_err(|e| Error::io("write", &path, e.error()))?;
        if sync {
            file.sync_all().map_err(|e| Error::io("sync", &path, &e))?;
        }
        Ok(len_bytes)
    }

    fn add(
        &mut self,
        pickle: &[u8],
        storage: Option<u64>,
        write: impl FnOnce(&mut Take<'_>) -> Outcome,
    ) -> Result<(u64, u64)> {
        let start = self.len_bytes;
        let mut counted = Counted { file: &mut self.file, count: 0 };
        let written = archive(&mut counted, pickle, storage, write);
        let len = counted.count;
        written.map_err(|fault| match fault {
            Fault::Tensor(error) => error,
            Fault::Io(e) => Error::io("write", &self.path, &e),
        })?;
        self.len_bytes += len;
        Ok((start, len))
    }
}

/// Takes the next bytes of a storage.
type Take<'w> = dyn FnMut(&[u8]) -> std::io::Result<()> + 'w;
type Outcome = std::result::Result<(), Fault>;

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

type Zip<'z, 'f> = ZipArchiveWriter<&'z mut Counted<'f>>;

/// One archive with a storage of `storage` bytes, if any, which `write` gives; its checksum comes after it.
fn archive(
    out: &mut Counted<'_>,
    pickle: &[u8],
    storage: Option<u64>,
    write: impl FnOnce(&mut Take<'_>) -> Outcome,
) -> Outcome {
    let mut zip = ZipArchiveWriter::new(out);
    small(&mut zip, "archive/data.pkl", pickle)?;
    small(&mut zip, "archive/byteorder", b"little")?;
    if let Some(len) = storage {
        let name = "archive/data/0";
        let header = zip.stream_offset() + LOCAL_HEADER_BYTES + name.len() as u64 + 4;
        let padding = vec![b'Z'; (header.next_multiple_of(ALIGN_BYTES) - header) as usize];
        let field = ExtraFieldId::new(PADDING_FIELD);
        let file =
            zip.new_file(name).extra_field(field, &padding, Header::LOCAL).map_err(std::io::Error::other)?;
        let (mut entry, _) = file.start().map_err(std::io::Error::other)?;
        let (mut crc, mut count) = (crc32fast::Hasher::new(), 0);
        write(&mut |bytes| {
            count += bytes.len() as u64;
            crc.update(bytes);
            entry.write_all(bytes)
        })?;
        if count != len {
            return Err(std::io::Error::other("a tensor that changed while it was saved").into());
        }
        let descriptor = DataDescriptorOutput::new(crc.finalize(), len);
        entry.finish(descriptor).map_err(std::io::Error::other)?;
    }
    small(&mut zip, "archive/version", b"3\n")?;
    zip.finish().map_err(std::io::Error::other)?;
    Ok(())
}

fn small(zip: &mut Zip<'_, '_>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
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
