//! Metadata to the bytes of a manifest.

use sconce_dtensor::DType;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::rows::{ChunkRow, FileRow, Prelude, TensorRow};
use super::{Head, MAGIC, Section, Sections};
use crate::format::MAJOR_VERSION;
use crate::metadata::{FileMetadata, Metadata, TensorStorageMetadata};
use crate::{Error, Result};

/// The columns while they grow.
#[derive(Default)]
struct Columns {
    tensors: Vec<TensorRow>,
    chunks: Vec<ChunkRow>,
    dims: Vec<U64>,
    files: Vec<FileRow>,
    blocks: Vec<U32>,
    names: Vec<u8>,
}

/// The manifest of a checkpoint.
///
/// # Errors
/// `Tensor` for a tensor of more than 255 dims, a name of 4 GiB, or a file without checksums; `ValueMismatch` for a state
/// nested deeper than a reader follows.
pub(crate) fn encode(metadata: &Metadata) -> Result<Vec<u8>> {
    metadata.tree.check_depth()?;
    let mut columns = Columns::default();
    metadata.tensors.iter().try_for_each(|tensor| columns.push_tensor(tensor))?;
    metadata.files.iter().try_for_each(|file| columns.push_file(file))?;
    let parts: [&[u8]; 6] = [
        columns.tensors.as_bytes(),
        columns.chunks.as_bytes(),
        columns.dims.as_bytes(),
        columns.files.as_bytes(),
        columns.blocks.as_bytes(),
        &columns.names,
    ];
    let [tensors, chunks, dims, files, blocks, names] =
        parts.map(|part| Section { len_bytes: part.len() as u64, crc32: crc32fast::hash(part) });
    let head = Head {
        created_by: concat!("sconce-checkpoint ", env!("CARGO_PKG_VERSION")).to_owned(),
        sections: Sections { tensors, chunks, dims, files, blocks, names },
        tree: metadata.tree.clone(),
    };
    let head = serde_json::to_vec(&head)
        .map_err(|e| Error::Tensor { fqn: String::new(), cause: format!("manifest: {e}") })?;
    Ok([prelude(&head).as_bytes(), &head, &parts.concat()].concat())
}

fn prelude(head: &[u8]) -> Prelude {
    let mut prelude = Prelude {
        magic: MAGIC,
        major: MAJOR_VERSION.into(),
        minor: 0.into(),
        head_len: (head.len() as u64).into(),
        head_crc32: crc32fast::hash(head).into(),
        crc32: 0.into(),
    };
    let (checked, _) = prelude.as_bytes().split_at(size_of::<Prelude>() - size_of::<U32>());
    prelude.crc32 = crc32fast::hash(checked).into();
    prelude
}

impl Columns {
    fn push_tensor(&mut self, tensor: &TensorStorageMetadata) -> Result<()> {
        let too_large = || Error::Tensor { fqn: tensor.fqn.clone(), cause: "too many dims".to_owned() };
        let (name_start, name_len) = self.push_name(&tensor.fqn)?;
        let shape_start = self.push_dims(&tensor.shape);
        let chunk_start = (self.chunks.len() as u64).into();
        for chunk in &tensor.chunks {
            let bounds_start = self.push_dims(&chunk.bounds.offsets);
            self.push_dims(&chunk.bounds.sizes);
            let (offset_bytes, file) = (chunk.offset_bytes.into(), (chunk.file as u64).into());
            self.chunks.push(ChunkRow { bounds_start, offset_bytes, file });
        }
        self.tensors.push(TensorRow {
            name_start,
            name_len,
            dtype: dtype_code(tensor.dtype),
            ndim: u8::try_from(tensor.shape.len()).map_err(|_| too_large())?,
            reserved: [0; 2],
            shape_start,
            chunk_start,
            chunk_count: (tensor.chunks.len() as u64).into(),
        });
        Ok(())
    }

    fn push_file(&mut self, file: &FileMetadata) -> Result<()> {
        let (name_start, name_len) = self.push_name(&file.name)?;
        let (len_bytes, block_start) = (file.len_bytes.into(), (self.blocks.len() as u64).into());
        let crcs = file.block_crcs.as_ref().ok_or_else(|| Error::Tensor {
            fqn: String::new(),
            cause: format!("manifest: {} has no checksums", file.name),
        })?;
        self.blocks.extend(crcs.iter().map(|crc| U32::new(*crc)));
        self.files.push(FileRow { name_start, name_len, reserved: 0.into(), len_bytes, block_start });
        Ok(())
    }

    fn push_name(&mut self, name: &str) -> Result<(U64, U32)> {
        let too_long =
            || Error::Tensor { fqn: name.chars().take(80).collect(), cause: "too long a name".to_owned() };
        let start = self.names.len() as u64;
        self.names.extend_from_slice(name.as_bytes());
        Ok((start.into(), u32::try_from(name.len()).map_err(|_| too_long())?.into()))
    }

    fn push_dims(&mut self, dims: &[usize]) -> U64 {
        let start = self.dims.len() as u64;
        self.dims.extend(dims.iter().map(|n| U64::new(*n as u64)));
        start.into()
    }
}

/// The number of a dtype on disk: its position in [`DType::ALL`], which only grows at the end.
fn dtype_code(dtype: DType) -> u8 {
    dtype as u8
}
