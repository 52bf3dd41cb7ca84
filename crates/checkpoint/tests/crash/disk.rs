//! A disk that forgets: what a file system may show after the power failed, given what was done to it and what was synced.
//!
//! ```text
//! file contents      kept, lost, zeros of the right length, the first half, or any of its sectors, each write for
//!                    itself, until the file is synced
//! directory entries  kept or lost, each change for itself (a rename within a directory is one), until the directory
//!                    is synced; syncing a file does not keep its name
//! ```
//!
//! That is less than any file system promises. Pure: it touches no disk.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// Position of a file or directory in [`Disk::nodes`]; the root is 0.
pub(crate) type Id = usize;

/// A tree with lengths and checksums for bytes.
pub(crate) type Digest = Vec<(PathBuf, Option<(usize, u32)>)>;

/// Files and directories, reachable or not.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    pub(crate) nodes: Vec<Node>,
}

#[derive(Debug, Clone)]
pub(crate) enum Node {
    Directory(BTreeMap<String, Id>),
    File(Vec<u8>),
}

/// What was done.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Write {
        file: Id,
        offset: usize,
        bytes: Vec<u8>,
    },
    Resize {
        file: Id,
        len: usize,
    },
    /// Names that come, go or change together.
    Entries {
        dir: Id,
        changes: Vec<(String, Option<Id>)>,
    },
    Sync {
        id: Id,
    },
}

/// What becomes of an operation that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lost,
    Kept,
    Zeros,
    FirstHalf,
    /// Sectors drawn by this number.
    Sectors(u64),
}

const SECTOR_BYTES: usize = 512;

/// Every path below the root, with the bytes of files.
pub(crate) type Tree = BTreeMap<PathBuf, Option<Vec<u8>>>;

impl Disk {
    /// An empty directory.
    pub(crate) fn new() -> Disk {
        Disk { nodes: vec![Node::Directory(BTreeMap::new())] }
    }

    /// A directory as it is now.
    pub(crate) fn of(dir: &Path) -> Disk {
        let mut disk = Disk::new();
        disk.scan(0, dir);
        disk
    }

    fn scan(&mut self, at: Id, dir: &Path) {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let is_dir = entry.file_type().unwrap().is_dir();
            let node = if is_dir {
                Node::Directory(BTreeMap::new())
            } else {
                Node::File(std::fs::read(entry.path()).unwrap())
            };
            let id = self.add(node);
            if is_dir {
                self.scan(id, &entry.path());
            }
            self.directory(at).insert(entry.file_name().into_string().unwrap(), id);
        }
    }

    /// A new node, which nothing names yet.
    pub(crate) fn add(&mut self, node: Node) -> Id {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// The node at a path below the root.
    pub(crate) fn find(&self, path: &Path) -> Option<Id> {
        path.iter().try_fold(0, |at, name| match &self.nodes[at] {
            Node::Directory(entries) => entries.get(name.to_str()?).copied(),
            Node::File(_) => None,
        })
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        self.apply_as(op, Fate::Kept);
    }

    fn apply_as(&mut self, op: &Op, fate: Fate) {
        if fate == Fate::Lost {
            return;
        }
        match op {
            Op::Write { file, offset, bytes } => {
                let end = offset + bytes.len();
                let content = self.file(*file);
                content.resize(content.len().max(end), 0);
                let mut random = 1;
                for (nth, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                    let start = nth * SECTOR_BYTES;
                    let is_kept = match fate {
                        Fate::Lost | Fate::Zeros => false,
                        Fate::Kept => true,
                        Fate::FirstHalf => start < bytes.len() / 2,
                        Fate::Sectors(seed) => {
                            random ^= if nth == 0 { seed } else { 0 };
                            next(&mut random).is_multiple_of(2)
                        }
                    };
                    if is_kept {
                        content[offset + start..offset + start + sector.len()].copy_from_slice(sector);
                    }
                }
            }
            Op::Resize { file, len } => self.file(*file).resize(*len, 0),
            Op::Entries { dir, changes } => {
                for (name, id) in changes {
                    match id {
                        Some(id) => self.directory(*dir).insert(name.clone(), *id),
                        None => self.directory(*dir).remove(name),
                    };
                }
            }
            Op::Sync { .. } => {}
        }
    }

    fn directory(&mut self, id: Id) -> &mut BTreeMap<String, Id> {
        match &mut self.nodes[id] {
            Node::Directory(entries) => entries,
            Node::File(_) => panic!("{id} is a file"),
        }
    }

    fn file(&mut self, id: Id) -> &mut Vec<u8> {
        match &mut self.nodes[id] {
            Node::File(bytes) => bytes,
            Node::Directory(_) => panic!("{id} is a directory"),
        }
    }

    /// What can be reached.
    pub(crate) fn tree(&self) -> Tree {
        let mut tree = Tree::new();
        self.collect(0, Path::new(""), &mut tree);
        tree
    }

    fn collect(&self, at: Id, path: &Path, tree: &mut Tree) {
        let Node::Directory(entries) = &self.nodes[at] else { return };
        for (name, id) in entries {
            let path = path.join(name);
            match &self.nodes[*id] {
                Node::File(bytes) => drop(tree.insert(path, Some(bytes.clone()))),
                Node::Directory(_) => {
                    tree.insert(path.clone(), None);
                    self.collect(*id, &path, tree);
                }
            }
        }
    }
}

