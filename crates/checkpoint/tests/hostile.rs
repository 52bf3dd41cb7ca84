//! Checkpoints that others made, and the rights of those that we make.

#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use sconce_checkpoint::{Error, load_new, read_metadata, save};
use sconce_dtensor::{DType, StateDict, TensorBuf};

fn saved(dir: &Path) -> PathBuf {
    let mut state = StateDict::new();
    state.insert_tensor("w", TensorBuf::new(DType::U8, &[4], vec![1, 2, 3, 4]).unwrap());
    let path = dir.join("checkpoint");
    save(&path, &state).unwrap();
    path
}

fn files(checkpoint: &Path) -> Vec<PathBuf> {
    fs::read_dir(checkpoint).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_pipe_in_a_files_place_is_an_error_not_a_hang() {
    let dir = tempfile::tempdir().unwrap();
    for nth in 0..2 {
        let path = saved(&dir.path().join(nth.to_string()));
        let file = &files(&path)[nth];
        fs::remove_file(file).unwrap();
        mknodat(CWD, file, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let error = load_new(&path).unwrap_err();
        let is_named =
            matches!(&error, Error::Io { path, cause, .. } if path == file && cause == "not a regular file");
        assert!(is_named, "{error}");
    }
}

#[test]
fn a_manifest_that_is_a_device_or_a_directory_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    fs::create_dir_all(path.join("manifest.sconce")).unwrap();
    assert!(read_metadata(&path).is_err());
    fs::remove_dir(path.join("manifest.sconce")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", path.join("manifest.sconce")).unwrap();
    assert!(read_metadata(&path).unwrap_err().to_string().contains("not a regular file"));
}

#[test]
fn files_are_made_with_the_rights_that_the_umask_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for (mask, file, directory) in [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)] {
        let before = rustix::process::umask(Mode::from_raw_mode(mask));
        let path = saved(&dir.path().join(format!("{mask:o}")));
        rustix::process::umask(before);
        assert_eq!(mode(&path), directory, "umask {mask:o}");
        for made in files(&path) {
            assert_eq!(mode(&made), file, "umask {mask:o}: {}", made.display());
        }
    }
}
