//! FsdpBuilder: a model is constructed from its var builder, unmodified; then every rank builds its shards.

use std::sync::{Arc, Mutex};

use candle_nn::VarBuilder;
use sconce_dtensor::{FlatTensor, LocalTensor, StateDict};
use sconce_mesh::{DeviceMesh, GroupRank, ProcessGroup};

use crate::cell::UnitSlot;
use crate::config::FsdpConfig;
use crate::declare::{CellBackend, Declared, DeclaredParam, KeptWhole, lock};
use crate::error::CandleContext;
use crate::flat_param::FlatParameter;
use crate::init;
use crate::pass::Pass;
use crate::shard::Shard;
use crate::strategy::Groups;
use crate::unit::{Unit, UnitParts};
use crate::wrap::{innermost, is_inside};
use crate::{Checkpointed, Error, Fsdp, Result, Sharded, StateDictType};

/// Collects the parameters that a model's constructor asks for.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Module;
/// use sconce_fsdp::{FsdpBuilder, FsdpConfig};
/// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
///
/// let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &[])?;
/// let builder = FsdpBuilder::new(&mesh, FsdpConfig::default())?;
/// let model = candle_nn::linear(3, 2, builder.var_builder().pp("net1"))?;
/// let fsdp = builder.build()?;
///
/// let x = Tensor::ones((4, 3), DType::F32, &Device::Cpu)?;
/// let loss = fsdp.forward(&[&x], || model.forward(&x))?.sum_all()?;
/// fsdp.backward(&loss)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct FsdpBuilder {
    mesh: DeviceMesh,
    config: FsdpConfig,
    groups: Groups,
    declared: Arc<Mutex<Declared>>,
}

impl FsdpBuilder {
    /// A builder for a model over `mesh`.
    ///
    /// # Errors
    /// `MeshShape` if the strategy needs another mesh, `UnsupportedDType` for a mixed precision that cannot be.
    pub fn new(mesh: &DeviceMesh, config: FsdpConfig) -> Result<Self> {
        config.mixed_precision.check()?;
        let groups = config.strategy.groups(mesh)?;
        let declared = Arc::new(Mutex::new(Declared::new(config.clone())?));
        Ok(Self { mesh: mesh.clone(), config, groups, declared })
    }

