//! Loading: metadata, plan, read. Each function is a step; the order is in [`load_by`].

use std::path::Path;

use sconce_dtensor::{StateDict, TensorBuf, Value};
use sconce_mesh::ProcessGroup;

use crate::coordinate::Ranks;
use crate::metadata::Metadata;
use crate::plan::{LoadPlan, LoadReport};
use crate::planner::{DefaultLoadPlanner, LoadPlanner};
use crate::read::Reads;
use crate::storage::{Access, FileSystemReader, StorageReader};
use crate::tree::{self, Node};
use crate::{Error, Result};

/// How a checkpoint is loaded.
#[derive(Clone, Copy)]
pub struct LoadOptions<'g> {
    /// The ranks that load together; `None` for one process by itself.
    pub group: Option<&'g ProcessGroup>,
    /// When the checksums of the blocks that are read are compared.
    pub verify: Verify,
    /// Whether names that only the state or only the checkpoint has are an error; if not, they stay as they are.
    pub strict: bool,
    /// How local files are read.
    pub access: Access,
    /// Whether a box of which the checkpoint lacks a part is loaded as far as it goes.
    pub allow_partial: bool,
    /// Names of the state that are loaded, by prefix, pattern or list; `None` for all. The others stay, and nothing is
    /// reported as unexpected.
    pub select: Option<&'g (dyn Fn(&str) -> bool + Sync)>,
    /// The name in the checkpoint of a name of the state; `None` if they are the same.
    pub rename: Option<&'g (dyn Fn(&str) -> String + Sync)>,
}

/// When checksums are compared. A file without checksums is read without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// Each block before anything of it is copied, in the same pass: an error says which tensors hold new values
    /// already.
    #[default]
    AsRead,
    /// All blocks that any rank needs before anything is copied, and each again when it is: damage that is there when the
    /// load begins leaves the state on every rank as it was. Every byte is read twice.
    BeforeRead,
    /// Never.
    Off,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self {
            group: None,
            verify: Verify::default(),
            strict: true,
            access: Access::positional(),
            allow_partial: false,
            select: None,
            rename: None,
        }
    }
}

/// Loads a checkpoint into the state of one process, in place: aliases of its tensors see the loaded values.
///
/// # Errors
/// As [`load_with`].
pub fn load(path: impl AsRef<Path>, state: &mut StateDict<'_>) -> Result<LoadReport> {
    load_with(path, state, LoadOptions::default())
}

/// Loads a checkpoint into the state of all ranks of a group, in place, whatever layout it was saved under.
///
/// Blocks of which one rank wants a part are read by it; of which several do, by one of them, which hands the others their
/// parts: all ranks together read each byte once, and replicas what one of them reads. Memory: at most 64 MiB a rank.
///
/// Ranks: collective over `options.group`; all ranks see the same file system.
///
/// # Errors
/// `Missing`, `NotACheckpoint`, `Version`, `Corrupt`, `Length`; `KeyMismatch`, `ShapeMismatch`, `DTypeMismatch`,
/// `ValueMismatch`, `Uncovered`; `Busy`, `Replaced`, `Io`. With a group they come as `Ranks`, the same on every rank, or as `Mesh` if the
/// group broke. After them the state is on every rank as it was, unless the error is `PartlyLoaded`, which holds one of
/// them and says what was overwritten, or `Mesh`.
///
/// # Source
/// The protocol of `torch.distributed.checkpoint.load`; torch ignores names that are not asked for, and checks no bytes.
pub fn load_with(
    path: impl AsRef<Path>,
    state: &mut StateDict<'_>,
    options: LoadOptions<'_>,
) -> Result<LoadReport> {
    load_from(&FileSystemReader::new(path.as_ref(), options.access), state, options)
}

/// Loads from a storage of the caller's choice, of whatever format, with all that [`load_with`] does.
///
/// Ranks: collective over `options.group`.
///
/// # Errors
/// Those of the storage, and as [`load_with`].
pub fn load_from(
    reader: &dyn StorageReader,
    state: &mut StateDict<'_>,
    options: LoadOptions<'_>,
) -> Result<LoadReport> {
    let LoadOptions { allow_partial, select, rename, .. } = options;
    load_by(reader, &mut DefaultLoadPlanner { allow_partial, select, rename }, state, options)
}

/// Loads through a storage and a planner of the caller's choice: the protocol itself.
///
/// Of the options, those that are the default planner's do nothing here.
///
/// Ranks: collective over `options.group`.
///
/// # Errors
/// Those of planner and storage, and as [`load_with`].
pub fn load_by(
    reader: &dyn StorageReader,
    planner: &mut dyn LoadPlanner,
    state: &mut StateDict<'_>,
    options: LoadOptions<'_>,
) -> Result<LoadReport> {
    let ranks = Ranks(options.group);
    let planned = plan(reader, planner, state, options);
    let (metadata, plan) = ranks.all_ok("plan", planned)?;
    check_same(ranks, reader, &metadata)?;
    let reads = ranks.all_ok("open", Reads::open(reader, &metadata, &plan, state))?;
    reads.run(ranks, state, options.verify)?;
    let values = plan.values.iter().map(|(name, node)| (name.as_str(), node)).collect();
    tree::restore(state, &values);
    Ok(plan.report)
}

