//! Loading: values of any layout into the flat shards, all or nothing on every rank.

use std::collections::HashSet;

use sconce_dtensor::{
    DType, ExchangePlan, FlatTensor, LocalTensor, Move, TensorBox, TensorBuf, Value, exchange,
};
use sconce_mesh::Rank;

use super::ShardView;
use super::wire::{decode, encode};
use crate::{Error, Fsdp, Result};

/// Names that a state dict and a model did not share.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadReport {
    /// Names that the model has and no rank's state dict has; their values stay.
    pub missing: Vec<String>,
    /// Names that this rank's state dict has and the model lacks.
    pub unexpected: Vec<String>,
}

/// A load in the making: first everything is looked up and compared, then all ranks agree, then values move.
pub(crate) struct Loading<'f, 's> {
    fsdp: &'f Fsdp,
    strict: bool,
    items: Vec<Item<'s>>,
    unexpected: Vec<String>,
    mismatch: Option<Error>,
}

/// One value on its way.
struct Item<'s> {
    fqn: String,
    src: Source<'s>,
    dst: Box<dyn LocalTensor>,
    wants: Wants,
}

/// What this rank's state dict has of a value.
enum Source<'s> {
    Lent(&'s (dyn LocalTensor + 's)),
    /// Nothing: other ranks may have it.
    Absent(TensorBuf),
}

/// Which boxes each rank wants.
enum Wants {
    /// What its shard holds of parameter `index` of `unit`.
    Shard {
        unit: usize,
        index: usize,
    },
    Whole(Vec<usize>),
}

impl<'f, 's> Loading<'f, 's> {
    pub(crate) fn new(fsdp: &'f Fsdp, strict: bool) -> Self {
        Self { fsdp, strict, items: vec![], unexpected: vec![], mismatch: None }
    }

    /// Looks up a value for every parameter; `suffix` names what is looked up below it, for errors.
    pub(crate) fn add<'a: 's>(
        &mut self,
        views: &[ShardView<'_>],
        suffix: &str,
        find: impl Fn(&str) -> Option<&'s Value<'a>>,
    ) -> Result<()> {
        for (unit, view) in views.iter().enumerate() {
            for (index, param) in view.params.iter().enumerate() {
                let fqn =
                    if suffix.is_empty() { param.fqn.clone() } else { format!("{}.{suffix}", param.fqn) };
                let wants = Wants::Shard { unit, index };
                self.add_item(fqn, find(&param.fqn), Box::new(view.piece(index)), wants)?;
            }
        }
        Ok(())
    }

    /// Looks up a value for every tensor that is kept whole.
    pub(crate) fn add_kept<'a: 's>(&mut self, find: impl Fn(&str) -> Option<&'s Value<'a>>) -> Result<()> {
        for (fqn, var) in self.fsdp.kept_whole() {
            let dst = Box::new(FlatTensor::whole(var.as_tensor())?);
            let wants = Wants::Whole(var.dims().to_vec());
            self.add_item(fqn.to_owned(), find(fqn), dst, wants)?;
        }
        Ok(())
    }

    fn add_item<'a: 's>(
        &mut self,
        fqn: String,
        found: Option<&'s Value<'a>>,
        dst: Box<dyn LocalTensor>,
        wants: Wants,
    ) -> Result<()> {
        let (dtype, shape) = (dst.dtype(), dst.global_shape());
        let absent = || TensorBuf::from_boxes(dtype, shape, vec![], vec![]).map(Source::Absent);
        let src = match found.map(|value| loadable(&fqn, dtype, shape, value)) {
            None => absent()?,
            Some(Ok(src)) => Source::Lent(src),
            Some(Err(error)) => {
                self.mismatch.get_or_insert(error);
                absent()?
            }
        };
        self.items.push(Item { fqn, src, dst, wants });
        Ok(())
    }

    /// Notes the names that the model does not have.
    pub(crate) fn note_unexpected<'k>(&mut self, names: impl Iterator<Item = &'k str>) {
        let params = self.fsdp.units.iter().flat_map(|unit| unit.flat.params());
        let mut known: HashSet<&str> = params.map(|param| param.fqn.as_str()).collect();
        known.extend(self.fsdp.kept_whole().map(|(fqn, _)| fqn));
        self.unexpected.extend(names.filter(|name| !known.contains(name)).map(str::to_owned));
    }

    /// Moves the values if no rank refuses; `also` is what else this rank had to find out.
    pub(crate) fn run(mut self, also: Result<()>) -> Result<LoadReport> {
        let mut held = self.held_by_all()?;
        let missing = self.leave_out_missing(&mut held);
        let report = LoadReport { missing, unexpected: std::mem::take(&mut self.unexpected) };
        let verdict = self.verdict(&report).and(also);
        self.agree(&verdict)?;
        verdict?;
        let plans = self.plans(&held)?;
        self.fsdp.reshard()?;
        let items = self.items.iter_mut().zip(plans);
        let mut moves: Vec<Move<'_>> =
            items.map(|(item, plan)| Move { plan, src: item.src.tensor(), dst: item.dst.as_mut() }).collect();
        exchange(&self.fsdp.groups.mesh, &mut moves)?;
        Ok(report)
    }

