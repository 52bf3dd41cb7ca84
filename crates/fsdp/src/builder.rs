//! FsdpBuilder: a model is constructed from its var builder, unmodified; then every rank builds its shards.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use sconce_mesh::{DeviceMesh, ProcessGroup};

use crate::cell::{Failure, UnitSlot, parameter_cell, unit_token};
use crate::error::CandleContext;
use crate::flat_param::FlatParameter;
use crate::init;
use crate::shard::Shard;
use crate::strategy::Groups;
use crate::unit::{Unit, UnitParts};
use crate::{Error, Fsdp, Result, Sharded, ShardingStrategy};

/// How a model is sharded.
#[derive(Debug, Clone)]
pub struct FsdpConfig {
    /// Who holds what, and when parameters are freed.
    pub strategy: ShardingStrategy,
    /// Name prefixes of the parameters that are gathered and freed together: `["blocks.0", "blocks.1"]`. The longest
    /// match counts; what no prefix matches belongs to the root unit.
    pub units: Vec<String>,
    /// Seed of the initial values: they depend on it and on the parameters' names, not on the layout.
    pub seed: u64,
}

/// Collects the parameters that a model's constructor asks for.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Module;
/// use sconce_fsdp::{FsdpBuilder, FsdpConfig, ShardingStrategy};
/// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
///
/// let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &[])?;
/// let config = FsdpConfig { strategy: ShardingStrategy::FullShard, units: vec![], seed: 0 };
/// let builder = FsdpBuilder::new(&mesh, config)?;
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

/// The parameters asked for so far.
#[derive(Debug)]
struct Declared {
    /// The root, then the configured units.
    units: Vec<DeclaredUnit>,
    params: Vec<DeclaredParam>,
}

#[derive(Debug)]
struct DeclaredUnit {
    prefix: String,
    slot: Arc<UnitSlot>,
    token: Tensor,
    n_params: usize,
}

#[derive(Debug)]
struct DeclaredParam {
    fqn: String,
    unit: usize,
    init: Init,
    cell: Tensor,
}

impl FsdpBuilder {
    /// A builder for a model over `mesh`.
    ///
    /// # Errors
    /// `MeshShape` if the strategy needs another mesh.
    pub fn new(mesh: &DeviceMesh, config: FsdpConfig) -> Result<Self> {
        let groups = config.strategy.groups(mesh)?;
        let prefixes = std::iter::once(String::new()).chain(config.units.iter().cloned());
        let units = prefixes.map(DeclaredUnit::new).collect::<Result<_>>()?;
        let declared = Arc::new(Mutex::new(Declared { units, params: Vec::new() }));
        Ok(Self { mesh: mesh.clone(), config, groups, declared })
    }

    /// The var builder to construct the model from: any constructor that takes one works as it stands, as long as
    /// it does not compute with the parameters.
    pub fn var_builder(&self) -> VarBuilder<'static> {
        let backend = CellBackend { declared: self.declared.clone() };
        VarBuilder::from_backend(Box::new(backend), DType::F32, Device::Cpu)
    }

    /// Makes `module` run as the unit of that prefix: gathered before its forward, freed after it.
    ///
    /// # Errors
    /// `UnknownUnit` if the configuration has no such prefix.
    pub fn wrap<M>(&self, prefix: &str, module: M) -> Result<Sharded<M>> {
        let declared = lock(&self.declared);
        match declared.units.iter().skip(1).find(|unit| unit.prefix == prefix) {
            Some(unit) => Ok(Sharded::new(unit.slot.clone(), module)),
            None => Err(self.unknown_unit(prefix, "is not in the configuration")),
        }
    }

    /// Lays the parameters out and fills this rank's shards with their initial values.
    ///
    /// Ranks: collective over the mesh: the ranks compare what they built.
    ///
    /// # Errors
    /// `LayoutMismatch` if ranks built different models, `UnknownUnit` if a prefix matches no parameter,
    /// `NoParameters`; the same on every rank.
    pub fn build(self) -> Result<Fsdp> {
        let declared = lock(&self.declared);
        compare_ranks(&self.groups.mesh, &declared.params)?;
        if declared.params.is_empty() {
            return Err(Error::NoParameters);
        }
        if let Some(unused) = declared.units.iter().skip(1).find(|unit| unit.n_params == 0) {
            return Err(self.unknown_unit(&unused.prefix, "matches no parameter"));
        }
        let failure = Arc::new(Failure::default());
        let units = (0..declared.units.len()).map(|nth| self.build_unit(&declared, nth, &failure));
        let units = units.collect::<Result<Vec<_>>>()?;
        drop(declared);
        Ok(Fsdp::new(self.mesh, self.config.strategy, self.groups, units, failure))
    }

    fn build_unit(&self, declared: &Declared, nth: usize, failure: &Arc<Failure>) -> Result<Arc<Unit>> {
        let own: Vec<&DeclaredParam> = declared.params.iter().filter(|p| p.unit == nth).collect();
        let layout = own.iter().map(|p| (p.fqn.clone(), p.cell.dims().to_vec()));
        let flat = FlatParameter::new(layout, self.groups.shard.size());
        let shard = self.initial_shard(&flat, &own);
        let DeclaredUnit { prefix, slot, .. } = &declared.units[nth];
        let is_root = nth == 0;
        Ok(Unit::new(UnitParts {
            name: prefix.clone(),
            flat,
            shard,
            slot: slot.clone(),
            cells: own.iter().map(|p| p.cell.clone()).collect(),
            groups: self.groups.clone(),
            // As in torch: the root's backward begins where its forward ends.
            reshard_after_forward: self.config.strategy.reshards_after_forward() && !is_root,
            failure: failure.clone(),
        }))
    }

    fn initial_shard(&self, flat: &FlatParameter, params: &[&DeclaredParam]) -> Shard {
        let mut values = vec![0f32; flat.shard_numel()];
        let shard = self.groups.shard.group_rank().0;
        for (index, (param, layout)) in params.iter().zip(flat.params()).enumerate() {
            let run = flat.run(index, shard);
            let part = &mut values[run.shard_offset..run.shard_offset + run.len];
            init::fill(param.init, &layout.shape, self.config.seed, &param.fqn, run.param_offset, part);
        }
        Shard::from_vec(values)
    }

    fn unknown_unit(&self, prefix: &str, what: &'static str) -> Error {
        Error::UnknownUnit { unit: prefix.to_owned(), what, units: self.config.units.clone() }
    }
}

