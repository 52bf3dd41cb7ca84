//! Layer norm and RMS norm over the last dim, with a backward.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Module, Result, Shape, Tensor, bail};
use candle_nn::{Init, LayerNormConfig, VarBuilder};

use super::composed::{self, is_fused};
use super::kernel::{Kernel, Lent, on_storages, on_tensors};
use super::param::Param;
use super::real::{Real, sum, sum2};

/// (x − mean) / √(variance + ε) · weight + bias over the last dim; without `remove_mean`, x / √(mean of x² + ε) · weight.
///
/// # Source
/// `candle_nn::LayerNorm`, whose fused form has no backward; `torch.nn.LayerNorm`.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Param,
    bias: Option<Param>,
    remove_mean: bool,
    eps: f64,
}

impl LayerNorm {
    /// With weight and bias.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { bias: Some(Param::new(bias)), ..Self::new_no_bias(weight, eps) }
    }

    /// With a weight only.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self { weight: Param::new(weight), bias: None, remove_mean: true, eps }
    }

    /// With a weight only, the mean left in.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self { remove_mean: false, ..Self::new_no_bias(weight, eps) }
    }

    /// The factor of each column.
    pub fn weight(&self) -> &Tensor {
        self.weight.tensor()
    }

    /// What is added to each column.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref().map(Param::tensor)
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// False for RMS norm.
    pub fn remove_mean(&self) -> bool {
        self.remove_mean
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !is_fused(x) {
            let bias = self.bias.as_ref().map(Param::tensor);
            return composed::norm(x, self.weight.tensor(), bias, (self.remove_mean, self.eps));
        }
        let (x, weight) = (x.contiguous()?, self.weight.argument());
        let op = Norm(self.clone());
        match &self.bias {
            None => x.apply_op2(weight, op),
            Some(bias) => x.apply_op3(weight, bias.argument(), op),
        }
    }
}

/// A norm with `weight`, and `bias` if `config` is affine, of `vb`.
///
/// As in candle_nn, a file that names them `gamma` and `beta` is read too.
///
/// # Errors
/// What `vb` answers.
pub fn layer_norm<C: Into<LayerNormConfig>>(size: usize, config: C, vb: VarBuilder<'_>) -> Result<LayerNorm> {
    let LayerNormConfig { eps, remove_mean, affine } = config.into();
    let named = |names: [&'static str; 2], init| {
        let name =
            if !vb.contains_tensor(names[0]) && vb.contains_tensor(names[1]) { names[1] } else { names[0] };
        vb.get_with_hints(size, name, Init::Const(init)).map(Param::new)
    };
    let weight = named(["weight", "gamma"], 1.0)?;
    let bias = if affine { Some(named(["bias", "beta"], 0.0)?) } else { None };
    Ok(LayerNorm { weight, bias, remove_mean, eps })
}

/// A norm with `weight` of `vb` and no bias.
///
/// # Errors
/// What `vb` answers.
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder<'_>) -> Result<LayerNorm> {
    layer_norm(size, LayerNormConfig { eps, remove_mean: true, affine: false }, vb)
}

/// x / √(mean of x² + ε) · weight over the last dim.
///
/// # Source
/// `candle_nn::RmsNorm`, whose fused form has no backward; `torch.nn.RMSNorm`.
#[derive(Debug, Clone)]
pub struct RmsNorm(LayerNorm);

impl RmsNorm {
    /// With the given weight.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// The same norm as a [`LayerNorm`].
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// The factor of each column.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

/// An RMS norm with `weight` of `vb`.
///
/// # Errors
/// What `vb` answers.
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder<'_>) -> Result<RmsNorm> {
    layer_norm(size, LayerNormConfig { eps, remove_mean: false, affine: false }, vb).map(RmsNorm)
}

/// The op; it holds the parameters because its arguments may be their tokens.
struct Norm(LayerNorm);

impl Norm {
    fn rows(&self, x: &Layout) -> Result<Rows> {
        let width = self.0.weight.tensor().dims1()?;
        if x.dims().last() != Some(&width) {
            bail!("norm: weight is [{width}], x is {:?}", x.dims());
        }
        Ok(Rows { width, eps: self.0.eps, remove_mean: self.0.remove_mean })
    }

    fn bias(&self) -> Result<&Param> {
        self.0
            .bias
            .as_ref()
            .ok_or_else(|| candle_core::Error::Msg("norm: three arguments without a bias".to_owned()))
    }

