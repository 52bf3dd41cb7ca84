//! Optimizers over shards: they own their state, keyed by parameter name in state dicts and sharded as parameters are.

mod adam;
mod configs;
mod groups;
mod sgd;
mod state;
mod steps;

pub(crate) use self::state::number;
pub use adam::{Adam, AdamConfig};
pub use groups::ParamGroup;
pub use sgd::{Sgd, SgdConfig};

use sconce_dtensor::StateDict;

use crate::{Fsdp, Result, StateDictType};

/// What every optimizer does.
pub trait Optimizer {
    /// Updates this rank's shards by the gradients of the backwards since the last step, and forgets the gradients.
    ///
    /// Ranks: local; every rank steps after the same backwards. Units that no backward reached do not change.
    ///
    /// # Errors
    /// `OtherModel` if the optimizer was made for another `Fsdp`.
    fn step(&mut self, fsdp: &Fsdp) -> Result<()>;

    /// `{"state": {fqn: {name: tensor}}, "param_groups": [{…}]}`, as torch names it.
    ///
    /// Ranks: collective over the mesh, except for [`StateDictType::FlatShard`].
    ///
    /// # Errors
    /// A failed exchange.
    fn state_dict(&self, fsdp: &Fsdp, kind: StateDictType) -> Result<StateDict<'static>>;

    /// Takes the state of a state dict of any kind, saved under any layout.
    ///
    /// Ranks: collective over the mesh. Nothing changes on any rank if one refuses.
    ///
    /// # Errors
    /// `KeyMismatch`, `ValueMismatch`, `RefusedElsewhere`.
    fn load_state_dict(&mut self, fsdp: &Fsdp, state: &StateDict<'_>) -> Result<()>;

    /// Sets the learning rate of the next steps, in all groups.
    fn set_lr(&mut self, lr: f64);

    /// The learning rate of every group, the optimizer's own first.
    fn lrs(&self) -> Vec<f64>;

    /// Sets the learning rate of the next steps in one group, by its place in [`Optimizer::lrs`]: schedules of groups with
    /// rates of their own are factors of what they began with.
    ///
    /// # Panics
    /// There is no such group.
    fn set_group_lr(&mut self, group: usize, lr: f64);
}
