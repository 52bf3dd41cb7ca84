//! State dicts of sharded models: Full, Sharded and the flat shards themselves; and loading from any of them.

use sconce_dtensor::{
    DTensor, DType, ExchangePlan, FlatTensor, LocalTensor, Move, Placement, StateDict, TensorBox, TensorBuf,
    Value, exchange, local_box,
};

use crate::error::CandleContext;
use crate::shard::Shard;
use crate::shard_piece::ShardPiece;
use crate::unit::Unit;
use crate::{Fsdp, ParamLayout, Result, ShardingStrategy};

mod loading;
mod wire;
pub use loading::LoadReport;
pub(crate) use loading::Loading;

/// What the values of a state dict are.
///
/// # Source
/// `torch.distributed.fsdp.StateDictType`; `FlatShard` has no counterpart there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateDictType {
    /// Whole tensors on every rank.
    Full,
    /// Whole tensors on the mesh's first rank, nothing on the others (torch's `rank0_only`).
    FullOnFirstRank,
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
        let mut state = shard_state_dict(self, &self.parameter_views(), kind)?;
        if kind != StateDictType::FullOnFirstRank || self.is_first_rank() {
            for (fqn, var) in self.kept_whole() {
                state.insert(fqn, Value::try_from(var.as_tensor())?);
            }
        }
        Ok(state)
    }

    /// Takes the parameters of a state dict of any kind, from any layout of this mesh's ranks. What a rank does not have
    /// it takes from one that has.
    ///
    /// Ranks: collective over the mesh. Nothing changes on any rank if one refuses.
    ///
    /// # Errors
    /// `KeyMismatch` with every missing and unexpected name, `ValueMismatch` with both shapes or dtypes,
    /// `RefusedElsewhere`; `DTensor(Uncovered)` if no rank holds a part of a parameter.
    pub fn load_state_dict(&self, state: &StateDict<'_>) -> Result<()> {
        self.load(state, true).map(drop)
    }

    /// As [`Fsdp::load_state_dict`], but loads what names both have, and returns the others.
    ///
    /// Ranks: collective over the mesh. Nothing changes on any rank if one refuses.
    ///
    /// # Errors
    /// As [`Fsdp::load_state_dict`], without `KeyMismatch`.
    ///
    /// # Source
    /// `load_state_dict(strict=False)`.
    pub fn load_state_dict_non_strict(&self, state: &StateDict<'_>) -> Result<LoadReport> {
        self.load(state, false)
    }

    fn load(&self, state: &StateDict<'_>, strict: bool) -> Result<LoadReport> {
        let mut loading = Loading::new(self, strict);
        loading.add(&self.parameter_views(), "", |fqn| state.get(fqn))?;
        loading.add_kept(|fqn| state.get(fqn))?;
        loading.note_unexpected(state.keys());
        loading.run(Ok(()))
    }

    fn parameter_views(&self) -> Vec<ShardView<'_>> {
        let view = |unit| ShardView { unit, shard: &unit.shard, params: unit.flat.params() };
        self.units.iter().map(|unit| view(&**unit)).collect()
    }

    fn is_first_rank(&self) -> bool {
        self.groups.mesh.group_rank().0 == 0
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

/// A shard of a unit's parameters, or of a moment of the trainable ones.
pub(crate) struct ShardView<'f> {
    pub(crate) unit: &'f Unit,
    pub(crate) shard: &'f Shard,
    /// The unit's first parameters: all, or the trainable ones.
    pub(crate) params: &'f [ParamLayout],
}

impl ShardView<'_> {
    /// What this rank's shard holds of a parameter, sharing its storage.
    fn piece(&self, index: usize) -> ShardPiece {
        let run = self.unit.flat.run(index, self.unit.shard_index());
        let shape = &self.params[index].shape;
        ShardPiece::new(self.shard.clone(), run.shard_offset, shape, run.param_offset, run.len)
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

/// One shard a unit as a state dict of `kind`.
pub(crate) fn shard_state_dict(
    fsdp: &Fsdp,
    views: &[ShardView<'_>],
    kind: StateDictType,
) -> Result<StateDict<'static>> {
    let pieces = views.iter().flat_map(|view| {
        (0..view.params.len()).map(move |index| Piece { unit: view.unit, index, held: view.piece(index) })
    });
    let pieces: Vec<Piece<'_>> = pieces.collect();
    match kind {
        StateDictType::FlatShard => {
            let entry = |piece: Piece<'_>| (piece.fqn(), Value::Tensor(Box::new(piece.held)));
            Ok(pieces.into_iter().map(entry).collect())
        }
        StateDictType::Sharded => gathered(fsdp, &pieces, sharded_zeros),
        StateDictType::Full => gathered(fsdp, &pieces, whole_zeros),
        StateDictType::FullOnFirstRank => {
            let state = gathered(fsdp, &pieces, whole_on_first)?;
            Ok(if fsdp.is_first_rank() { state } else { StateDict::new() })
        }
    }
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

/// Whole in the first member of each shard group, which is the mesh's first rank in one of them.
fn whole_on_first(fsdp: &Fsdp, shape: &[usize]) -> Result<Target> {
    let mut wanted = vec![vec![]; fsdp.groups.shard.size()];
    wanted[0].push(TensorBox::whole(shape));
    let value: Box<dyn LocalTensor> = if fsdp.groups.shard.group_rank().0 == 0 {
        Box::new(FlatTensor::whole(&zeros(shape)?)?)
    } else {
        Box::new(TensorBuf::from_boxes(DType::F32, shape, vec![], vec![])?)
    };
    Ok(Target { value, wanted })
}

fn zeros(shape: &[usize]) -> Result<candle_core::Tensor> {
    let zeros = candle_core::Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu);
    zeros.during(|| format!("allocating a tensor of shape {shape:?}"))
}
