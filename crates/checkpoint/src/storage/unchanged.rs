//! Files of an earlier checkpoint that need not be written again: linked where every byte of them is what memory holds.
//!
//! ```text
//! earlier checkpoint     | a  b  c |               a and c did not change, b did
//! this one               | a  c |   | b |          written: what stays the same is kept apart from then on
//! the next one           | a  c |   | b |          linked, written
//! ```
//!
//! Nothing is believed: a file is linked after its bytes were read and compared with memory, and their checksums with
//! those in the earlier manifest. So a damaged file is never linked, and no change is missed. What is unreadable of the
//! earlier checkpoint is written.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sconce_dtensor::{Fqn, TensorBox};

use super::file::Piece;
use super::held::Held;
use super::shards::{Shard, Tensors, split_positions};
use crate::format::{MANIFEST_NAME, manifest};
use crate::metadata::{BLOCK_BYTES, FileMetadata, Metadata};
use crate::plan::WritePlan;
use crate::{Error, Result};

/// What did not change is written to a file of its own from this size on: less is not worth a file.
const APART_BYTES: usize = 64 << 10;
/// What is read, compared and checksummed while it is in the cache.
const STEP_BYTES: usize = 256 << 10;

/// An earlier checkpoint, held open so that nobody removes it meanwhile.
#[derive(Debug)]
pub(super) struct Earlier {
    held: Held,
    metadata: Metadata,
}

/// A rank's files: those that an earlier checkpoint has, at their positions there, and those to write.
pub(super) struct Division<'p> {
    pub(super) same: Vec<(usize, Shard<'p>)>,
    pub(super) written: Vec<Shard<'p>>,
}

/// Where an item of the plan lies in the earlier checkpoint.
#[derive(Debug, Clone, Copy)]
struct Place {
    offset_bytes: u64,
    item: usize,
}

impl Earlier {
    /// The checkpoint at `path`; `None` if it cannot be read, and so has nothing to link.
    pub(super) fn open(path: &Path) -> Option<Self> {
        let held = Held::open(path).ok()?;
        let metadata = manifest::decode(&path.join(MANIFEST_NAME), &held.manifest().ok()?).ok()?;
        Some(Self { held, metadata })
    }

    pub(super) fn file(&self, nth: usize) -> &FileMetadata {
        &self.metadata.files[nth]
    }

    /// Gives a file a second name; `false` where the file system does not. With `sync`, its bytes are on the device
    /// afterwards, whatever the save that wrote them did.
    ///
    /// # Errors
    /// `Io` if it cannot be synced.
    pub(super) fn link(&self, nth: usize, to: &Path, sync: bool) -> Result<bool> {
        let name = &self.metadata.files[nth].name;
        if self.held.link(name, to).is_err() {
            return Ok(false);
        }
        if sync {
            let synced = self.held.file(name).and_then(|file| file.sync_all());
            synced.map_err(|e| Error::io("sync", to, &e))?;
        }
        Ok(true)
    }

