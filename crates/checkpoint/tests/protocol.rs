//! The open protocol: a storage of another format and planners of the caller's, in memory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{part, ranks, state};
use sconce_checkpoint::{
    DataFile, DefaultLoadPlanner, DefaultSavePlanner, Error, FileMetadata, GlobalPlan, Layout, LoadOptions,
    LoadPlan, LoadPlanner, Metadata, Result, SavePlan, SavePlanner, SaveReport, StorageReader, StorageWriter,
    WritePlan, WrittenFile, WrittenItem, load_by, load_from, load_new_from, save_to,
};
use sconce_dtensor::{Fqn, StateDict, TensorBox, TensorBuf, Value, run_boxes};

/// A foreign format: one file a rank, no checksums, every box behind three bytes that are not its own.
#[derive(Default)]
struct Memory {
    files: Mutex<BTreeMap<String, Arc<Vec<u8>>>>,
    metadata: Mutex<Option<Metadata>>,
    calls: Mutex<Vec<String>>,
}

struct MemoryWriter<'m>(&'m Memory);
struct MemoryFile(Arc<Vec<u8>>);

impl Memory {
    fn called(&self, what: impl Into<String>) {
        self.calls.lock().unwrap().push(what.into());
    }
}

impl StorageWriter for MemoryWriter<'_> {
    fn prepare(&mut self, layout: &Layout) -> Result<Vec<u8>> {
        self.0.called(format!("prepare {} tensors", layout.tensors.len()));
        Ok(b"somewhere".to_vec())
    }

    fn write(&mut self, place: &[u8], plan: &WritePlan, state: &StateDict<'_>) -> Result<Vec<WrittenFile>> {
        assert_eq!(place, b"somewhere");
        self.0.called("write");
        let (mut bytes, mut items) = (Vec::new(), Vec::new());
        let tensors = state.flat_tensors().unwrap();
        for (item, write) in plan.items.iter().enumerate() {
            bytes.extend_from_slice(b"PK!");
            items.push(WrittenItem { item, offset_bytes: bytes.len() as u64 });
            let tensor = *tensors.get(&Fqn(write.fqn.clone())).unwrap();
            tensor.read_box(write.index, &mut |lent| bytes.extend_from_slice(lent)).unwrap();
        }
        let name = format!("rank {}", plan.writer);
        let file = FileMetadata { name: name.clone(), len_bytes: bytes.len() as u64, block_crcs: None };
        self.0.files.lock().unwrap().insert(name, Arc::new(bytes));
        Ok(vec![WrittenFile { file, items, is_linked: false }])
    }

    fn finish(&mut self, layout: Layout, written: Vec<Vec<WrittenFile>>) -> Result<SaveReport> {
        self.0.called("finish");
        let metadata = Metadata::located(layout, written)?;
        let data_bytes = metadata.files.iter().map(|file| file.len_bytes).sum();
        let n_files = metadata.files.len();
        *self.0.metadata.lock().unwrap() = Some(metadata);
        Ok(SaveReport { data_bytes, n_files, linked_bytes: 0 })
    }

    fn discard(&mut self) {
        self.0.called("discard");
    }
}

impl StorageReader for Memory {
    fn read_metadata(&self) -> Result<Metadata> {
        Ok(self.metadata.lock().unwrap().clone().unwrap())
    }

    fn open(&self, file: &FileMetadata) -> Result<Box<dyn DataFile>> {
        self.called(format!("open {}", file.name));
        Ok(Box::new(MemoryFile(self.files.lock().unwrap()[&file.name].clone())))
    }

    fn path(&self) -> &Path {
        Path::new("memory")
    }
}

impl DataFile for MemoryFile {
    fn read_at(&self, offset_bytes: u64, to: &mut [u8]) -> Result<()> {
        let start = offset_bytes as usize;
        to.copy_from_slice(&self.0[start..start + to.len()]);
        Ok(())
    }

    fn path(&self) -> &Path {
        Path::new("memory")
    }
}

/// The flat shard of rank `nth` of `n`.
fn run(shape: &[usize], n: usize, nth: usize) -> Vec<TensorBox> {
    let numel: usize = shape.iter().product();
    run_boxes(shape, nth * numel / n, (nth + 1) * numel / n - nth * numel / n)
}

const SHAPE: [usize; 2] = [13, 7];

fn saved(n: usize) -> Memory {
    let memory = Memory::default();
    ranks(n, |group| {
        let mine = state(&SHAPE, &run(&SHAPE, n, group.rank().0), true);
        save_to(&mut MemoryWriter(&memory), &mut DefaultSavePlanner, &mine, Some(&group)).unwrap();
    });
    memory
}

#[test]
fn a_foreign_storage_is_called_in_the_order_of_its_docs_and_loads_under_any_layout() {
    let memory = saved(3);
    let calls = memory.calls.lock().unwrap().clone();
    assert_eq!(calls, ["prepare 1 tensors", "write", "write", "write", "finish"]);
    ranks(2, |group| {
        let mine = run(&SHAPE, 2, group.rank().0);
        let mut loaded = state(&SHAPE, &mine, false);
        let options = LoadOptions { group: Some(&group), ..LoadOptions::default() };
        load_from(&memory, &mut loaded, options).unwrap();
        assert_eq!(loaded.tensor::<TensorBuf>("t").unwrap(), &part(&SHAPE, &mine, true));
    });
    let whole = load_new_from(&memory, LoadOptions::default()).unwrap();
    assert_eq!(whole.tensor::<TensorBuf>("t").unwrap(), &part(&SHAPE, &[TensorBox::whole(&SHAPE)], true));
}

