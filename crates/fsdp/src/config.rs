//! FsdpConfig: everything that is chosen before a model is built.

use candle_core::Device;

use crate::{MixedPrecision, Names, ShardingStrategy, WrapPolicy};

/// How a model is sharded and run.
///
/// ```
/// use sconce_fsdp::{FsdpConfig, ShardingStrategy, WrapPolicy};
///
/// let config = FsdpConfig {
///     strategy: ShardingStrategy::FullShard,
///     units: WrapPolicy::RepeatedBlocks(vec!["blocks".to_owned()]),
///     ..FsdpConfig::default()
/// };
/// ```
#[derive(Debug, Clone)]
pub struct FsdpConfig {
    /// Where the model computes: the CPU, or a CUDA device made by `Device::new_cuda_with_stream`. Shards, their gradients and
    /// the optimizer's state lie in host memory either way; what is gathered lies on the device while it is needed.
    pub device: Device,
    /// Who holds what, and when parameters are freed.
    pub strategy: ShardingStrategy,
    /// Which modules are gathered and freed together; the root alone by default.
    pub units: WrapPolicy,
    /// Seed of the initial values: they depend on it and on the parameters' names, not on the layout. Ranks that are replicas
    /// of each other have the same, or `sync_module_states`.
    pub seed: u64,
    /// Parameters that are not trained: sharded as the others, but without gradient, reduction or optimizer state.
    pub frozen: Names,
    /// Tensors that every rank keeps whole, as candle variables ([`Fsdp::kept_whole`](crate::Fsdp::kept_whole)): buffers
    /// such as the running statistics of a batch norm, and parameters that FSDP shall ignore. Their gradients come
    /// from [`Fsdp::backward`](crate::Fsdp::backward), not reduced.
    pub kept_whole: Names,
    /// Gives every rank the first rank's values: of what is kept whole, and, by its seed, of sharded parameters.
    pub sync_module_states: bool,
    /// Dtypes to compute and reduce in.
    pub mixed_precision: MixedPrecision,
    /// What is communicated while the model computes.
    pub overlap: Overlap,
}

impl Default for FsdpConfig {
    /// Everything sharded in one unit, in f32 on the CPU.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            strategy: ShardingStrategy::default(),
            units: WrapPolicy::default(),
            seed: 0,
            frozen: Names::default(),
            kept_whole: Names::default(),
            sync_module_states: false,
            mixed_precision: MixedPrecision::default(),
            overlap: Overlap::default(),
        }
    }
}

/// Communication beside computation.
///
/// Of prefetched units there are never more than `forward_prefetch` or `backward_prefetch` at a time, and of reductions
/// never more than one: what torch's `limit_all_gathers` is for holds by construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlap {
    /// How many units are gathered ahead in forward, in the order of the forward before.
    pub forward_prefetch: usize,
    /// How many units are gathered ahead in backward, in the reverse order of forward.
    pub backward_prefetch: usize,
    /// Whether gradients are reduced while the next unit's backward computes.
    pub reduce: bool,
}

impl Overlap {
    /// Every collective in its turn: the least memory.
    pub const NONE: Overlap = Overlap { forward_prefetch: 0, backward_prefetch: 0, reduce: false };
}

impl Default for Overlap {
    /// One unit ahead in both directions, and reductions beside backward.
    fn default() -> Self {
        Overlap { forward_prefetch: 1, backward_prefetch: 1, reduce: true }
    }
}