    /// Which of its files a rank writes again.
    ///
    /// # Errors
    /// `Tensor` if a box cannot be read.
    pub(super) fn divide<'p>(
        &self,
        plan: &'p WritePlan,
        tensors: &'p Tensors<'p, 'p>,
    ) -> Result<Division<'p>> {
        let by_file = self.places(plan, tensors);
        let mut is_written = vec![true; plan.items.len()];
        let (mut same, mut apart) = (Vec::new(), Vec::new());
        for (file, mut places) in by_file {
            places.sort_by_key(|place| place.offset_bytes);
            let unchanged = self.unchanged(file, &places, plan, tensors)?;
            let mut mark = |items: &[usize]| items.iter().for_each(|item| is_written[*item] = false);
            match unchanged {
                Unchanged::Whole(shard) => {
                    places.iter().for_each(|place| mark(&[place.item]));
                    same.push((file, shard));
                }
                Unchanged::Items(items) => {
                    mark(&items);
                    apart.extend(items);
                }
            }
        }
        let bytes_of = |item: &usize| super::shards::len_bytes(tensors, &plan.items[*item]);
        if apart.iter().map(bytes_of).sum::<usize>() < APART_BYTES {
            apart.drain(..).for_each(|item| is_written[item] = true);
        }
        let changed: Vec<usize> = (0..plan.items.len()).filter(|item| is_written[*item]).collect();
        apart.sort_unstable();
        let written = [apart, changed].into_iter().map(|items| split_positions(plan, &items, tensors));
        let written = written.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        Ok(Division { same, written })
    }

    /// The items of the plan that the earlier checkpoint has as they are, by file.
    fn places(&self, plan: &WritePlan, tensors: &Tensors<'_, '_>) -> BTreeMap<usize, Vec<Place>> {
        let mut items = HashMap::<(&str, &TensorBox), usize>::new();
        for (item, write) in plan.items.iter().enumerate() {
            let tensor = tensors.get(&Fqn(write.fqn.clone()));
            let bounds = tensor.and_then(|tensor| tensor.local_boxes().get(write.index));
            if let Some(bounds) = bounds {
                items.insert((&write.fqn, bounds), item);
            }
        }
        let mut by_file = BTreeMap::<usize, Vec<Place>>::new();
        for saved in &self.metadata.tensors {
            let Some(tensor) = tensors.get(&Fqn(saved.fqn.clone())) else { continue };
            if (tensor.dtype(), tensor.global_shape()) != (saved.dtype, &saved.shape[..]) {
                continue;
            }
            for chunk in &saved.chunks {
                if let Some(item) = items.get(&(saved.fqn.as_str(), &chunk.bounds)) {
                    let place = Place { offset_bytes: chunk.offset_bytes, item: *item };
                    by_file.entry(chunk.file).or_default().push(place);
                }
            }
        }
        by_file
    }

    fn unchanged<'p>(
        &self,
        nth: usize,
        places: &[Place],
        plan: &'p WritePlan,
        tensors: &'p Tensors<'p, 'p>,
    ) -> Result<Unchanged<'p>> {
        let meta = self.file(nth);
        let nothing = Unchanged::Items(Vec::new());
        let Ok(file) = self.held.file(&meta.name) else { return Ok(nothing) };
        if file.metadata().map_or(0, |found| found.len()) != meta.len_bytes {
            return Ok(nothing);
        }
        let positions: Vec<usize> = places.iter().map(|place| place.item).collect();
        // A file of other boxes too has another header, and cannot be linked; a tensor twice is in no file.
        let mut shards = split_positions(plan, &positions, tensors)?;
        let shard = if shards.len() == 1 { shards.pop() } else { None };
        let Some(shard) = shard else { return Ok(nothing) };
        let mut comparison = Comparison::of(&file);
        let mut is_whole = shard.contents.len_bytes() == meta.len_bytes;
        is_whole &= comparison.compare(0, |compare| {
            compare(&shard.contents.header);
            Ok(())
        })?;
        let offsets: HashMap<usize, u64> =
            places.iter().map(|place| (place.item, place.offset_bytes)).collect();
        let mut same = Vec::new();
        for (item, piece) in shard.items() {
            let offset_bytes = offsets[&item];
            let is_same = comparison.compare(offset_bytes, |compare| lend(piece, compare))?;
            is_whole &= is_same && offset_bytes == piece.bytes.start;
            if is_same {
                same.push(item);
            }
        }
        is_whole &= Some(comparison.finish()) == meta.block_crcs;
        Ok(if is_whole { Unchanged::Whole(shard) } else { Unchanged::Items(same) })
    }
}

/// What of a file's items did not change.
enum Unchanged<'p> {
    /// All, and there is nothing else in it.
    Whole(Shard<'p>),
    /// These.
    Items(Vec<usize>),
}

fn lend(piece: &Piece<'_>, compare: &mut dyn FnMut(&[u8])) -> Result<()> {
    let mut compare = |bytes: &[u8]| {
        compare(bytes);
        Ok(())
    };
    piece.lend(&piece.bytes.clone(), &mut compare)
}

/// Compares memory with a file, and makes the checksums of what was compared.
struct Comparison<'f> {
    file: &'f File,
    buffer: Vec<u8>,
    crc: crc32fast::Hasher,
    /// How much of a block is in `crc`.
    into_block: usize,
    crcs: Vec<u32>,
}

impl<'f> Comparison<'f> {
    fn of(file: &'f File) -> Self {
        let (buffer, crc) = (vec![0; STEP_BYTES], crc32fast::Hasher::new());
        Self { file, buffer, crc, into_block: 0, crcs: Vec::new() }
    }

    /// Whether what `lend` lends is what the file has from an offset on. After the first difference nothing is read.
    fn compare(&mut self, at: u64, lend: impl FnOnce(&mut dyn FnMut(&[u8])) -> Result<()>) -> Result<bool> {
        let (mut at, mut is_same) = (at, true);
        lend(&mut |bytes| {
            for step in bytes.chunks(STEP_BYTES) {
                is_same = is_same && self.is_same(at, step);
                at += step.len() as u64;
            }
        })?;
        Ok(is_same)
    }

    fn is_same(&mut self, at: u64, bytes: &[u8]) -> bool {
        let there = &mut self.buffer[..bytes.len()];
        // What cannot be read is not the same.
        if self.file.read_exact_at(there, at).is_err() || there != bytes {
            return false;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = BLOCK_BYTES as usize - self.into_block;
            let (now, later) = rest.split_at(rest.len().min(room));
            self.crc.update(now);
            self.into_block += now.len();
            if self.into_block == BLOCK_BYTES as usize {
                self.crcs.push(std::mem::take(&mut self.crc).finalize());
                self.into_block = 0;
            }
            rest = later;
        }
        true
    }

    fn finish(mut self) -> Vec<u32> {
        if self.into_block > 0 {
            self.crcs.push(self.crc.finalize());
        }
        self.crcs
    }
}
