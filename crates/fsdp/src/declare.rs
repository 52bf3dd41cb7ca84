//! Declared: the parameters that a model's constructor asks for, as it asks for them; and the var builder's backend
//! that answers with cells.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;

use crate::cell::{ParamSlot, UnitSlot, parameter_cell, root_token, token_below};
use crate::config::FsdpConfig;
use crate::error::CandleContext;
use crate::init;
use crate::wrap::ParamShape;
use crate::{Error, Result};

/// Everything asked for so far.
#[derive(Debug)]
pub(crate) struct Declared {
    config: FsdpConfig,
    tokens: HashMap<String, Token>,
    pub(crate) params: Vec<DeclaredParam>,
    pub(crate) kept: Vec<KeptWhole>,
    /// Names of wrapped modules.
    pub(crate) wrapped: Vec<String>,
}

/// One level of names.
#[derive(Debug)]
struct Token {
    slot: Arc<UnitSlot>,
    tensor: Tensor,
}

/// A parameter that is sharded.
#[derive(Debug)]
pub(crate) struct DeclaredParam {
    pub(crate) fqn: String,
    pub(crate) init: Init,
    pub(crate) cell: Tensor,
    pub(crate) slot: Arc<ParamSlot>,
    pub(crate) frozen: bool,
}

/// A tensor that every rank keeps whole.
#[derive(Debug, Clone)]
pub(crate) struct KeptWhole {
    pub(crate) fqn: String,
    pub(crate) var: Var,
}

impl Declared {
    pub(crate) fn new(config: FsdpConfig) -> Result<Self> {
        let slot = UnitSlot::new(String::new());
        let tensor = root_token(&slot, &config.device).during(|| "token of the root unit".to_owned())?;
        let tokens = HashMap::from([(String::new(), Token { slot, tensor })]);
        Ok(Self { config, tokens, params: Vec::new(), kept: Vec::new(), wrapped: Vec::new() })
    }

    /// The slot of a name.
    pub(crate) fn slot(&mut self, name: &str) -> candle_core::Result<Arc<UnitSlot>> {
        self.token(name)?;
        Ok(self.tokens[name].slot.clone())
    }

    /// The token of the name without its last component; `None` for the whole model, above which there is nothing.
    pub(crate) fn token_above(&mut self, name: &str) -> candle_core::Result<Option<Tensor>> {
        if name.is_empty() { Ok(None) } else { self.token(parent(name)).map(Some) }
    }

    /// The slots of all names.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (&str, &Arc<UnitSlot>)> {
        self.tokens.iter().map(|(name, token)| (name.as_str(), &token.slot))
    }

    /// Names and shapes of the sharded parameters.
    pub(crate) fn shapes(&self) -> Vec<ParamShape<'_>> {
        self.params.iter().map(|p| ParamShape { fqn: &p.fqn, shape: p.cell.dims() }).collect()
    }

    /// One line for everything that ranks must agree on.
    pub(crate) fn lines(&self) -> Vec<String> {
        let param = |p: &DeclaredParam| {
            format!("{} {:?}{}", p.fqn, p.cell.dims(), if p.frozen { " frozen" } else { "" })
        };
        let kept =
            |k: &KeptWhole| format!("{} {:?} {} kept whole", k.fqn, k.var.dims(), k.var.dtype().as_str());
        let wrapped = self.wrapped.iter().map(|prefix| format!("module {prefix}"));
        self.params.iter().map(param).chain(self.kept.iter().map(kept)).chain(wrapped).collect()
    }

    fn token(&mut self, name: &str) -> candle_core::Result<Tensor> {
        if let Some(token) = self.tokens.get(name) {
            return Ok(token.tensor.clone());
        }
        let parent = self.token(parent(name))?;
        let slot = UnitSlot::new(name.to_owned());
        let tensor = token_below(&parent, &slot)?;
        self.tokens.insert(name.to_owned(), Token { slot, tensor: tensor.clone() });
        Ok(tensor)
    }

    fn get(&self, fqn: &str) -> Option<&Tensor> {
        let kept = || self.kept.iter().find(|kept| kept.fqn == fqn).map(|kept| kept.var.as_tensor());
        self.params.iter().find(|p| p.fqn == fqn).map(|p| &p.cell).or_else(kept)
    }

    fn declare(&mut self, fqn: &str, shape: Shape, init: Init, dtype: DType) -> candle_core::Result<Tensor> {
        if self.config.kept_whole.contains(fqn) {
            return self.keep_whole(fqn, &shape, init, dtype);
        }
        let expected = self.config.mixed_precision.param_dtype;
        if dtype != expected {
            let got = format!("{}, expected {}", dtype.as_str(), expected.as_str());
            return Err(candle_core::Error::wrap(Error::UnsupportedDType { fqn: fqn.to_owned(), got }));
        }
        let slot = ParamSlot::new(fqn.to_owned());
        let cell = parameter_cell(&self.token(parent(fqn))?, &slot, shape, dtype)?;
        let frozen = self.config.frozen.contains(fqn);
        self.params.push(DeclaredParam { fqn: fqn.to_owned(), init, cell: cell.clone(), slot, frozen });
        Ok(cell)
    }

    fn keep_whole(
        &mut self,
        fqn: &str,
        shape: &Shape,
        init: Init,
        dtype: DType,
    ) -> candle_core::Result<Tensor> {
        let mut values = vec![0f32; shape.elem_count()];
        init::fill(init, shape.dims(), self.config.seed, fqn, 0, &mut values);
        let values =
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(&self.config.device)?;
        let var = Var::from_tensor(&values)?;
        self.kept.push(KeptWhole { fqn: fqn.to_owned(), var: var.clone() });
        Ok(var.as_tensor().clone())
    }
}

/// The name without its last component.
fn parent(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(parent, _)| parent)
}

/// What the var builder asks: it makes cells where candle's own backends make or load tensors.
pub(crate) struct CellBackend {
    pub(crate) declared: Arc<Mutex<Declared>>,
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
        match declared.get(name) {
            None => declared.declare(name, shape, init, dtype),
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

pub(crate) fn lock(declared: &Mutex<Declared>) -> MutexGuard<'_, Declared> {
    declared.lock().unwrap_or_else(PoisonError::into_inner)
}
