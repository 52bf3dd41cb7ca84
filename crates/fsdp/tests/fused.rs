//! Fused modules: values and gradients of candle's own ops and of finite differences, in every dtype, and under units.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{Module, VarBuilder, ops};
use common::{full, mesh, noise, plain_copy, ranks, relative_difference, tensor};
use sconce_fsdp::{Fsdp, FsdpBuilder, FsdpConfig, Optimizer, Sgd, SgdConfig, ShardingStrategy, nn};

type Op = fn(&[Tensor]) -> Result<Tensor>;

/// A fused op, the same in candle's elementary ones, and the shapes of their arguments.
struct Case {
    name: &'static str,
    fused: Op,
    plain: Op,
    shapes: &'static [&'static [usize]],
}

const CASES: [Case; 10] = [
    Case {
        name: "linear",
        fused: |t| nn::Linear::new(t[1].clone(), Some(t[2].clone())).forward(&t[0]),
        plain: |t| flat(&t[0])?.matmul(&t[1].t()?)?.broadcast_add(&t[2])?.reshape((2, 3, 5)),
        shapes: &[&[2, 3, 7], &[5, 7], &[5]],
    },
    Case {
        name: "linear without bias, on a transposed input",
        fused: |t| nn::Linear::new(t[1].clone(), None).forward(&t[0].t()?),
        plain: |t| t[0].t()?.matmul(&t[1].t()?),
        shapes: &[&[7, 33], &[18, 7]],
    },
    Case {
        name: "layer norm",
        fused: |t| nn::LayerNorm::new(t[1].clone(), t[2].clone(), 1e-5).forward(&t[0]),
        plain: |t| layer_norm(&t[0], &t[1], 1e-5)?.broadcast_add(&t[2]),
        shapes: &[&[2, 3, 19], &[19], &[19]],
    },
    Case {
        name: "layer norm without bias",
        fused: |t| nn::LayerNorm::new_no_bias(t[1].clone(), 1e-3).forward(&t[0]),
        plain: |t| layer_norm(&t[0], &t[1], 1e-3),
        shapes: &[&[4, 5], &[5]],
    },
    Case {
        name: "rms norm",
        fused: |t| nn::RmsNorm::new(t[1].clone(), 1e-5).forward(&t[0]),
        plain: |t| normed(&t[0], 1e-5)?.broadcast_mul(&t[1]),
        shapes: &[&[3, 40], &[40]],
    },
    Case {
        name: "softmax",
        fused: |t| nn::softmax_last_dim(&t[0]),
        plain: |t| ops::softmax(&t[0], D::Minus1),
        shapes: &[&[2, 3, 21]],
    },
    Case {
        name: "cross entropy",
        fused: |t| nn::cross_entropy(&t[0], &Tensor::new(&[4u32, 0, 36], &Device::Cpu)?),
        plain: |t| candle_nn::loss::cross_entropy(&t[0], &Tensor::new(&[4u32, 0, 36], &Device::Cpu)?),
        shapes: &[&[3, 37]],
    },
    Case {
        name: "gelu",
        fused: |t| nn::gelu(&t[0].affine(4.0, 0.0)?),
        plain: |t| {
            let x = t[0].affine(4.0, 0.0)?;
            let u =
                ((&x * (x.sqr()? * 0.044715)?)? + &x)?.affine((2.0 / std::f64::consts::PI).sqrt(), 0.0)?;
            x * (u.tanh()? + 1.0)?.affine(0.5, 0.0)?
        },
        shapes: &[&[5, 13]],
    },
    Case {
        name: "attention",
        fused: |t| nn::attention(&t[0], 2),
        plain: |t| attention(&t[0], 2, false),
        shapes: &[&[2, 5, 18]],
    },
    Case {
        name: "causal attention",
        fused: |t| nn::causal_attention(&t[0], 3),
        plain: |t| attention(&t[0], 3, true),
        shapes: &[&[3, 18, 36]],
    },
];

fn flat(x: &Tensor) -> Result<Tensor> {
    x.reshape(((), x.dim(D::Minus1)?))
}

fn normed(x: &Tensor, eps: f64) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)
}

fn layer_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    normed(&x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?, eps)?.broadcast_mul(weight)
}

