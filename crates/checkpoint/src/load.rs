//! Loading: metadata, plan, verify, read. Each function is a step; the order is in [`load_with`].
//!
//! Nothing of the destination is touched before every rank has found everything that it needs whole.

use std::collections::HashSet;
use std::path::Path;

use sconce_dtensor::{LocalTensor, StateDict, TensorBuf, Value};
use sconce_mesh::ProcessGroup;

use crate::coordinate::Ranks;
use crate::format::{MANIFEST_NAME, manifest};
use crate::metadata::Metadata;
use crate::planner::{ReadPlan, plan_reads, touched_blocks};
use crate::storage::{Access, ShardReader};
use crate::tree::Node;
use crate::{Error, Result};

/// How a checkpoint is loaded.
#[derive(Clone, Copy)]
pub struct LoadOptions<'g> {
    /// The ranks that load together; `None` for one process by itself.
    pub group: Option<&'g ProcessGroup>,
    /// Whether the checksums of all blocks that are read are compared first.
    pub verify: bool,
    /// Whether names that only the state or only the checkpoint has are an error; if not, they stay as they are.
    pub strict: bool,
    /// How files are read.
    pub access: Access,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self { group: None, verify: true, strict: true, access: Access::positional() }
    }
}

/// Names that a load left alone; empty if it was strict.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadReport {
    /// Names that the state has and the checkpoint lacks.
    pub missing: Vec<String>,
    /// Names that the checkpoint has and the state lacks.
    pub unexpected: Vec<String>,
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
/// Every rank reads the bytes that it lacks and no others, but for the blocks that checksums cover.
///
/// Ranks: collective over `options.group`; all ranks see the same file system.
///
/// # Errors
/// `Missing`, `NotACheckpoint`, `Version`, `Corrupt`, `Length`; `KeyMismatch`, `ShapeMismatch`, `DTypeMismatch`,
/// `ValueMismatch`, `Uncovered`; `Io`. With a group they come as `Ranks`, the same on every rank, or as `Mesh` if the
/// group broke. After any of them but `Mesh` and an `Io` of the last step, the state is on every rank as it was.
///
/// # Source
/// The protocol of `torch.distributed.checkpoint.load`; torch ignores names that are not asked for, and checks no bytes.
pub fn load_with(
    path: impl AsRef<Path>,
    state: &mut StateDict<'_>,
    options: LoadOptions<'_>,
) -> Result<LoadReport> {
    let (path, ranks) = (path.as_ref(), Ranks(options.group));
    let (plan, report) = ranks.all_ok("plan", Load::plan(path, state, options))?;
    let verified = if options.verify { plan.verify() } else { Ok(()) };
    ranks.all_ok("verify", verified)?;
    ranks.all_ok("read", plan.read(state))?;
    Ok(report)
}

/// Loads a whole checkpoint of any layout into new memory of one process.
///
/// # Errors
/// As [`load_with`].
pub fn load_new(path: impl AsRef<Path>) -> Result<StateDict<'static>> {
    let path = path.as_ref();
    let metadata = read_metadata(path)?;
    let mut state = empty_state(&metadata, &metadata.tree, "")?;
    load(path, &mut state)?;
    Ok(state)
}

/// What a checkpoint holds, without its data.
///
/// # Errors
/// `Missing`, `NotACheckpoint`, `Version`, `Corrupt`, `Io`.
pub fn read_metadata(path: impl AsRef<Path>) -> Result<Metadata> {
    let path = path.as_ref();
    let file = path.join(MANIFEST_NAME);
    match std::fs::read(&file) {
        Ok(bytes) => manifest::decode(&file, &bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !path.exists() => {
            Err(Error::Missing { path: path.to_owned() })
        }
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            let reason = format!("it has no {MANIFEST_NAME}: it was never committed, or is something else");
            Err(Error::NotACheckpoint { path: path.to_owned(), reason })
        }
        Err(e) => Err(Error::io("read", &file, &e)),
    }
}

/// One rank's load: what it reads from which files.
struct Load {
    metadata: Metadata,
    /// By name; one plan a box.
    tensors: Vec<(String, Vec<ReadPlan>)>,
    /// The files that this rank reads, at their positions in the metadata.
    readers: Vec<Option<ShardReader>>,
    /// The blocks of each file that this rank touches.
    blocks: Vec<Vec<usize>>,
}

impl Load {
    fn plan(path: &Path, state: &StateDict<'_>, options: LoadOptions<'_>) -> Result<(Self, LoadReport)> {
        let metadata = read_metadata(path)?;
        let wanted = Node::of(state);
        let report = compare_names(&wanted, &metadata.tree);
        if options.strict && report != LoadReport::default() {
            let LoadReport { missing, unexpected } = report;
            return Err(Error::KeyMismatch { path: path.to_owned(), missing, unexpected });
        }
        metadata.tree.check_restorable(&wanted, "")?;
        let tensors = plan_tensors(&metadata, state)?;
        let plans = tensors.iter().flat_map(|(_, plans)| plans);
        let blocks = touched_blocks(&metadata, plans);
        let open = |(file, blocks): (_, &Vec<usize>)| match blocks.is_empty() {
            true => Ok(None),
            false => ShardReader::open(path, file, options.access).map(Some),
        };
        let readers = metadata.files.iter().zip(&blocks).map(open).collect::<Result<_>>()?;
        Ok((Self { metadata, tensors, readers, blocks }, report))
    }