fn plan(
    reader: &dyn StorageReader,
    planner: &mut dyn LoadPlanner,
    state: &StateDict<'_>,
    options: LoadOptions<'_>,
) -> Result<(Metadata, LoadPlan)> {
    let metadata = reader.read_metadata()?;
    metadata.check_ranges(reader.path())?;
    let plan = planner.local_plan(state, &metadata)?;
    let LoadReport { missing, unexpected, .. } = &plan.report;
    if options.strict && !(missing.is_empty() && unexpected.is_empty()) {
        let (path, missing, unexpected) = (reader.path().to_owned(), missing.clone(), unexpected.clone());
        return Err(Error::KeyMismatch { path, missing, unexpected });
    }
    Ok((metadata, plan))
}

/// Refuses to load if another checkpoint took the place of one between two ranks' looks.
fn check_same(ranks: Ranks<'_>, reader: &dyn StorageReader, metadata: &Metadata) -> Result<()> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let seen = ranks.gather_all("compare", metadata.fingerprint())?;
    let is_same = seen.windows(2).all(|pair| pair[0] == pair[1]);
    is_same.then_some(()).ok_or_else(|| Error::Replaced { path: reader.path().to_owned() })
}

/// Loads a whole checkpoint of any layout into new memory of one process.
///
/// # Errors
/// As [`load_with`].
pub fn load_new(path: impl AsRef<Path>) -> Result<StateDict<'static>> {
    load_new_from(&FileSystemReader::new(path.as_ref(), Access::positional()), LoadOptions::default())
}

/// Loads what is selected of a storage into new memory of one process, each tensor whole.
///
/// # Errors
/// As [`load_with`].
pub fn load_new_from(reader: &dyn StorageReader, options: LoadOptions<'_>) -> Result<StateDict<'static>> {
    let metadata = reader.read_metadata()?;
    metadata.check_ranges(reader.path())?;
    let mut state = empty_state(&metadata, &metadata.tree, "", options.select)?;
    // The state has been selected; what it has is loaded under its own names.
    let strict = options.strict && options.select.is_none();
    load_from(reader, &mut state, LoadOptions { strict, select: None, rename: None, ..options })?;
    Ok(state)
}

/// What a checkpoint holds, without its data.
///
/// # Errors
/// `Missing`, `NotACheckpoint`, `Version`, `Corrupt`, `Io`.
pub fn read_metadata(path: impl AsRef<Path>) -> Result<Metadata> {
    FileSystemReader::new(path.as_ref(), Access::positional()).read_metadata()
}

type Select<'s> = Option<&'s (dyn Fn(&str) -> bool + Sync)>;

/// The selected part of the saved state with its plain values and tensors of zeros.
fn empty_state(metadata: &Metadata, tree: &Node, at: &str, select: Select<'_>) -> Result<StateDict<'static>> {
    let Node::Map(entries) = tree else { return Ok(StateDict::new()) };
    let mut state = StateDict::new();
    for (key, node) in entries {
        let name = tree::child(at, key);
        if select.is_none_or(|is_selected| node.leaves_below(&name).any(|leaf| is_selected(&leaf))) {
            state.insert(key.clone(), empty_value(metadata, node, &name, select)?);
        }
    }
    Ok(state)
}

fn empty_value(metadata: &Metadata, node: &Node, at: &str, select: Select<'_>) -> Result<Value<'static>> {
    match node {
        Node::Map(_) => Ok(Value::Map(empty_state(metadata, node, at, select)?)),
        Node::List(items) => {
            // A list keeps its length: what is not selected of it is loaded too.
            let item = |(nth, node): (usize, &Node)| {
                empty_value(metadata, node, &tree::child(at, &nth.to_string()), None)
            };
            items.iter().enumerate().map(item).collect::<Result<_>>().map(Value::List)
        }
        Node::Tensor => {
            let missing = || Error::ValueMismatch {
                fqn: at.to_owned(),
                expected: "a tensor".to_owned(),
                got: "no such tensor in the metadata".to_owned(),
            };
            let saved = metadata.tensor(at).ok_or_else(missing)?;
            let len = saved.shape.iter().product::<usize>() * saved.dtype.size_bytes();
            let zeros = TensorBuf::new(saved.dtype, &saved.shape, vec![0; len]);
            zeros.map(|zeros| Value::Tensor(Box::new(zeros))).map_err(|error| Error::tensor(at, &error))
        }
        plain => Ok(plain.plain_value().unwrap_or(Value::None)),
    }
}
