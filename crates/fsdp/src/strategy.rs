//! ShardingStrategy: which mesh dim shards, which replicates, and when parameters are freed.

use sconce_mesh::{DeviceMesh, ProcessGroup};

use crate::{Error, Result};

/// How parameters, gradients and optimizer state are spread.
///
/// # Source
/// `torch.distributed.fsdp.ShardingStrategy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ShardingStrategy {
    /// Everything sharded over a 1-D mesh; parameters freed after forward and gathered again for backward. A mesh of one
    /// rank keeps them until then, as torch does, which takes `NO_SHARD` there.
    #[default]
    FullShard,
    /// As `FullShard`, but parameters stay gathered from forward to the end of backward.
    ShardGradOp,
    /// Nothing sharded over a 1-D mesh; gradients are all-reduced.
    NoShard,
    /// `FullShard` inside dim 1 of a 2-D mesh, replicated over dim 0.
    HybridShard,
    /// `ShardGradOp` inside dim 1 of a 2-D mesh, replicated over dim 0.
    HybridShardZero2,
}

/// The groups of a strategy on a mesh: who holds the other shards, who holds copies of this one.
#[derive(Debug, Clone)]
pub(crate) struct Groups {
    /// Ranks that together hold one copy of the model.
    pub(crate) shard: ProcessGroup,
    /// Ranks that hold the same shard.
    pub(crate) replicate: ProcessGroup,
    /// All ranks of the mesh.
    pub(crate) mesh: ProcessGroup,
}

impl Groups {
    /// Number of ranks that gradients are averaged over.
    pub(crate) fn n_ranks(&self) -> usize {
        self.shard.size() * self.replicate.size()
    }
}

impl ShardingStrategy {
    /// True if a unit's parameters are freed between its forward and its backward.
    pub(crate) fn reshards_after_forward(self) -> bool {
        matches!(self, Self::FullShard | Self::HybridShard)
    }

    fn name(self) -> &'static str {
        match self {
            Self::FullShard => "FullShard",
            Self::ShardGradOp => "ShardGradOp",
            Self::NoShard => "NoShard",
            Self::HybridShard => "HybridShard",
            Self::HybridShardZero2 => "HybridShardZero2",
        }
    }

    pub(crate) fn groups(self, mesh: &DeviceMesh) -> Result<Groups> {
        let all = mesh.mesh_group().clone();
        let refuse =
            |expected| Error::MeshShape { strategy: self.name(), expected, got: mesh.shape().to_vec() };
        match self {
            Self::HybridShard | Self::HybridShardZero2 if mesh.ndim() != 2 => {
                Err(refuse("2 dims: replicate, shard"))
            }
            Self::HybridShard | Self::HybridShardZero2 => {
                Ok(Groups { shard: mesh.group(1)?.clone(), replicate: mesh.group(0)?.clone(), mesh: all })
            }
            _ if mesh.ndim() != 1 => Err(refuse("1 dim")),
            Self::NoShard => Ok(Groups { shard: ProcessGroup::single(), replicate: all.clone(), mesh: all }),
            Self::FullShard | Self::ShardGradOp => {
                Ok(Groups { shard: all.clone(), replicate: ProcessGroup::single(), mesh: all })
            }
        }
    }
}