    /// Compares the checksum of every block that this rank touches.
    fn verify(&self) -> Result<()> {
        let mut buffer = Vec::new();
        for ((file, reader), blocks) in self.metadata.files.iter().zip(&self.readers).zip(&self.blocks) {
            let Some(reader) = reader else { continue };
            blocks.iter().try_for_each(|block| reader.verify_block(file, *block, &mut buffer))?;
        }
        Ok(())
    }

    /// Copies every run into its place, then the plain values.
    fn read(&self, state: &mut StateDict<'_>) -> Result<()> {
        let mut targets = state.flat_tensors_mut().map_err(|error| Error::tensor("", &error))?;
        for (fqn, plans) in &self.tensors {
            let Some(tensor) = targets.get_mut(&sconce_dtensor::Fqn(fqn.clone())) else { continue };
            for (index, plan) in plans.iter().enumerate() {
                self.read_box(fqn, *tensor, index, plan)?;
            }
        }
        self.metadata.tree.restore(state);
        Ok(())
    }

    fn read_box(&self, fqn: &str, tensor: &mut dyn LocalTensor, index: usize, plan: &ReadPlan) -> Result<()> {
        let mut outcome = Ok(());
        let lent = tensor.write_box(index, &mut |bytes| outcome = self.read_runs(plan, bytes));
        lent.map_err(|error| Error::tensor(fqn, &error))?;
        outcome
    }

    fn read_runs(&self, plan: &ReadPlan, bytes: &mut [u8]) -> Result<()> {
        for run in &plan.runs {
            let Some(reader) = &self.readers[run.file] else {
                unreachable!("files with runs were opened by the plan");
            };
            reader.read(run.offset_bytes, &mut bytes[run.dst_bytes..run.dst_bytes + run.len_bytes])?;
        }
        Ok(())
    }
}

fn plan_tensors(metadata: &Metadata, state: &StateDict<'_>) -> Result<Vec<(String, Vec<ReadPlan>)>> {
    let tensors = state.flat_tensors().map_err(|error| Error::tensor("", &error))?;
    let mut planned = Vec::with_capacity(tensors.len());
    for (fqn, tensor) in tensors {
        if let Some(saved) = metadata.tensor(fqn.as_str()) {
            let plans = plan_reads(fqn.as_str(), tensor, saved)?;
            planned.push((fqn.0, plans));
        }
    }
    Ok(planned)
}

fn compare_names(wanted: &Node, saved: &Node) -> LoadReport {
    let names = |node: &Node| node.leaves().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let (wanted, saved) = (names(wanted), names(saved));
    let without = |names: &[String], others: &[String]| {
        let others: HashSet<&String> = others.iter().collect();
        names.iter().filter(|name| !others.contains(name)).cloned().collect::<Vec<_>>()
    };
    LoadReport { missing: without(&wanted, &saved), unexpected: without(&saved, &wanted) }
}

/// The saved state with its plain values and tensors of zeros.
fn empty_state(metadata: &Metadata, tree: &Node, at: &str) -> Result<StateDict<'static>> {
    let Node::Map(entries) = tree else { return Ok(StateDict::new()) };
    let entry = |(key, node): &(String, Node)| {
        Ok((key.clone(), empty_value(metadata, node, &crate::tree::child(at, key))?))
    };
    entries.iter().map(entry).collect::<Result<Vec<_>>>().map(StateDict::from_iter)
}

fn empty_value(metadata: &Metadata, node: &Node, at: &str) -> Result<Value<'static>> {
    match node {
        Node::Map(_) => Ok(Value::Map(empty_state(metadata, node, at)?)),
        Node::List(items) => {
            let numbered = items.iter().enumerate();
            let item = |(nth, node): (usize, &Node)| {
                empty_value(metadata, node, &crate::tree::child(at, &nth.to_string()))
            };
            numbered.map(item).collect::<Result<_>>().map(Value::List)
        }
        Node::Tensor => {
            let missing = || Error::ValueMismatch {
                fqn: at.to_owned(),
                expected: "a tensor".to_owned(),
                got: "no such tensor in the manifest".to_owned(),
            };
            let saved = metadata.tensor(at).ok_or_else(missing)?;
            let len = saved.shape.iter().product::<usize>() * saved.dtype.size_bytes();
            let zeros = TensorBuf::new(saved.dtype, &saved.shape, vec![0; len]);
            zeros.map(|zeros| Value::Tensor(Box::new(zeros))).map_err(|error| Error::tensor(at, &error))
        }
        plain => Ok(plain.plain_value().unwrap_or(Value::None)),
    }
}