    /// Gradients of x, and the gradients of weight and bias for those who want them.
    fn backward(&self, x: &Tensor, grad: &Tensor) -> Result<[Tensor; 3]> {
        let rows = self.rows(x.layout())?;
        let shapes = [x.shape().clone(), Shape::from(rows.width), Shape::from(rows.width)];
        on_tensors(&Backward(rows), [x, &self.0.weight.values(), grad], shapes)
    }
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let kernel = Forward(self.rows(xl)?);
        let [y] = self.0.weight.lend((w, wl), |w| on_storages(&kernel, [(x, xl), w]))?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = self.backward(x, grad)?;
        Ok((x.track_op().then_some(dx), self.0.weight.backward(|| Ok(dw))?))
    }
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let kernel = Forward(self.rows(xl)?);
        let run = |w: Lent<'_>, b: Lent<'_>| on_storages(&kernel, [(x, xl), w, b]);
        let [y] = self.0.weight.lend((w, wl), |w| self.bias()?.lend((b, bl), |b| run(w, b)))?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _w: &Tensor,
        _b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = self.backward(x, grad)?;
        Ok((
            x.track_op().then_some(dx),
            self.0.weight.backward(|| Ok(dw))?,
            self.bias()?.backward(|| Ok(db))?,
        ))
    }
}

/// What a norm does to each row.
#[derive(Clone, Copy)]
struct Rows {
    width: usize,
    eps: f64,
    remove_mean: bool,
}

impl Rows {
    /// Mean (0 if it stays in) and 1 / √(variance + ε) of a row.
    #[inline(always)]
    fn statistics<T: Real>(&self, row: &[T]) -> (T, T) {
        let n = T::from_real(row.len() as f64);
        let mean = if self.remove_mean { sum(row, |x| x) / n } else { T::ZERO };
        let variance = sum(row, |x| (x - mean) * (x - mean)) / n;
        (mean, T::ONE / (variance + T::from_real(self.eps)).sqrt())
    }

    /// The rows of x, normalized, times the weight.
    #[inline(always)]
    fn scaled<T: Real>(&self, x: &[T], weight: &[T]) -> Vec<T> {
        let mut y = Vec::with_capacity(x.len());
        for row in x.chunks_exact(self.width.max(1)) {
            let (mean, scale) = self.statistics(row);
            y.extend(row.iter().zip(weight).map(|(x, w)| (*x - mean) * scale * *w));
        }
        y
    }
}

struct Forward(Rows);

impl Kernel<2, 1> for Forward {
    #[inline(always)]
    fn run<T: Real>(&self, [x, weight]: [&[T]; 2]) -> [Vec<T>; 1] {
        [self.0.scaled(x, weight)]
    }
}

impl Kernel<3, 1> for Forward {
    #[inline(always)]
    fn run<T: Real>(&self, [x, weight, bias]: [&[T]; 3]) -> [Vec<T>; 1] {
        let mut y = self.0.scaled(x, weight);
        for row in y.chunks_exact_mut(self.0.width.max(1)) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += *b);
        }
        [y]
    }
}

struct Backward(Rows);

/// With n = (x − mean)·scale and g = grad·weight: dx = scale·(g − mean(g) − n·mean(g·n)), dw = Σ grad·n, db = Σ grad.
impl Kernel<3, 3> for Backward {
    #[inline(always)]
    fn run<T: Real>(&self, [x, weight, grad]: [&[T]; 3]) -> [Vec<T>; 3] {
        let Rows { width, remove_mean, .. } = self.0;
        let n = T::from_real(width as f64);
        let (mut dw, mut db) = (vec![T::ZERO; width], vec![T::ZERO; width]);
        let (mut normed, mut weighted) = (vec![T::ZERO; width], vec![T::ZERO; width]);
        let mut dx = Vec::with_capacity(x.len());
        for (row, grad) in x.chunks_exact(width.max(1)).zip(grad.chunks_exact(width.max(1))) {
            let (mean, scale) = self.0.statistics(row);
            for i in 0..width {
                normed[i] = (row[i] - mean) * scale;
                weighted[i] = grad[i] * weight[i];
                dw[i] += grad[i] * normed[i];
                db[i] += grad[i];
            }
            let along = sum2(&weighted, &normed, |g, n| g * n) / n;
            let level = if remove_mean { sum(&weighted, |g| g) / n } else { T::ZERO };
            dx.extend(weighted.iter().zip(&normed).map(|(g, x)| scale * (*g - level - *x * along)));
        }
        [dx, dw, db]
    }
}