fn attention(qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (batch, context, packed) = qkv.dims3()?;
    let (width, qkv) = (packed / 3, qkv.reshape((batch, context, 3, heads, packed / 3 / heads))?);
    let part = |nth| qkv.narrow(2, nth, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
    let (q, k, v): (Tensor, Tensor, Tensor) = (part(0)?, part(1)?, part(2)?);
    let mut scores = q.matmul(&k.t()?)?.affine(1.0 / ((width / heads) as f64).sqrt(), 0.0)?;
    if causal {
        let future = (0..context).flat_map(|i| (0..context).map(move |j| if j > i { -1e9f64 } else { 0.0 }));
        let mask = Tensor::from_iter(future, &Device::Cpu)?.reshape((context, context))?;
        scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
    }
    ops::softmax(&scores, D::Minus1)?.matmul(&v)?.transpose(1, 2)?.reshape((batch, context, width))
}

impl Case {
    /// Arguments of this case, rounded to `dtype`.
    fn arguments(&self, dtype: DType) -> Vec<Var> {
        let one = |(seed, shape): (usize, &&[usize])| {
            Var::from_tensor(&tensor(shape, seed).to_dtype(dtype).unwrap()).unwrap()
        };
        self.shapes.iter().enumerate().map(one).collect()
    }

    /// The output and the gradient of each argument, for a loss that weighs every element of the output.
    fn run(&self, op: Op, arguments: &[Var]) -> Vec<Vec<f64>> {
        let tensors: Vec<Tensor> = arguments.iter().map(|var| var.as_tensor().clone()).collect();
        let out = op(&tensors).unwrap();
        let gradients = weighed(&out).backward().unwrap();
        let gradients = arguments.iter().map(|var| gradients.get(var).unwrap());
        std::iter::once(&out).chain(gradients).map(to_f64).collect()
    }
}

fn weighed(out: &Tensor) -> Tensor {
    let weights = Tensor::from_vec(noise(out.elem_count(), 77), out.shape(), &Device::Cpu).unwrap();
    (out * weights.to_dtype(out.dtype()).unwrap()).unwrap().sum_all().unwrap()
}

fn to_f64(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn difference(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    got.iter().zip(expected).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs() / scale))
}

/// Widths of a few roundings of each dtype, of sums of up to 40 terms.
const TOLERANCES: [(DType, f64); 4] =
    [(DType::F64, 1e-13), (DType::F32, 2e-6), (DType::F16, 3e-3), (DType::BF16, 2.5e-2)];

