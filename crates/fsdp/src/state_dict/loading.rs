//! Loading: values of any layout into the flat shards, all or nothing on every rank.

use std::collections::HashSet;

use sconce_dtensor::{DType, ExchangePlan, LocalTensor, Move, TensorBox, Value, exchange};

use super::piece;
use crate::shard::Shard;
use crate::shard_piece::ShardPiece;
use crate::{Error, Fsdp, Result};

/// A load in the making: first everything is looked up and compared, then all ranks agree, then values move.
pub(crate) struct Loading<'f, 's> {
    fsdp: &'f Fsdp,
    items: Vec<Item<'s>>,
    missing: Vec<String>,
    unexpected: Vec<String>,
    mismatch: Option<Error>,
}

/// One value on its way into the shards.
struct Item<'s> {
    /// Position of the parameter: unit, index in the unit.
    unit: usize,
    index: usize,
    src: &'s (dyn LocalTensor + 's),
    dst: ShardPiece,
}

impl<'f, 's> Loading<'f, 's> {
    pub(crate) fn new(fsdp: &'f Fsdp) -> Self {
        Self { fsdp, items: vec![], missing: vec![], unexpected: vec![], mismatch: None }
    }

    /// Looks up a value for every parameter; `suffix` names what is looked up below it, for errors.
    pub(crate) fn add<'a: 's>(
        &mut self,
        shards: &[&Shard],
        suffix: &str,
        find: impl Fn(&str) -> Option<&'s Value<'a>>,
    ) {
        for (nth, (unit, shard)) in self.fsdp.units.iter().zip(shards).enumerate() {
            for (index, param) in unit.flat.params().iter().enumerate() {
                let fqn =
                    if suffix.is_empty() { param.fqn.clone() } else { format!("{}.{suffix}", param.fqn) };
                match find(&param.fqn) {
                    None => self.missing.push(fqn),
                    Some(value) => match loadable(fqn, &param.shape, value) {
                        Ok(src) => {
                            let dst = piece(unit, shard, index);
                            self.items.push(Item { unit: nth, index, src, dst });
                        }
                        Err(error) => {
                            self.mismatch.get_or_insert(error);
                        }
                    },
                }
            }
        }
    }

    /// Notes the names that are no parameter.
    pub(crate) fn refuse_unexpected<'k>(&mut self, names: impl Iterator<Item = &'k str>) {
        let params = self.fsdp.units.iter().flat_map(|unit| unit.flat.params());
        let known: HashSet<&str> = params.map(|param| param.fqn.as_str()).collect();
        self.unexpected.extend(names.filter(|name| !known.contains(name)).map(str::to_owned));
    }

    /// Moves the values if no rank refuses; `also` is what else this rank had to find out, returned on success.
    pub(crate) fn run<T>(mut self, also: Result<T>) -> Result<T> {
        let verdict = self.verdict().and(also);
        let held = self.agree(&verdict)?;
        let also = verdict?;
        let plans = self.plans(&held)?;
        self.fsdp.reshard()?;
        let items = self.items.iter_mut().zip(plans);
        let mut moves: Vec<Move<'_>> =
            items.map(|(item, plan)| Move { plan, src: item.src, dst: &mut item.dst }).collect();
        exchange(&self.fsdp.groups.mesh, &mut moves)?;
        Ok(also)
    }

    fn verdict(&mut self) -> Result<()> {
        if !self.missing.is_empty() || !self.unexpected.is_empty() {
            let (missing, unexpected) = (self.missing.clone(), self.unexpected.clone());
            return Err(Error::KeyMismatch { missing, unexpected });
        }
        self.mismatch.take().map_or(Ok(()), Err)
    }

    /// Tells all ranks this one's verdict and boxes; returns the boxes of every rank by item, unless a rank refused.
    fn agree<T>(&self, verdict: &Result<T>) -> Result<Vec<Vec<Vec<TensorBox>>>> {
        let group = &self.fsdp.groups.mesh;
        let mine = match verdict {
            Ok(_) => encode(self.items.iter().map(|item| item.src.local_boxes())),
            Err(_) => Vec::new(),
        };
        let all = group.all_gather_object(&mine)?;
        if verdict.is_err() {
            // The caller returns this rank's own error.
            return Ok(Vec::new());
        }
        let refused = group.ranks().iter().zip(&all).filter(|(_, bytes)| bytes.is_empty());
        let ranks: Vec<_> = refused.map(|(rank, _)| *rank).collect();
        if !ranks.is_empty() {
            return Err(Error::RefusedElsewhere { ranks });
        }
        let ndims: Vec<usize> = self.items.iter().map(|item| item.src.global_shape().len()).collect();
        Ok(all.iter().map(|bytes| decode(bytes, &ndims)).collect())
    }

    /// The exchange of every item, over the whole mesh: replicas may hold different parts.
    fn plans(&self, held: &[Vec<Vec<TensorBox>>]) -> Result<Vec<ExchangePlan>> {
        let group = &self.fsdp.groups.mesh;
        let shards: Vec<usize> = group.ranks().iter().map(|rank| shard_index(self.fsdp, *rank)).collect();
        let plan = |(nth, item): (usize, &Item<'_>)| {
            let held: Vec<_> = held.iter().map(|of_rank| of_rank[nth].clone()).collect();
            let flat = &self.fsdp.units[item.unit].flat;
            let wanted: Vec<_> = shards.iter().map(|shard| flat.boxes(item.index, *shard)).collect();
            Ok(ExchangePlan::new(group.group_rank().0, &held, &wanted, &|_, _| true)?)
        };
        self.items.iter().enumerate().map(plan).collect()
    }
}

