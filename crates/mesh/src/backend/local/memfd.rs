//! The segment's file: anonymous memory of fixed size, sealed so that nobody can shrink it under a mapping.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};

use super::ffi::Mapping;
use super::segment::Geometry;
use super::system;
use crate::{Error, Result};

/// A new segment of zeros and its mapping.
pub(super) fn create(geometry: Geometry) -> Result<(OwnedFd, Mapping)> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let fd = memfd_create("sconce-mesh", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|errno| system("memfd_create", errno))?;
    // It has no name, but /proc/PID/fd leads to it, and it is born open to all and executable.
    fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(|errno| system("fchmod", errno))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_its_users_alone_and_keeps_its_size() {
        let geometry = Geometry::new(2);
        let (fd, _mapping) = create(geometry).unwrap();
        assert_eq!(fstat(&fd).unwrap().st_mode & 0o7777, 0o600);
        for len in [0, geometry.len_bytes() as u64 + 1] {
            assert_eq!(ftruncate(&fd, len), Err(rustix::io::Errno::PERM));
        }
        assert!(fcntl_add_seals(&fd, SealFlags::WRITE).is_err(), "the seals are sealed");
    }
}