impl DeclaredUnit {
    fn new(prefix: String) -> Result<Self> {
        let slot = UnitSlot::new(prefix.clone());
        let token = unit_token(&slot).during(|| format!("token of unit {prefix:?}"))?;
        Ok(Self { prefix, slot, token, n_params: 0 })
    }

    fn matches(&self, fqn: &str) -> bool {
        let rest = fqn.strip_prefix(self.prefix.as_str());
        self.prefix.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

impl Declared {
    fn get(&self, fqn: &str) -> Option<&Tensor> {
        self.params.iter().find(|p| p.fqn == fqn).map(|p| &p.cell)
    }

    fn declare(&mut self, fqn: &str, shape: Shape, init: Init) -> candle_core::Result<Tensor> {
        let matching = self.units.iter().enumerate().filter(|(_, unit)| unit.matches(fqn));
        let (nth, _) = matching
            .max_by_key(|(_, unit)| unit.prefix.len())
            .unwrap_or_else(|| unreachable!("the root's empty prefix matches every name"));
        let unit = &mut self.units[nth];
        let cell = parameter_cell(&unit.token, &unit.slot, unit.n_params, shape)?;
        unit.n_params += 1;
        self.params.push(DeclaredParam { fqn: fqn.to_owned(), unit: nth, init, cell: cell.clone() });
        Ok(cell)
    }
}

/// What the var builder asks: it makes cells where candle's own backends make or load tensors.
struct CellBackend {
    declared: Arc<Mutex<Declared>>,
}

impl SimpleBackend for CellBackend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        _device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut declared = lock(&self.declared);
        if dtype != DType::F32 {
            let got = dtype.as_str().to_owned();
            return Err(candle_core::Error::wrap(Error::UnsupportedDType { fqn: name.to_owned(), got }));
        }
        match declared.get(name) {
            None => declared.declare(name, shape, init),
            Some(cell) if cell.shape() == &shape => Ok(cell.clone()),
            Some(cell) => Err(candle_core::Error::wrap(Error::ShapeConflict {
                fqn: name.to_owned(),
                expected: cell.dims().to_vec(),
                got: shape.dims().to_vec(),
            })),
        }
    }

    fn get_unchecked(&self, name: &str, _dtype: DType, _device: &Device) -> candle_core::Result<Tensor> {
        match lock(&self.declared).get(name) {
            Some(cell) => Ok(cell.clone()),
            None => candle_core::bail!("parameter {name}: a sharded model must say the shape it wants"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        lock(&self.declared).get(name).is_some()
    }
}

fn lock(declared: &Mutex<Declared>) -> MutexGuard<'_, Declared> {
    declared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses, on every rank, models whose parameters differ in name, shape or order from the first rank's.
fn compare_ranks(group: &ProcessGroup, params: &[DeclaredParam]) -> Result<()> {
    let lines: Vec<String> = params.iter().map(|p| format!("{} {:?}", p.fqn, p.cell.dims())).collect();
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