#[test]
fn metadata_that_lie_are_refused_before_anything_is_read() {
    type Lie = fn(&mut Metadata);
    let lies: [(&str, Lie); 5] = [
        ("outside", |m| m.tensors[0].chunks[0].offset_bytes = u64::MAX - 3),
        ("outside", |m| m.tensors[0].chunks[0].file = 9),
        ("outside", |m| m.tensors[0].chunks[0].bounds.sizes[0] = usize::MAX),
        ("overlap", |m| {
            let first = m.tensors[0].chunks[0].clone();
            m.tensors[0].chunks.push(first);
        }),
        ("nobody holds", |m| drop(m.tensors[0].chunks.pop())),
    ];
    for (expected, lie) in lies {
        let memory = saved(2);
        lie(memory.metadata.lock().unwrap().as_mut().unwrap());
        memory.calls.lock().unwrap().clear();
        let mut loaded = state(&SHAPE, &[TensorBox::whole(&SHAPE)], false);
        let error = load_from(&memory, &mut loaded, LoadOptions::default()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(memory.calls.lock().unwrap().is_empty());
    }
}

/// Saves everything but one name.
struct Without(&'static str);

impl SavePlanner for Without {
    fn local_plan(&mut self, state: &StateDict<'_>) -> Result<SavePlan> {
        let mut plan = SavePlan::of(state)?;
        plan.tensors.retain(|tensor| tensor.fqn != self.0);
        if let sconce_checkpoint::Node::Map(entries) = &mut plan.tree {
            entries.retain(|(key, _)| key != self.0);
        }
        Ok(plan)
    }

    fn global_plan(&mut self, plans: Vec<SavePlan>) -> Result<GlobalPlan> {
        DefaultSavePlanner.global_plan(plans)
    }
}

/// Reads items that no tensor has room for.
struct Greedy;

impl LoadPlanner for Greedy {
    fn local_plan(&mut self, state: &StateDict<'_>, metadata: &Metadata) -> Result<LoadPlan> {
        let mut plan = DefaultLoadPlanner::default().local_plan(state, metadata)?;
        plan.items[0].part.sizes[0] += 1;
        Ok(plan)
    }
}

#[test]
fn planners_of_the_caller_choose_what_moves_and_are_not_believed() {
    let memory = Memory::default();
    let mut both = state(&SHAPE, &[TensorBox::whole(&SHAPE)], true);
    both.insert_tensor("cache", part(&[4], &[TensorBox::whole(&[4])], true));
    save_to(&mut MemoryWriter(&memory), &mut Without("cache"), &both, None).unwrap();
    let names = |state: &StateDict<'_>| state.keys().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(names(&load_new_from(&memory, LoadOptions::default()).unwrap()), ["t"]);

    let mut loaded = state(&SHAPE, &[TensorBox::whole(&SHAPE)], false);
    let error = load_by(&memory, &mut Greedy, &mut loaded, LoadOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::Tensor { fqn, .. } if fqn == "t"), "{error}");
}

#[test]
fn a_part_of_a_state_is_loaded_under_other_names() {
    let memory = saved(2);
    let mut renamed = StateDict::new();
    renamed.insert_tensor("old.t", part(&SHAPE, &[TensorBox::whole(&SHAPE)], false));
    renamed.insert_tensor("new", part(&[2], &[TensorBox::whole(&[2])], false));
    renamed.insert("step", 3i64);
    let options = LoadOptions {
        select: Some(&|name| name.starts_with("old.")),
        rename: Some(&|name| name.trim_start_matches("old.").to_owned()),
        ..LoadOptions::default()
    };
    let report = load_from(&memory, &mut renamed, options).unwrap();
    assert_eq!(report, sconce_checkpoint::LoadReport::default());
    assert_eq!(renamed.get("step").and_then(Value::as_int), Some(3));
    assert_eq!(
        renamed.tensor::<TensorBuf>("old.t").unwrap(),
        &part(&SHAPE, &[TensorBox::whole(&SHAPE)], true)
    );
}

#[test]
fn what_a_checkpoint_lacks_stays_where_that_is_allowed() {
    let memory = saved(2);
    memory.metadata.lock().unwrap().as_mut().unwrap().tensors[0].chunks.remove(0);
    let whole = [TensorBox::whole(&SHAPE)];
    let mut loaded = state(&SHAPE, &whole, false);
    let options = LoadOptions { allow_partial: true, ..LoadOptions::default() };
    let report = load_from(&memory, &mut loaded, options).unwrap();
    assert_eq!(report.partial, ["t"]);
    let (got, full) = (loaded.tensor::<TensorBuf>("t").unwrap().bytes(), part(&SHAPE, &whole, true));
    let loaded_from = got.iter().position(|byte| *byte != 0).unwrap();
    assert!(loaded_from > 0, "the first chunk is gone");
    assert_eq!(got[loaded_from..], full.bytes()[loaded_from..]);
}