    /// The var builder to construct the model from: any constructor that takes one works as it stands, as long as
    /// it does not compute with the parameters.
    pub fn var_builder(&self) -> VarBuilder<'static> {
        let backend = CellBackend { declared: self.declared.clone() };
        VarBuilder::from_backend(
            Box::new(backend),
            self.config.mixed_precision.param_dtype,
            self.config.device.clone(),
        )
    }

    /// Lets `module`, whose parameters have names below `prefix`, be a unit of its own: gathered before its forward,
    /// freed after it. The wrap policy has the last word, except that `WrapPolicy::Prefixes` knows its units now.
    ///
    /// # Errors
    /// `UnknownUnit` if the configuration lists units and not this one.
    pub fn wrap<M>(&self, prefix: &str, module: M) -> Result<Sharded<M>> {
        self.check_wrap(prefix)?;
        Ok(Sharded::new(declared_slot(&self.declared, prefix)?, module))
    }

    /// As [`FsdpBuilder::wrap`], with activation checkpointing, whether or not the module is a unit.
    ///
    /// # Errors
    /// As [`FsdpBuilder::wrap`].
    pub fn wrap_checkpointed<M>(&self, prefix: &str, module: M) -> Result<Checkpointed<M>> {
        self.check_wrap(prefix)?;
        let slot = declared_slot(&self.declared, prefix)?;
        let above = lock(&self.declared).token_above(prefix);
        let made = above.and_then(|above| Checkpointed::new(slot, module, above, &self.config.device));
        made.during(|| format!("anchor of module {prefix:?}"))
    }

    fn check_wrap(&self, prefix: &str) -> Result<()> {
        match self.config.units.may_wrap(prefix) {
            true => Ok(()),
            false => Err(self.config.units.unknown_unit(prefix, "is not in the configuration")),
        }
    }

    /// Lays the parameters out and fills this rank's shards with their initial values.
    ///
    /// Ranks: collective over the mesh: the ranks compare what they built.
    ///
    /// # Errors
    /// `LayoutMismatch` if ranks built different models, `UnknownUnit` if a prefix matches no parameter, or none of its
    /// own, `NoParameters`; the same on every rank.
    pub fn build(self) -> Result<Fsdp> {
        self.assemble(true)
    }

    /// As [`FsdpBuilder::build`], but `fill` gives the values: it is handed the boxes of this rank's shards, zeroed, by
    /// name, and writes into them in place. Reading them from a checkpoint or from safetensors files reads what this rank
    /// holds and no more: the model is whole nowhere.
    ///
    /// ```text
    /// builder.build_with(|state| load_with("step-100", state, LoadOptions { group: Some(&world), ..Default::default() }))?;
    /// ```
    ///
    /// Ranks: collective over the mesh, and as `fill` is.
    ///
    /// # Errors
    /// As [`FsdpBuilder::build`]; what `fill` returns.
    pub fn build_with<E: From<Error>>(
        self,
        fill: impl FnOnce(&mut StateDict<'static>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Fsdp, E> {
        let fsdp = self.assemble(false)?;
        fill(&mut fsdp.state_dict(StateDictType::FlatShard)?)?;
        Ok(fsdp)
    }

    fn assemble(self, initialize: bool) -> Result<Fsdp> {
        let mut declared = lock(&self.declared);
        let mut lines = declared.lines();
        let FsdpConfig { strategy, mixed_precision, sync_module_states, .. } = &self.config;
        lines.push(format!("strategy {strategy:?}, {mixed_precision:?}, synchronized: {sync_module_states}"));
        if self.groups.replicate.size() > 1 && initialize && !sync_module_states {
            // Replicas of other values would stay others for ever.
            lines.push(format!("seed {}", self.config.seed));
        }
        compare_ranks(&self.groups.mesh, &lines)?;
        let seed = match self.config.sync_module_states {
            true => first_ranks(&self.groups.mesh, self.config.seed)?,
            false => self.config.seed,
        };
        let seed = initialize.then_some(seed);
        if declared.params.is_empty() {
            return Err(Error::NoParameters);
        }
        let mut prefixes = vec![String::new()];
        prefixes.extend(self.config.units.units(&declared.wrapped, &declared.shapes())?);
        let pass = Pass::new(&self.config);
        let units =
            (0..prefixes.len()).map(|nth| self.build_unit(&mut declared, &prefixes, nth, &pass, seed));
        let units = units.collect::<Result<Vec<_>>>()?;
        pass.set_units(&units);
        for (_, slot) in declared.slots().filter(|(name, _)| !prefixes.iter().any(|unit| unit == name)) {
            slot.set(None);
        }
        let kept = std::mem::take(&mut declared.kept);
        drop(declared);
        if self.config.sync_module_states {
            broadcast(&self.groups.mesh, &kept)?;
        }
        Ok(Fsdp::new(self.mesh, self.config.strategy, self.groups, units, kept, pass))
    }

    fn build_unit(
        &self,
        declared: &mut Declared,
        prefixes: &[String],
        nth: usize,
        pass: &Arc<Pass>,
        seed: Option<u64>,
    ) -> Result<Arc<Unit>> {
        let prefix = &prefixes[nth];
        let slot = declared.slot(prefix).during(|| format!("token of unit {prefix:?}"))?;
        let own = |p: &&DeclaredParam| innermost(&p.fqn, prefixes) == Some(prefix);
        let (frozen, trainable): (Vec<_>, Vec<_>) =
            declared.params.iter().filter(own).partition(|p| p.frozen);
        let layout = |p: &&DeclaredParam| (p.fqn.clone(), p.cell.dims().to_vec());
        let (n_shards, is_root) = (self.groups.shard.size(), nth == 0);
        let flat =
            FlatParameter::with_frozen(trainable.iter().map(layout), frozen.iter().map(layout), n_shards);
        let own: Vec<&DeclaredParam> = trainable.into_iter().chain(frozen).collect();
        let unit = Unit::new(UnitParts {
            index: nth,
            name: prefix.clone(),
            shard: match seed {
                Some(seed) => self.initial_shard(&flat, &own, seed),
                None => Shard::zeros(flat.shard_numel()),
            },
            flat,
            slot,
            cells: own.iter().map(|p| p.cell.clone()).collect(),
            groups: self.groups.clone(),
            // As in torch: the root's backward begins where its forward ends, and one rank shares with nobody (there
            // a world of one is NO_SHARD).
            reshard_after_forward: self.config.strategy.reshards_after_forward() && !is_root && n_shards > 1,
            trains: declared.params.iter().any(|p| !p.frozen && is_inside(&p.fqn, prefix)),
            pass: pass.clone(),
        });
        own.iter().enumerate().for_each(|(index, param)| param.slot.set(&unit, index));
        Ok(unit)
    }

    fn initial_shard(&self, flat: &FlatParameter, params: &[&DeclaredParam], seed: u64) -> Shard {
        let mut values = vec![0f32; flat.shard_numel()];
        let shard = self.groups.shard.group_rank().0;
        for (index, (param, layout)) in params.iter().zip(flat.params()).enumerate() {
            let run = flat.run(index, shard);
            let part = &mut values[run.shard_offset..run.shard_offset + run.len];
            init::fill(param.init, &layout.shape, seed, &param.fqn, run.param_offset, part);
        }
        Shard::from_vec(values)
    }
}

