//! Records what traced processes do to a directory, as operations on a [`Disk`].

use std::path::{Path, PathBuf};

use super::disk::{Disk, Id, Node, Op};
use super::syscall::Call;
use super::tracer::Observer;

/// What was done so far.
pub(crate) struct Recorder {
    root: PathBuf,
    /// The directory before anything was done; with every node that came later, unnamed.
    pub(crate) before: Disk,
    pub(crate) ops: Vec<Op>,
    /// The directory now.
    now: Disk,
}

impl Recorder {
    pub(crate) fn of(root: &Path) -> Recorder {
        let before = Disk::of(root);
        Recorder { root: root.to_owned(), now: before.clone(), before, ops: Vec::new() }
    }

    /// Checks that the recorded operations lead to what is on the disk: nothing was overlooked.
    pub(crate) fn check(&self) {
        assert!(self.now.tree() == Disk::of(&self.root).tree(), "the recorder overlooked an operation");
    }

    fn push(&mut self, op: Op) {
        self.now.apply(&op);
        self.ops.push(op);
    }

    fn relative<'p>(&self, path: &'p Path) -> Option<&'p Path> {
        path.strip_prefix(&self.root).ok()
    }

    fn find(&self, path: &Path) -> Option<Id> {
        self.now.find(self.relative(path)?)
    }

    /// The directory that a path is in, and its name there.
    fn place(&self, path: &Path) -> Option<(Id, String)> {
        let path = self.relative(path)?;
        Some((self.now.find(path.parent()?)?, path.file_name()?.to_str()?.to_owned()))
    }

    fn create(&mut self, path: &Path, node: Node) {
        let Some((dir, name)) = self.place(path) else { return };
        self.before.add(node.clone());
        let id = self.now.add(node);
        self.push(Op::Entries { dir, changes: vec![(name, Some(id))] });
    }

    fn open(&mut self, call: &Call, flags: u64) {
        let path = &call.paths[0];
        let has = |flag: i32| flags & flag as u64 != 0;
        if has(libc::O_CREAT) && !call.existed {
            self.create(path, Node::File(Vec::new()));
        } else if has(libc::O_TRUNC) {
            let file = self.find(path).expect("a file that is truncated is known");
            self.push(Op::Resize { file, len: 0 });
        }
    }

    fn rename(&mut self, call: &Call, flags: u64) {
        let [from, to] = &call.paths[..] else { panic!("{call:?}") };
        let (dir, from_name) = self.place(from).expect("renames are inside the directory");
        let (to_dir, to_name) = self.place(to).expect("renames are inside the directory");
        assert_eq!(dir, to_dir, "teach the disk renames between directories: {call:?}");
        let taken = (flags & u64::from(libc::RENAME_EXCHANGE) != 0).then(|| self.find(to)).flatten();
        let changes = vec![(from_name, taken), (to_name, self.find(from))];
        self.push(Op::Entries { dir, changes });
    }

    fn write(&mut self, call: &Call, bytes: Vec<u8>, offset: u64) {
        if let Some(file) = self.file_of(call) {
            self.push(Op::Write { file, offset: offset as usize, bytes });
        }
    }

    /// The file that a call works on; `None` if it was removed, or is a directory's.
    fn file_of(&self, call: &Call) -> Option<Id> {
        self.find(&call.file.as_ref()?.path)
    }

    fn resize(&mut self, file: Option<Id>, len: impl FnOnce(usize) -> usize) {
        let Some(file) = file else { return };
        let Node::File(bytes) = &self.now.nodes[file] else { panic!("{file} is a directory") };
        let len = len(bytes.len());
        self.push(Op::Resize { file, len });
    }
}

impl Observer for Recorder {
    fn succeeded(&mut self, call: &Call, returned: u64) {
        let arguments = call.arguments;
        let done = returned as usize;
        match call.number {
            libc::SYS_open => self.open(call, arguments[1]),
            libc::SYS_openat => self.open(call, arguments[2]),
            libc::SYS_mkdir | libc::SYS_mkdirat => {
                self.create(&call.paths[0], Node::Directory(Default::default()));
            }
            libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_rmdir => {
                let (dir, name) = self.place(&call.paths[0]).expect("what is removed is known");
                self.push(Op::Entries { dir, changes: vec![(name, None)] });
            }
            libc::SYS_link | libc::SYS_linkat => {
                let (dir, name) = self.place(&call.paths[1]).expect("links are inside the directory");
                let file = self.find(&call.paths[0]);
                self.push(Op::Entries { dir, changes: vec![(name, file)] });
            }
            libc::SYS_rename | libc::SYS_renameat => self.rename(call, 0),
            libc::SYS_renameat2 => self.rename(call, arguments[4]),
            libc::SYS_write => {
                let position = call.file.as_ref().map_or(0, |file| file.position);
                self.write(call, call.memory(arguments[1], done), position);
            }
            libc::SYS_pwrite64 => self.write(call, call.memory(arguments[1], done), arguments[3]),
            libc::SYS_pwritev | libc::SYS_pwritev2 => {
                let bytes = call.vectored_memory()[..done].to_vec();
                self.write(call, bytes, arguments[3]);
            }
            libc::SYS_writev => {
                let position = call.file.as_ref().map_or(0, |file| file.position);
                let bytes = call.vectored_memory()[..done].to_vec();
                self.write(call, bytes, position);
            }
            libc::SYS_ftruncate => self.resize(self.file_of(call), |_| arguments[1] as usize),
            libc::SYS_fallocate if arguments[1] == 0 => {
                self.resize(self.file_of(call), |len| len.max((arguments[2] + arguments[3]) as usize));
            }
            libc::SYS_fallocate => assert_eq!(arguments[1], libc::FALLOC_FL_KEEP_SIZE as u64, "{call:?}"),
            libc::SYS_fsync | libc::SYS_fdatasync => {
                if let Some(id) = self.file_of(call) {
                    self.push(Op::Sync { id });
                }
            }
            libc::SYS_truncate | libc::SYS_copy_file_range | libc::SYS_sendfile | libc::SYS_symlink => {
                panic!("teach the recorder this call: {call:?}");
            }
            _ => {}
        }
    }
}