#[test]
fn values_and_gradients_are_those_of_candles_elementary_ops_in_f64() {
    for case in CASES {
        for (dtype, tolerance) in TOLERANCES {
            let arguments = case.arguments(dtype);
            let got = case.run(case.fused, &arguments);
            let exact: Vec<Var> = arguments
                .iter()
                .map(|var| Var::from_tensor(&var.to_dtype(DType::F64).unwrap()).unwrap())
                .collect();
            for (nth, (got, expected)) in got.iter().zip(case.run(case.plain, &exact)).enumerate() {
                let off = difference(got, &expected);
                assert!(off < tolerance, "{} in {dtype:?}, output or gradient {nth}: {off:e}", case.name);
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 1e-5;
    for case in CASES {
        let arguments = case.arguments(DType::F64);
        let gradients = case.run(case.fused, &arguments).split_off(1);
        for (nth, (var, gradient)) in arguments.iter().zip(gradients).enumerate() {
            let values = to_f64(var.as_tensor());
            let loss = |at: usize, by: f64| {
                let mut moved = values.clone();
                moved[at] += by;
                let mut tensors: Vec<Tensor> = arguments.iter().map(|var| var.as_tensor().clone()).collect();
                tensors[nth] = Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap();
                weighed(&(case.fused)(&tensors).unwrap()).to_scalar::<f64>().unwrap()
            };
            // A few elements of each argument, first and last among them.
            for at in (0..values.len()).step_by(values.len().div_ceil(17)).chain([values.len() - 1]) {
                let slope = (loss(at, STEP) - loss(at, -STEP)) / (2.0 * STEP);
                let off = (slope - gradient[at]).abs();
                assert!(
                    off < 1e-8 * (1.0 + slope.abs()),
                    "{}, argument {nth}, element {at}: {off:e}",
                    case.name
                );
            }
        }
    }
}

#[test]
fn an_embedding_gives_rows_and_adds_their_gradients() {
    let table = Var::from_tensor(&tensor(&[5, 3], 1)).unwrap();
    let indices = Tensor::new(&[[4u32, 0], [4, 2]], &Device::Cpu).unwrap();
    let fused = nn::Embedding::new(table.as_tensor().clone(), 3).forward(&indices).unwrap();
    let plain = candle_nn::Embedding::new(table.as_tensor().clone(), 3).forward(&indices).unwrap();
    assert_eq!(fused.dims(), [2, 2, 3]);
    assert_eq!(to_f64(&fused), to_f64(&plain));
    let gradient = |out: &Tensor| to_f64(weighed(out).backward().unwrap().get(&table).unwrap());
    assert_eq!(gradient(&fused), gradient(&plain));
    let beyond = Tensor::new(&[5u32], &Device::Cpu).unwrap();
    assert!(nn::Embedding::new(table.as_tensor().clone(), 3).forward(&beyond).is_err());
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let x = tensor(&[2, 3], 0);
    let refused = |outcome: Result<Tensor>, says: &str| {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(nn::Linear::new(tensor(&[4, 5], 1), None).forward(&x), "weight is [4, 5], x is [2, 3]");
    refused(nn::RmsNorm::new(tensor(&[4], 1), 1e-5).forward(&x), "weight is [4], x is [2, 3]");
    refused(nn::attention(&tensor(&[1, 2, 8], 0), 2), "8 columns are not q, k and v of 2 heads");
    let target = |class: u32| Tensor::new(&[class, 0], &Device::Cpu).unwrap();
    refused(nn::cross_entropy(&x, &target(3)), "target 3 of 3 classes");
    refused(nn::cross_entropy(&tensor(&[3, 3], 0), &target(0)), "logits are [3, 3], targets [2]");
}

/// A model of every fused module, with an output layer tied to the embedding and a layer that runs twice.
struct Model {
    embedding: nn::Embedding,
    norm: nn::LayerNorm,
    twice: nn::Linear,
    qkv: nn::Linear,
    rms: nn::RmsNorm,
    tied: nn::Linear,
}

const WIDTH: usize = 12;
const CLASSES: usize = 11;

impl Model {
    fn new(vb: VarBuilder<'_>) -> Self {
        let embedding = nn::embedding(CLASSES, WIDTH, vb.pp("embedding")).unwrap();
        Self {
            norm: nn::layer_norm(WIDTH, 1e-5, vb.pp("norm")).unwrap(),
            twice: nn::linear(WIDTH, WIDTH, vb.pp("twice")).unwrap(),
            qkv: nn::linear_no_bias(WIDTH, 3 * WIDTH, vb.pp("qkv")).unwrap(),
            rms: nn::rms_norm(WIDTH, 1e-5, vb.pp("rms")).unwrap(),
            tied: nn::Linear::new(embedding.embeddings().clone(), None),
            embedding,
        }
    }

    fn loss(&self, rank: usize) -> Result<Tensor> {
        let tokens: Vec<u32> = (0..10).map(|i| ((i * 7 + rank * 3) % CLASSES) as u32).collect();
        let tokens = Tensor::from_vec(tokens, (2, 5), &Device::Cpu)?;
        let x = self.twice.forward(&self.norm.forward(&self.embedding.forward(&tokens)?)?)?;
        let x = nn::causal_attention(&self.qkv.forward(&nn::gelu(&self.twice.forward(&x)?)?)?, 2)?;
        let logits = self.tied.forward(&self.rms.forward(&x)?)?;
        nn::cross_entropy(&logits.reshape((10, CLASSES))?, &tokens.flatten_all()?)
    }
}

fn sharded(world: &sconce_mesh::ProcessGroup, strategy: ShardingStrategy) -> (Model, Fsdp) {
    let config = FsdpConfig { strategy, seed: 5, ..FsdpConfig::default() };
    let builder = FsdpBuilder::new(&mesh(world, strategy), config).unwrap();
    let model = Model::new(builder.var_builder());
    (model, builder.build().unwrap())
}

#[test]
fn sharded_gradients_are_the_mean_of_unsharded_ones() {
    const LR: f64 = 0.5;
    for (n, strategy) in
        [(1, ShardingStrategy::FullShard), (3, ShardingStrategy::FullShard), (2, ShardingStrategy::NoShard)]
    {
        ranks(n, |world| {
            let (model, fsdp) = sharded(&world, strategy);
            let (vars, vb) = plain_copy(&fsdp);
            let plain = Model::new(vb);
            let before = full(&fsdp);
            let loss = fsdp.forward(&[], || model.loss(world.rank().0)).unwrap();
            assert_eq!(to_f64(&loss), to_f64(&plain.loss(world.rank().0).unwrap()));
            fsdp.backward(&loss).unwrap();
            Sgd::new(&fsdp, SgdConfig { lr: LR, ..SgdConfig::default() }).unwrap().step(&fsdp).unwrap();
            let after = full(&fsdp);
            let stores: Vec<_> = (0..n).map(|rank| plain.loss(rank).unwrap().backward().unwrap()).collect();
            for (fqn, var) in vars.data().lock().unwrap().iter() {
                let mut expected = before[fqn].clone();
                for store in &stores {
                    let gradient = store.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    expected.iter_mut().zip(gradient).for_each(|(p, g)| *p -= LR as f32 * g / n as f32);
                }
                let off = relative_difference(&after[fqn], &expected);
                assert!(off < 1e-6, "{strategy:?}, {n} ranks, {fqn}: {off}");
            }
        });
    }
}

#[test]
fn a_fused_module_whose_unit_is_freed_is_an_error() {
    ranks(1, |world| {
        let (model, _fsdp) = sharded(&world, ShardingStrategy::FullShard);
        let x = tensor(&[1, WIDTH], 0);
        let errors = [
            model.norm.forward(&x).is_err(),
            model.twice.forward(&x).is_err(),
            model.qkv.forward(&x).is_err(),
            model.rms.forward(&x).is_err(),
            model.loss(0).is_err(),
        ];
        assert_eq!(errors, [true; 5]);
    });
}
