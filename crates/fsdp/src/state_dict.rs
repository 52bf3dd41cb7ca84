//! State dicts of sharded models: Full, Sharded and the flat shards themselves; and loading from any of them.

use sconce_dtensor::{
    DTensor, ExchangePlan, FlatTensor, LocalTensor, Move, Placement, StateDict, TensorBox, Value, exchange,
    local_box,
};

use crate::error::CandleContext;
use crate::shard::Shard;
use crate::shard_piece::ShardPiece;
use crate::unit::Unit;
use crate::{Fsdp, Result, ShardingStrategy};

mod loading;
pub(crate) use loading::Loading;

/// What the values of a state dict are.
///
/// # Source
/// `torch.distributed.fsdp.StateDictType`; `FlatShard` has no counterpart there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateDictType {
    /// Whole tensors on every rank.
    Full,
    /// A `DTensor` a parameter: `[Shard(0)]` on a 1-D mesh, `[Replicate, Shard(0)]` under hybrid sharding.
    Sharded,
    /// The boxes that this rank's flat shards hold, sharing their storage: no communication and no copy, for a
    /// [snapshot](LocalTensor::snapshot) neither. The choice for checkpoints.
    FlatShard,
}

impl Fsdp {
    /// The model's parameters by name, in declaration order, as `kind` says.
    ///
    /// Ranks: collective over the shard group, except for [`StateDictType::FlatShard`].
    ///
    /// # Errors
    /// A failed exchange.
    pub fn state_dict(&self, kind: StateDictType) -> Result<StateDict<'static>> {
        // Flat shards may be written through their state dict: no gathered copy may outlive that.
        self.reshard()?;
        shard_state_dict(self, &self.parameter_shards(), kind)
    }

    /// Takes the parameters of a state dict of any kind, from any layout of this mesh's ranks.
    ///
    /// Ranks: collective over the mesh. Nothing changes on any rank if one refuses.
    ///
    /// # Errors
    /// `KeyMismatch` with every missing and unexpected name, `ValueMismatch` with both shapes or dtypes,
    /// `RefusedElsewhere`; `DTensor(Uncovered)` if no rank holds a part of a parameter.
    pub fn load_state_dict(&self, state: &StateDict<'_>) -> Result<()> {
        let mut loading = Loading::new(self);
        loading.add(&self.parameter_shards(), "", |fqn| state.get(fqn));
        loading.refuse_unexpected(state.keys());
        loading.run(Ok(()))
    }

    fn parameter_shards(&self) -> Vec<&Shard> {
        self.units.iter().map(|unit| &unit.shard).collect()
    }

    /// The placements of a parameter in a sharded state dict.
    fn placements(&self, shape: &[usize]) -> Vec<Placement> {
        let split = if shape.is_empty() { Placement::Replicate } else { Placement::Shard(0) };
        match self.strategy {
            ShardingStrategy::FullShard | ShardingStrategy::ShardGradOp => vec![split],
            ShardingStrategy::NoShard => vec![Placement::Replicate],
            ShardingStrategy::HybridShard | ShardingStrategy::HybridShardZero2 => {
                vec![Placement::Replicate, split]
            }
        }
    }
}

/// What this rank's shard holds of one parameter.
struct Piece<'f> {
    unit: &'f Unit,
    index: usize,
    held: ShardPiece,
}

impl Piece<'_> {
    fn fqn(&self) -> String {
        self.unit.flat.params()[self.index].fqn.clone()
    }
}

/// One shard a unit (its parameters, or a moment) as a state dict of `kind`.
pub(crate) fn shard_state_dict(
    fsdp: &Fsdp,
    shards: &[&Shard],
    kind: StateDictType,
) -> Result<StateDict<'static>> {
    let mut pieces = Vec::new();
    for (unit, shard) in fsdp.units.iter().zip(shards) {
        for index in 0..unit.flat.params().len() {
            pieces.push(Piece { unit, index, held: piece(unit, shard, index) });
        }
    }
    match kind {
        StateDictType::FlatShard => {
            let entry = |piece: Piece<'_>| (piece.fqn(), Value::Tensor(Box::new(piece.held)));
            Ok(pieces.into_iter().map(entry).collect())
        }
        StateDictType::Sharded => gathered(fsdp, &pieces, sharded_zeros),
        StateDictType::Full => gathered(fsdp, &pieces, whole_zeros),
    }
}

/// What this rank's shard holds of a parameter, sharing its storage.
fn piece(unit: &Unit, shard: &Shard, index: usize) -> ShardPiece {
    let run = unit.flat.run(index, unit.shard_index());
    let shape = &unit.flat.params()[index].shape;
    ShardPiece::new(shard.clone(), run.shard_offset, shape, run.param_offset, run.len)
}

/// A value to be filled, and the boxes that each rank of the shard group wants of it.
struct Target {
    value: Box<dyn LocalTensor>,
    wanted: Vec<Vec<TensorBox>>,
}

/// Fills a target for every parameter from the pieces of the shard group, in one exchange.
fn gathered(
    fsdp: &Fsdp,
    pieces: &[Piece<'_>],
    target: impl Fn(&Fsdp, &[usize]) -> Result<Target>,
) -> Result<StateDict<'static>> {
    let group = &fsdp.groups.shard;
    let (mut values, mut plans) = (Vec::with_capacity(pieces.len()), Vec::with_capacity(pieces.len()));
    for Piece { unit, index, held } in pieces {
        let of_all: Vec<_> = (0..group.size()).map(|shard| unit.flat.boxes(*index, shard)).collect();
        let Target { value, wanted } = target(fsdp, held.global_shape())?;
        plans.push(ExchangePlan::new(unit.shard_index(), &of_all, &wanted, &|_, _| true)?);
        values.push(value);
    }
    let moves = values.iter_mut().zip(plans).zip(pieces);
    let mut moves: Vec<Move<'_>> =
        moves.map(|((value, plan), piece)| Move { plan, src: &piece.held, dst: value.as_mut() }).collect();
    exchange(group, &mut moves)?;
    drop(moves);
    Ok(pieces.iter().map(Piece::fqn).zip(values.into_iter().map(Value::Tensor)).collect())
}

fn sharded_zeros(fsdp: &Fsdp, shape: &[usize]) -> Result<Target> {
    let placements = fsdp.placements(shape);
    let coordinate = fsdp.mesh.coordinate().unwrap_or_default();
    let held = local_box(shape, fsdp.mesh.shape(), coordinate, &placements);
    let value = DTensor::from_local_with_shape(&zeros(&held.sizes)?, &fsdp.mesh, &placements, shape)?;
    let wanted = match fsdp.strategy {
        // The shard group is this rank alone.
        ShardingStrategy::NoShard => vec![vec![held]],
        _ => {
            let ranks = fsdp.groups.shard.ranks().iter();
            ranks.map(|rank| value.spec().box_of(*rank).into_iter().collect()).collect()
        }
    };
    Ok(Target { value: Box::new(value), wanted })
}

fn whole_zeros(fsdp: &Fsdp, shape: &[usize]) -> Result<Target> {
    let wanted = vec![vec![TensorBox::whole(shape)]; fsdp.groups.shard.size()];
    Ok(Target { value: Box::new(FlatTensor::whole(&zeros(shape)?)?), wanted })
}

fn zeros(shape: &[usize]) -> Result<candle_core::Tensor> {
    let zeros = candle_core::Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu);
    zeros.during(|| format!("allocating a tensor of shape {shape:?}"))
}
