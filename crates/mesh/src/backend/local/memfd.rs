//! The segment's file: anonymous memory of fixed size, sealed so that nobody can shrink it under a mapping.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};

use super::ffi::Mapping;
use super::segment::Geometry;
use super::system;
use crate::{Error, Result};

/// A new segment of zeros and its mapping.
pub(super) fn create(geometry: Geometry) -> Result<(OwnedFd, Mapping)> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let fd = memfd_create("sconce-mesh", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|errno| system("memfd_create", errno))?;
    ftruncate(&fd, geometry.len_bytes() as u64).map_err(|errno| system("ftruncate", errno))?;
    fcntl_add_seals(&fd, seals).map_err(|errno| system("fcntl(F_ADD_SEALS)", errno))?;
    let mapping = open(&fd, geometry)?;
    Ok((fd, mapping))
}

/// Maps a segment that came from another process, once it is found to be one.
///
/// # Errors
/// `Backend` if it could shrink or has another size.
pub(super) fn open(fd: &OwnedFd, geometry: Geometry) -> Result<Mapping> {
    let seals = fcntl_get_seals(fd).map_err(|errno| system("fcntl(F_GET_SEALS)", errno))?;
    let len_bytes = fstat(fd).map_err(|errno| system("fstat", errno))?.st_size;
    if !seals.contains(SealFlags::SHRINK) || len_bytes != geometry.len_bytes() as i64 {
        return Err(Error::Backend {
            backend: "local",
            call: "checking the segment".into(),
            cause: format!("{len_bytes} bytes with seals {seals:?}, expected {}", geometry.len_bytes()),
        });
    }
    Mapping::of_fd(fd.as_fd(), geometry).map_err(|errno| system("mmap", errno))
}
