//! System calls of a stopped thread, decoded: which paths and files of a directory each touches.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use libc::user_regs_struct;

/// A call that touches the directory.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) number: i64,
    pub(crate) arguments: [u64; 6],
    /// The thread that makes it.
    pub(crate) thread: i32,
    /// Paths that it names, in order, absolute.
    pub(crate) paths: Vec<PathBuf>,
    /// The open file that it works on: its position and path.
    pub(crate) file: Option<OpenFile>,
    /// Whether the first path existed before the call.
    pub(crate) existed: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct OpenFile {
    pub(crate) position: u64,
    pub(crate) path: PathBuf,
}

/// Where a call has its paths: `At` takes a directory's descriptor before the path.
enum Argument {
    Plain(usize),
    At(usize),
    File(usize),
}

use Argument::{At, File, Plain};

/// The calls that take paths or open files, as far as a program might use them on a checkpoint.
const CALLS: &[(i64, &[Argument])] = &[
    (libc::SYS_open, &[Plain(0)]),
    (libc::SYS_creat, &[Plain(0)]),
    (libc::SYS_stat, &[Plain(0)]),
    (libc::SYS_lstat, &[Plain(0)]),
    (libc::SYS_access, &[Plain(0)]),
    (libc::SYS_mkdir, &[Plain(0)]),
    (libc::SYS_rmdir, &[Plain(0)]),
    (libc::SYS_unlink, &[Plain(0)]),
    (libc::SYS_truncate, &[Plain(0)]),
    (libc::SYS_readlink, &[Plain(0)]),
    (libc::SYS_chmod, &[Plain(0)]),
    (libc::SYS_statfs, &[Plain(0)]),
    (libc::SYS_rename, &[Plain(0), Plain(1)]),
    (libc::SYS_link, &[Plain(0), Plain(1)]),
    (libc::SYS_symlink, &[Plain(1)]),
    (libc::SYS_openat, &[At(0)]),
    (libc::SYS_openat2, &[At(0)]),
    (libc::SYS_newfstatat, &[At(0)]),
    (libc::SYS_statx, &[At(0)]),
    (libc::SYS_faccessat, &[At(0)]),
    (libc::SYS_faccessat2, &[At(0)]),
    (libc::SYS_mkdirat, &[At(0)]),
    (libc::SYS_unlinkat, &[At(0)]),
    (libc::SYS_readlinkat, &[At(0)]),
    (libc::SYS_fchmodat, &[At(0)]),
    (libc::SYS_renameat, &[At(0), At(2)]),
    (libc::SYS_renameat2, &[At(0), At(2)]),
    (libc::SYS_linkat, &[At(0), At(2)]),
    (libc::SYS_read, &[File(0)]),
    (libc::SYS_write, &[File(0)]),
    (libc::SYS_close, &[File(0)]),
    (libc::SYS_fstat, &[File(0)]),
    (libc::SYS_lseek, &[File(0)]),
    (libc::SYS_mmap, &[File(4)]),
    (libc::SYS_ioctl, &[File(0)]),
    (libc::SYS_pread64, &[File(0)]),
    (libc::SYS_pwrite64, &[File(0)]),
    (libc::SYS_readv, &[File(0)]),
    (libc::SYS_writev, &[File(0)]),
    (libc::SYS_preadv, &[File(0)]),
    (libc::SYS_pwritev, &[File(0)]),
    (libc::SYS_preadv2, &[File(0)]),
    (libc::SYS_pwritev2, &[File(0)]),
    (libc::SYS_sendfile, &[File(0)]),
    (libc::SYS_copy_file_range, &[File(2)]),
    (libc::SYS_fcntl, &[File(0)]),
    (libc::SYS_flock, &[File(0)]),
    (libc::SYS_fsync, &[File(0)]),
    (libc::SYS_fdatasync, &[File(0)]),
    (libc::SYS_syncfs, &[File(0)]),
    (libc::SYS_sync_file_range, &[File(0)]),
    (libc::SYS_ftruncate, &[File(0)]),
    (libc::SYS_fallocate, &[File(0)]),
    (libc::SYS_fadvise64, &[File(0)]),
    (libc::SYS_fchmod, &[File(0)]),
    (libc::SYS_fstatfs, &[File(0)]),
    (libc::SYS_getdents64, &[File(0)]),
];

impl Call {
    /// The call that a thread is about to make, if it touches `dir` or what is below it.
    pub(crate) fn decode(thread: i32, registers: &user_regs_struct, dir: &Path) -> Option<Call> {
        let number = registers.orig_rax as i64;
        let r = registers;
        let arguments = [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9];
        let (_, places) = CALLS.iter().find(|(known, _)| *known == number)?;
        let (mut paths, mut file) = (Vec::new(), None);
        for place in *places {
            match place {
                Plain(at) => paths.push(path(thread, libc::AT_FDCWD, arguments[*at])?),
                At(at) => paths.push(path(thread, arguments[*at] as i32, arguments[at + 1])?),
                File(at) => file = open_file(thread, arguments[*at] as i32),
            }
        }
        let touched = paths.iter().chain(file.as_ref().map(|file| &file.path));
        if !touched.into_iter().any(|path| path.starts_with(dir)) {
            return None;
        }
        let existed = paths.first().is_some_and(|path| path.symlink_metadata().is_ok());
        Some(Call { number, arguments, thread, paths, file, existed })
    }

    /// Bytes of the caller's memory.
    pub(crate) fn memory(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let memory = fs::File::open(format!("/proc/{}/mem", self.thread)).expect("a stopped thread's memory");
        memory.read_exact_at(&mut bytes, address).expect("what a call is given can be read");
        bytes
    }

    /// The pieces of a vectored write, joined.
    pub(crate) fn vectored_memory(&self) -> Vec<u8> {
        let table = self.memory(self.arguments[1], self.arguments[2] as usize * 16);
        let word = |at: &[u8]| u64::from_ne_bytes(at.try_into().expect("8 bytes"));
        let pieces = table.chunks(16).map(|row| self.memory(word(&row[..8]), word(&row[8..]) as usize));
        pieces.collect::<Vec<_>>().concat()
    }
}

/// The path that a call names, without links being followed; `None` for none.
fn path(thread: i32, at: i32, address: u64) -> Option<PathBuf> {
    let memory = fs::File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut bytes = [0; 4096];
    let len = memory.read_at(&mut bytes, address).ok()?;
    let end = bytes[..len].iter().position(|byte| *byte == 0)?;
    let named = Path::new(std::str::from_utf8(&bytes[..end]).ok()?);
    let base = match at {
        libc::AT_FDCWD => fs::read_link(format!("/proc/{thread}/cwd")).ok()?,
        fd => fs::read_link(format!("/proc/{thread}/fd/{fd}")).unwrap_or_default(),
    };
    let joined = base.join(named);
    Some(joined.components().filter(|part| *part != Component::CurDir).collect())
}

fn open_file(thread: i32, fd: i32) -> Option<OpenFile> {
    let link = format!("/proc/{thread}/fd/{fd}");
    let path = fs::read_link(&link).ok()?;
    let about = fs::read_to_string(format!("/proc/{thread}/fdinfo/{fd}")).ok()?;
    let position = about.lines().find_map(|line| line.strip_prefix("pos:"))?.trim().parse().ok()?;
    Some(OpenFile { position, path })
}