/// Lends states that `disk` may be in if the power fails after the first `done` of `ops`, each once: `n_random`, and all
/// combinations of what is not drawn up to a bound, beyond it the extremes and what is near to them.
///
/// States that are in `seen` are passed over.
pub(crate) fn states(
    disk: &Disk,
    ops: &[Op],
    done: usize,
    n_random: usize,
    seen: &mut HashSet<Digest>,
    mut each: impl FnMut(&Tree),
) {
    let ops = &ops[..done];
    let open: Vec<usize> =
        (0..done).filter(|at| !is_synced(ops, *at)).filter(|at| n_fates(&ops[*at]) > 1).collect();
    for fates in assignments(ops, &open, n_random) {
        let mut crashed = disk.clone();
        for (at, op) in ops.iter().enumerate() {
            let fate = open.iter().position(|o| *o == at).map_or(Fate::Kept, |nth| fates[nth]);
            crashed.apply_as(op, fate);
        }
        let tree = crashed.tree();
        if seen.insert(digest(&tree)) {
            each(&tree);
        }
    }
}

fn is_synced(ops: &[Op], at: usize) -> bool {
    let touched = match &ops[at] {
        Op::Write { file, .. } | Op::Resize { file, .. } => *file,
        Op::Entries { dir, .. } => *dir,
        Op::Sync { .. } => return true,
    };
    ops[at..].iter().any(|op| matches!(op, Op::Sync { id } if *id == touched))
}

const FATES: [Fate; 4] = [Fate::Lost, Fate::Kept, Fate::Zeros, Fate::FirstHalf];

fn n_fates(op: &Op) -> usize {
    match op {
        Op::Write { .. } => 4,
        Op::Resize { .. } | Op::Entries { .. } => 2,
        Op::Sync { .. } => 1,
    }
}

/// Assignments of fates that are tried exhaustively.
const EXHAUSTIVE: usize = 512;