/// The slot of a module's name, which is noted as one that may be a unit.
fn declared_slot(declared: &Mutex<Declared>, prefix: &str) -> Result<Arc<UnitSlot>> {
    let mut declared = lock(declared);
    let slot = declared.slot(prefix).during(|| format!("token of module {prefix:?}"))?;
    if !declared.wrapped.iter().any(|known| known == prefix) {
        declared.wrapped.push(prefix.to_owned());
    }
    Ok(slot)
}

/// The first rank's seed, on every rank.
fn first_ranks(group: &ProcessGroup, seed: u64) -> Result<u64> {
    let mut seed = seed.to_le_bytes();
    group.broadcast(&mut seed, GroupRank(0))?;
    Ok(u64::from_le_bytes(seed))
}

/// Gives every rank the first rank's values.
fn broadcast(group: &ProcessGroup, kept: &[KeptWhole]) -> Result<()> {
    for KeptWhole { var, .. } in kept {
        let mut lent = FlatTensor::whole(var.as_tensor())?;
        let mut outcome = Ok(());
        lent.write_box(0, &mut |bytes| outcome = group.broadcast(bytes, GroupRank(0)))?;
        outcome?;
    }
    Ok(())
}

/// Refuses, on every rank, models whose parameters differ in name, shape or order from the first rank's.
fn compare_ranks(group: &ProcessGroup, lines: &[String]) -> Result<()> {
    let all = group.all_gather_object(lines.join("\n").as_bytes())?;
    let Some(other) = all.iter().position(|model| *model != all[0]) else { return Ok(()) };
    let line_of =
        |rank: usize, nth: usize| String::from_utf8_lossy(&all[rank]).lines().nth(nth).map(str::to_owned);
    let (expected, got) = (0..)
        .map(|nth| (line_of(0, nth), line_of(other, nth)))
        .find(|(expected, got)| expected != got)
        .unwrap_or_default();
    let ranks = group.ranks();
    Err(Error::LayoutMismatch { reference: ranks[0], rank: ranks[other], expected, got })
}
