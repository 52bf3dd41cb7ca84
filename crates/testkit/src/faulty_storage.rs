//! Storage and tensors that obey a fault plan: decorators of the traits of sconce-checkpoint and sconce-dtensor.

use std::path::Path;

use sconce_checkpoint::{
    DataFile, Error, FileMetadata, Layout, Metadata, Result, SaveReport, StorageReader, StorageWriter,
    WritePlan, WrittenFile,
};
use sconce_dtensor::{DType, LocalTensor, StateDict, TensorBox};

use crate::faults::{Faults, Verdict};

fn injected(op: &str, path: &Path) -> Error {
    Error::Io { op: op.to_owned(), path: path.to_owned(), os_error: Some(5), cause: "injected".to_owned() }
}

/// A writer that obeys a plan: operations `prepare`, `write`, `finish`, `discard`, and each again with `after`.
pub struct FaultyWriter<W> {
    inner: W,
    faults: Faults,
}

impl<W: StorageWriter> FaultyWriter<W> {
    /// Decorates `inner`.
    pub fn new(inner: W, faults: Faults) -> Self {
        Self { inner, faults }
    }

    fn around<R>(&mut self, op: &str, run: impl FnOnce(&mut W) -> Result<R>) -> Result<R> {
        self.strike(op)?;
        let result = run(&mut self.inner)?;
        self.strike(&format!("after {op}"))?;
        Ok(result)
    }

    fn strike(&self, op: &str) -> Result<()> {
        match self.faults.at(op) {
            Verdict::Fail => Err(injected(op, Path::new("fault"))),
            Verdict::GoOn | Verdict::Corrupt => Ok(()),
        }
    }
}

impl<W: StorageWriter> StorageWriter for FaultyWriter<W> {
    fn prepare(&mut self, layout: &Layout) -> Result<Vec<u8>> {
        self.around("prepare", |inner| inner.prepare(layout))
    }

    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>> {
        self.around("write", |inner| inner.write(place, plan, state))
    }

    fn finish(&mut self, layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<SaveReport> {
        self.around("finish", |inner| inner.finish(layout, written))
    }

    fn discard(&mut self) {
        // It cannot fail, but it can be late, or the last thing that a process does.
        let _cannot_fail = self.faults.at("discard");
        self.inner.discard();
    }
}

/// A reader that obeys a plan: operations `read_metadata`, `open` and `read_at`; the last may be corrupted.
pub struct FaultyReader<R> {
    inner: R,
    faults: Faults,
}

impl<R: StorageReader> FaultyReader<R> {
    /// Decorates `inner`.
    pub fn new(inner: R, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

impl<R: StorageReader> StorageReader for FaultyReader<R> {
    fn read_metadata(&self) -> Result<Metadata> {
        match self.faults.at("read_metadata") {
            Verdict::Fail => Err(injected("read_metadata", self.path())),
            Verdict::GoOn | Verdict::Corrupt => self.inner.read_metadata(),
        }
    }

    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        match self.faults.at("open") {
            Verdict::Fail => Err(injected("open", self.path())),
            Verdict::GoOn | Verdict::Corrupt => {
                let inner = self.inner.open(file)?;
                Ok(Box::new(FaultyFile { inner, faults: self.faults.clone() }))
            }
        }
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }
}

struct FaultyFile {
    inner: Box<dyn DataFile>,
    faults: Faults,
}

impl DataFile for FaultyFile {
    fn read_at(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()> {
        let verdict = self.faults.at("read_at");
        if verdict == Verdict::Fail {
            return Err(injected("read_at", self.path()));
        }
        self.inner.read_at(offset_bytes, to)?;
        if let Some(middle) = to.len().checked_sub(1).filter(|_| verdict == Verdict::Corrupt) {
            to[middle / 2] ^= 0x10;
        }
        Ok(())
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }
}

/// A tensor that obeys a plan when it is read to be saved or written when loaded: operations `read_box`, `write_box`.
pub struct FaultyTensor<T> {
    inner: T,
    faults: Faults,
}

impl<T: LocalTensor> FaultyTensor<T> {
    /// Decorates `inner`.
    pub fn new(inner: T, faults: Faults) -> Self {
        Self { inner, faults }
    }

    fn strike(&self, op: &'static str) -> sconce_dtensor::Result<()> {
        match self.faults.at(op) {
            Verdict::Fail => Err(sconce_dtensor::Error::Mesh(sconce_mesh::Error::Backend {
                backend: "fault",
                call: op.to_owned(),
                cause: "injected".to_owned(),
            })),
            Verdict::GoOn | Verdict::Corrupt => Ok(()),
        }
    }
}

impl<T: LocalTensor> LocalTensor for FaultyTensor<T> {
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
        self.strike("read_box")?;
        self.inner.read_box(index, read)
    }
    fn write_box(&mut self, index: usize, write: &mut dyn FnMut(&mut [u8])) -> sconce_dtensor::Result<()> {
        self.strike("write_box")?;
        self.inner.write_box(index, write)
    }
    fn deep_copy(&self) -> sconce_dtensor::Result<Box<dyn LocalTensor>> {
        self.inner.deep_copy()
    }
}