fn assignments(ops: &[Op], open: &[usize], n_random: usize) -> Vec<Vec<Fate>> {
    let choices: Vec<usize> = open.iter().map(|at| n_fates(&ops[*at])).collect();
    let mut random = 0x9e37_79b9_7f4a_7c15 ^ (ops.len() as u64);
    // Names are kept more often than not: of a directory without a name nothing is seen.
    let mut draw = |n: &usize| match (n, next(&mut random) % 8) {
        (2, drawn) => FATES[usize::from(drawn > 1)],
        (_, drawn) if drawn < 4 => FATES[drawn],
        _ => Fate::Sectors(next(&mut random) as u64),
    };
    let mut all: Vec<Vec<Fate>> = (0..n_random).map(|_| choices.iter().map(&mut draw).collect()).collect();
    let total = choices.iter().try_fold(1usize, |n, c| n.checked_mul(*c));
    if let Some(total) = total.filter(|total| *total <= EXHAUSTIVE) {
        all.extend((0..total).map(|nth| digits(nth, &choices)));
        return all;
    }
    for base in [Fate::Lost, Fate::Kept] {
        all.push(vec![base; open.len()]);
        for (at, n) in choices.iter().enumerate() {
            all.extend(FATES[..*n].iter().map(|fate| {
                let mut fates = vec![base; open.len()];
                fates[at] = *fate;
                fates
            }));
        }
    }
    // What a journal does: the first so many, in order.
    all.extend((0..open.len()).map(|kept| {
        let fate = |at| if at < kept { Fate::Kept } else { Fate::Lost };
        (0..open.len()).map(fate).collect()
    }));
    all
}

fn digits(mut nth: usize, choices: &[usize]) -> Vec<Fate> {
    let digit = |n: &usize| {
        let fate = FATES[nth % n];
        nth /= n;
        fate
    };
    choices.iter().map(digit).collect()
}

/// xorshift64*.
fn next(state: &mut u64) -> usize {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize
}

fn digest(tree: &Tree) -> Digest {
    let content = |bytes: &Vec<u8>| (bytes.len(), crc32fast::hash(bytes));
    tree.iter().map(|(path, bytes)| (path.clone(), bytes.as_ref().map(content))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(disk: &Disk, ops: &[Op]) -> HashSet<Tree> {
        let mut found = HashSet::new();
        states(disk, ops, ops.len(), 0, &mut HashSet::new(), |tree| {
            found.insert(tree.clone());
        });
        found
    }

    #[test]
    fn what_was_not_synced_may_be_lost_zeros_or_torn_and_what_was_synced_is_there() {
        let mut disk = Disk::new();
        let file = disk.add(Node::File(vec![]));
        let named = Op::Entries { dir: 0, changes: vec![("f".into(), Some(file))] };
        let written = Op::Write { file, offset: 0, bytes: vec![7; 1024] };
        let with = |bytes: &[u8]| Tree::from([(PathBuf::from("f"), Some(bytes.to_vec()))]);
        let torn = [[7; 512], [0; 512]].concat();
        let ops = [named.clone(), written.clone()];
        let expected = [Tree::new(), with(&[]), with(&[7; 1024]), with(&torn), with(&[0; 1024])];
        assert_eq!(all(&disk, &ops), HashSet::from(expected));
        let mut drawn = HashSet::new();
        states(&disk, &ops, 2, 100, &mut HashSet::new(), |tree| {
            drawn.insert(tree.clone());
        });
        assert!(
            drawn.contains(&with(&[[0; 512], [7; 512]].concat())),
            "any sector may be the one that is kept"
        );
        let ops = [named.clone(), written.clone(), Op::Sync { id: file }];
        assert_eq!(all(&disk, &ops), HashSet::from([Tree::new(), with(&[7; 1024])]));
        let ops = [named, written, Op::Sync { id: file }, Op::Sync { id: 0 }];
        assert_eq!(all(&disk, &ops), HashSet::from([with(&[7; 1024])]));
    }

    #[test]
    fn a_rename_is_one_change() {
        let mut disk = Disk::new();
        let (a, b) = (disk.add(Node::File(vec![1])), disk.add(Node::File(vec![2])));
        disk.apply(&Op::Entries { dir: 0, changes: vec![("a".into(), Some(a)), ("b".into(), Some(b))] });
        let exchange = Op::Entries { dir: 0, changes: vec![("a".into(), Some(b)), ("b".into(), Some(a))] };
        let is = |a: u8, b: u8| {
            Tree::from([(PathBuf::from("a"), Some(vec![a])), (PathBuf::from("b"), Some(vec![b]))])
        };
        assert_eq!(all(&disk, &[exchange]), HashSet::from([is(1, 2), is(2, 1)]));
    }
}