/// Which shard a rank of the mesh holds.
fn shard_index(fsdp: &Fsdp, rank: sconce_mesh::Rank) -> usize {
    if fsdp.groups.shard.size() == 1 {
        return 0;
    }
    fsdp.mesh.coordinate_of(rank).and_then(|at| at.last().copied()).unwrap_or(0)
}

fn loadable<'s, 'a: 's>(
    fqn: String,
    shape: &[usize],
    value: &'s Value<'a>,
) -> Result<&'s (dyn LocalTensor + 's)> {
    let expected = format!("f32 {shape:?}");
    match value {
        Value::Tensor(tensor) if tensor.dtype() == DType::F32 && tensor.global_shape() == shape => {
            Ok(tensor.as_ref())
        }
        Value::Tensor(tensor) => {
            let got = format!("{} {:?}", tensor.dtype(), tensor.global_shape());
            Err(Error::ValueMismatch { fqn, expected, got })
        }
        other => Err(Error::ValueMismatch { fqn, expected, got: format!("{other:?}") }),
    }
}

/// Boxes as little-endian words: for each item the count, then offsets and sizes. Never empty: a leading 1.
fn encode<'b>(items: impl Iterator<Item = &'b [TensorBox]>) -> Vec<u8> {
    let mut words = vec![1u64];
    for boxes in items {
        words.push(boxes.len() as u64);
        for part in boxes {
            words.extend(part.offsets.iter().chain(&part.sizes).map(|n| *n as u64));
        }
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn decode(bytes: &[u8], ndims: &[usize]) -> Vec<Vec<TensorBox>> {
    let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word) as usize).skip(1);
    let mut next = |n: usize| words.by_ref().take(n).collect::<Vec<usize>>();
    let mut boxes_of = |ndim: &usize| {
        let count = next(1).first().copied().unwrap_or(0);
        (0..count).map(|_| TensorBox { offsets: next(*ndim), sizes: next(*ndim) }).collect()
    };
    ndims.iter().map(&mut boxes_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_survive_the_wire() {
        let boxes = [
            vec![TensorBox { offsets: vec![1, 2], sizes: vec![3, 4] }, TensorBox::whole(&[5, 6])],
            vec![],
            vec![TensorBox::whole(&[])],
        ];
        let bytes = encode(boxes.iter().map(Vec::as_slice));
        assert_eq!(decode(&bytes, &[2, 2, 0]), boxes);
    }
}
