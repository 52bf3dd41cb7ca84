//! What a rank's data files are made of: which of its boxes go to which file, and where in it. Writes nothing.

use std::collections::HashMap;

use sconce_dtensor::{Fqn, LocalTensor, OrderedMap, box_len_bytes};

use super::file::{Contents, Piece};
use crate::format::shard;
use crate::metadata::FileMetadata;
use crate::plan::{WriteItem, WritePlan, WrittenFile, WrittenItem};
use crate::{Error, Result};

/// The tensors of a state by name.
pub(crate) type Tensors<'s, 'a> = OrderedMap<Fqn, &'s (dyn LocalTensor + 'a)>;

/// One data file of a rank.
pub(crate) struct Shard<'p> {
    /// Its header and its boxes.
    pub(crate) contents: Contents<'p>,
    items: Vec<WrittenItem>,
}

/// The files of everything that the plan says.
///
/// # Errors
/// `Tensor` for a box that the state does not hold.
pub(crate) fn split<'p>(plan: &'p WritePlan, tensors: &'p Tensors<'p, 'p>) -> Result<Vec<Shard<'p>>> {
    let all: Vec<usize> = (0..plan.items.len()).collect();
    split_positions(plan, &all, tensors)
}

/// The files of the items at some positions of the plan, in their order.
///
/// # Errors
/// As [`split`].
pub(crate) fn split_positions<'p>(
    plan: &'p WritePlan,
    positions: &[usize],
    tensors: &'p Tensors<'p, 'p>,
) -> Result<Vec<Shard<'p>>> {
    let files = split_by_file(&plan.items, positions);
    files.iter().map(|items| Shard::new(&plan.items, items, tensors)).collect()
}

/// The given positions of a plan for each file: the k-th box of a tensor goes to the k-th file.
fn split_by_file(plan: &[WriteItem], positions: &[usize]) -> Vec<Vec<usize>> {
    let mut files: Vec<Vec<usize>> = Vec::new();
    let mut seen = HashMap::<&str, usize>::new();
    for item in positions {
        let nth = seen.entry(&plan[*item].fqn).or_default();
        if *nth == files.len() {
            files.push(Vec::new());
        }
        files[*nth].push(*item);
        *nth += 1;
    }
    files
}

impl<'p> Shard<'p> {
    /// The file of the items at `positions` of a plan, each of another tensor.
    fn new(plan: &'p [WriteItem], positions: &[usize], tensors: &'p Tensors<'p, 'p>) -> Result<Self> {
        let of = |item: &usize| tensor_of(tensors, &plan[*item]).map(|tensor| (*item, tensor));
        let mut items = positions.iter().map(of).collect::<Result<Vec<_>>>()?;
        shard::order(&mut items, |(_, tensor)| tensor.dtype());
        let entry = |(item, tensor): &(usize, &dyn LocalTensor)| shard::Entry {
            fqn: plan[*item].fqn.clone(),
            dtype: tensor.dtype(),
            bounds: tensor.local_boxes()[plan[*item].index].clone(),
        };
        let (header, starts) = shard::header(&items.iter().map(entry).collect::<Vec<_>>())?;
        let piece = |((item, tensor), start): (&(usize, &'p dyn LocalTensor), &u64)| {
            let WriteItem { fqn, index } = &plan[*item];
            let bytes = *start..start + box_len_bytes(*tensor, *index) as u64;
            Piece { fqn, tensor: *tensor, index: *index, bytes }
        };
        let pieces = items.iter().zip(&starts).map(piece).collect();
        let items = items.iter().zip(starts);
        let items =
            items.map(|((item, _), offset_bytes)| WrittenItem { item: *item, offset_bytes }).collect();
        Ok(Self { contents: Contents { header, pieces }, items })
    }

    /// What is reported of the file that was written under a name.
    pub(crate) fn written(&self, name: String, (len_bytes, block_crcs): (u64, Vec<u32>)) -> WrittenFile {
        let file = FileMetadata { name, len_bytes, block_crcs: Some(block_crcs) };
        WrittenFile { file, items: self.items.clone(), is_linked: false }
    }

    /// What is reported of the file that another one is, under the name that it got.
    pub(crate) fn linked(&self, name: String, other: &FileMetadata) -> WrittenFile {
        let file = FileMetadata { name, ..other.clone() };
        WrittenFile { file, items: self.items.clone(), is_linked: true }
    }

    /// The positions of its items in the plan, and where each lies.
    pub(crate) fn items(&self) -> impl Iterator<Item = (usize, &Piece<'p>)> {
        self.items.iter().map(|item| item.item).zip(&self.contents.pieces)
    }
}

/// Size in bytes of the box of an item; 0 if the state does not hold it.
pub(crate) fn len_bytes(tensors: &Tensors<'_, '_>, item: &WriteItem) -> usize {
    tensor_of(tensors, item).map_or(0, |tensor| box_len_bytes(tensor, item.index))
}

/// The tensor of which an item is a box.
///
/// # Errors
/// `Tensor` if the state does not hold that box.
pub(crate) fn tensor_of<'t>(tensors: &'t Tensors<'_, '_>, item: &WriteItem) -> Result<&'t dyn LocalTensor> {
    let tensor = tensors.get(&Fqn(item.fqn.clone())).copied();
    tensor.filter(|tensor| item.index < tensor.local_boxes().len()).ok_or_else(|| Error::Tensor {
        fqn: item.fqn.clone(),
        cause: format!("the plan asks for box {}, which this rank does not hold", item.index),
    })
}