    fn verdict(&mut self, LoadReport { missing, unexpected }: &LoadReport) -> Result<()> {
        if self.strict && !(missing.is_empty() && unexpected.is_empty()) {
            let (missing, unexpected) = (missing.clone(), unexpected.clone());
            return Err(Error::KeyMismatch { missing, unexpected });
        }
        self.mismatch.take().map_or(Ok(()), Err)
    }

    /// The boxes that every rank's state dict has, by rank and item; `None` where it has no such name.
    fn held_by_all(&self) -> Result<Vec<Vec<Option<Vec<TensorBox>>>>> {
        let mine = encode(self.items.iter().map(|item| match &item.src {
            Source::Lent(tensor) => Some(tensor.local_boxes()),
            Source::Absent(_) => None,
        }));
        let all = self.fsdp.groups.mesh.all_gather_object(&mine)?;
        let ndims: Vec<usize> = self.items.iter().map(|item| item.dst.global_shape().len()).collect();
        Ok(all.iter().map(|bytes| decode(bytes, &ndims)).collect())
    }

    /// Drops the items that no rank has, and returns their names.
    fn leave_out_missing(&mut self, held: &mut [Vec<Option<Vec<TensorBox>>>]) -> Vec<String> {
        let n_items = self.items.len();
        let found: Vec<bool> = (0..n_items).map(|nth| held.iter().any(|of| of[nth].is_some())).collect();
        for of_rank in held {
            let mut keep = found.iter();
            of_rank.retain(|_| *keep.next().unwrap_or(&true));
        }
        let mut missing = Vec::new();
        let items = std::mem::take(&mut self.items).into_iter().zip(found);
        for (item, found) in items {
            if found { self.items.push(item) } else { missing.push(item.fqn) }
        }
        missing
    }

    /// Tells all ranks this one's verdict; an error if another refused and this one did not.
    fn agree(&self, verdict: &Result<()>) -> Result<()> {
        let group = &self.fsdp.groups.mesh;
        let all = group.all_gather_object(&[u8::from(verdict.is_err())])?;
        let refused = group.ranks().iter().zip(&all).filter(|(_, refused)| refused[..] == [1]);
        let ranks: Vec<Rank> = refused.map(|(rank, _)| *rank).collect();
        // A rank that refused returns its own error.
        if ranks.is_empty() || verdict.is_err() { Ok(()) } else { Err(Error::RefusedElsewhere { ranks }) }
    }

    /// The exchange of every item, over the whole mesh: replicas may hold different parts.
    fn plans(&self, held: &[Vec<Option<Vec<TensorBox>>>]) -> Result<Vec<ExchangePlan>> {
        let group = &self.fsdp.groups.mesh;
        let shards: Vec<usize> = group.ranks().iter().map(|rank| shard_index(self.fsdp, *rank)).collect();
        let plan = |(nth, item): (usize, &Item<'_>)| {
            let held: Vec<_> = held.iter().map(|of_rank| of_rank[nth].clone().unwrap_or_default()).collect();
            let wanted: Vec<_> = match &item.wants {
                Wants::Whole(shape) => vec![vec![TensorBox::whole(shape)]; shards.len()],
                Wants::Shard { unit, index } => {
                    let flat = &self.fsdp.units[*unit].flat;
                    shards.iter().map(|shard| flat.boxes(*index, *shard)).collect()
                }
            };
            Ok(ExchangePlan::new(group.group_rank().0, &held, &wanted, &|_, _| true)?)
        };
        self.items.iter().enumerate().map(plan).collect()
    }
}

impl Source<'_> {
    fn tensor(&self) -> &dyn LocalTensor {
        match self {
            Self::Lent(tensor) => *tensor,
            Self::Absent(nothing) => nothing,
        }
    }
}

/// Which shard a rank of the mesh holds.
fn shard_index(fsdp: &Fsdp, rank: Rank) -> usize {
    if fsdp.groups.shard.size() == 1 {
        return 0;
    }
    fsdp.mesh.coordinate_of(rank).and_then(|at| at.last().copied()).unwrap_or(0)
}

fn loadable<'s, 'a: 's>(
    fqn: &str,
    dtype: DType,
    shape: &[usize],
    value: &'s Value<'a>,
) -> Result<&'s (dyn LocalTensor + 's)> {
    let got = match value {
        Value::Tensor(tensor) if tensor.dtype() == dtype && tensor.global_shape() == shape => {
            return Ok(tensor.as_ref());
        }
        Value::Tensor(tensor) => format!("{} {:?}", tensor.dtype(), tensor.global_shape()),
        other => format!("{other:?}"),
    };
    Err(Error::ValueMismatch { fqn: fqn.to_owned(), expected: format!("{dtype} {shape:?}"), got })
}
