//! Constructors of candle_nn and a model of candle-transformers, unmodified, under FullShard.
//!
//! What candle 0.11 itself cannot differentiate is written down here as well, so that a new version that can is noticed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Conv2dConfig, LSTMConfig, Module, RNN, VarBuilder};
use candle_transformers::models::llama::{Cache, Config, Llama};
use candle_transformers::models::mobilenetv4;
use common::{full, mesh, plain_copy, ranks, relative_difference, tensor};
use sconce_fsdp::{FsdpBuilder, FsdpConfig, Names, Optimizer, Sgd, SgdConfig, ShardingStrategy};

const LR: f64 = 0.5;

/// Builds `make` under FullShard on three ranks and plainly, runs `loss` on both, and compares the weights after a step.
/// Returns the names of the parameters that plain candle has no gradient for.
fn step<M>(
    make: impl Fn(VarBuilder<'static>) -> Result<M> + Sync,
    loss: impl Fn(&M) -> Result<Tensor> + Sync,
) -> Vec<String> {
    let untrained = ranks(3, |world| {
        let kept_whole = Names::matching(|fqn| fqn.contains("running_"));
        let config = FsdpConfig { kept_whole, ..FsdpConfig::default() };
        let builder = FsdpBuilder::new(&mesh(&world, ShardingStrategy::FullShard), config).unwrap();
        let model = make(builder.var_builder()).unwrap();
        let fsdp = builder.build().unwrap();
        let (vars, vb) = plain_copy(&fsdp);
        let plain = make(vb).unwrap();
        let before = full(&fsdp);
        let sharded = fsdp.forward(&[], || loss(&model)).unwrap();
        fsdp.backward(&sharded).unwrap();
        Sgd::new(&fsdp, SgdConfig { lr: LR, ..SgdConfig::default() }).unwrap().step(&fsdp).unwrap();
        let gradients = loss(&plain).unwrap().backward().unwrap();
        let (after, mut untrained) = (full(&fsdp), vec![]);
        for (fqn, var) in vars.data().lock().unwrap().iter() {
            let gradient = gradients.get(var).map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let gradient = match gradient {
                Some(gradient) if !fqn.contains("running_") => gradient,
                _ => {
                    untrained.push(fqn.clone());
                    vec![0.0; var.elem_count()]
                }
            };
            let expected: Vec<f32> =
                before[fqn].iter().zip(&gradient).map(|(p, g)| p - LR as f32 * g).collect();
            let off = relative_difference(&after[fqn], &expected);
            assert!(off < 1e-6, "{fqn}: {off}");
        }
        untrained.sort();
        untrained
    });
    untrained.into_iter().next().unwrap()
}

fn trains<M>(
    make: impl Fn(VarBuilder<'static>) -> Result<M> + Sync,
    loss: impl Fn(&M) -> Result<Tensor> + Sync,
) {
    assert_eq!(step(make, loss), Vec::<String>::new());
}

fn weighted(x: &Tensor) -> Result<Tensor> {
    x.mul(&tensor(x.dims(), 77))?.sum_all()
}

#[test]
fn linear_trains() {
    trains(|vb| candle_nn::linear(4, 3, vb), |m| weighted(&m.forward(&tensor(&[2, 4], 1))?));
}

#[test]
fn embedding_trains() {
    let ids = Tensor::new(&[[0u32, 2, 1], [2, 3, 3]], &Device::Cpu).unwrap();
    trains(|vb| candle_nn::embedding(4, 5, vb), |m| weighted(&m.forward(&ids)?));
}

/// Without bias candle takes the way of its own basic ops.
#[test]
fn layer_norm_without_bias_trains() {
    trains(|vb| candle_nn::layer_norm_no_bias(5, 1e-5, vb), |m| weighted(&m.forward(&tensor(&[2, 5], 1))?));
}

/// On an input that is not contiguous candle takes the way of its own basic ops.
#[test]
fn layer_norm_trains_on_inputs_that_are_not_contiguous() {
    let make = |vb: VarBuilder<'static>| candle_nn::layer_norm(5, 1e-5, vb);
    trains(make, |m| weighted(&m.forward(&tensor(&[5, 2], 1).t()?)?));
}

#[test]
fn rms_norm_trains_on_inputs_that_are_not_contiguous() {
    let make = |vb: VarBuilder<'static>| candle_nn::rms_norm(5, 1e-5, vb);
    trains(make, |m| weighted(&m.forward(&tensor(&[5, 2], 1).t()?)?));
}

#[test]
fn conv2d_trains() {
    let config = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
    let make = |vb: VarBuilder<'static>| candle_nn::conv2d(2, 3, 3, config, vb);
    trains(make, |m| weighted(&m.forward(&tensor(&[1, 2, 5, 5], 1))?));
}

#[test]
fn lstm_trains() {
    let make = |vb: VarBuilder<'static>| candle_nn::lstm(4, 3, LSTMConfig::default(), vb);
    trains(make, |m| {
        let states = m.seq(&tensor(&[2, 6, 4], 1))?;
        weighted(states.last().unwrap().h())
    });
}

/// They give no error either: what lies below them silently gets no gradient.
#[test]
fn candles_fused_norms_and_softmax_stop_gradients_sharded_or_not() {
    let x = candle_core::Var::from_tensor(&tensor(&[2, 5], 1)).unwrap();
    let one = Tensor::ones(5, DType::F32, &Device::Cpu).unwrap();
    let has_gradient = |output: Tensor| weighted(&output).unwrap().backward().unwrap().get(&x).is_some();
    assert!(!has_gradient(candle_nn::ops::layer_norm(&x, &one, &one, 1e-5).unwrap()));
    assert!(!has_gradient(candle_nn::ops::rms_norm(&x, &one, 1e-5).unwrap()));
    assert!(!has_gradient(candle_nn::ops::softmax_last_dim(&x).unwrap()));
    assert!(has_gradient(candle_nn::ops::softmax(&x, D::Minus1).unwrap()));
}

#[test]
fn mobilenet_of_candle_transformers_trains() {
    let image = tensor(&[1, 3, 32, 32], 1);
    let config = mobilenetv4::Config::small();
    let make = |vb: VarBuilder<'static>| mobilenetv4::mobilenetv4(&config, 5, vb);
    let untrained = step(make, |m| weighted(&m.forward(&image)?)?.affine(1e-3, 0.0));
    // Norms of depthwise layers that this size of the model leaves out: it makes them and never runs them.
    let left_out = |fqn: &str| fqn.contains(".dw_") && fqn.contains(".bn.");
    assert!(untrained.iter().all(|fqn| fqn.contains("running_") || left_out(fqn)), "{untrained:?}");
}

/// Llama's last norm is candle's fused one: of its weights candle trains the output layer's only, sharded or not.
#[test]
fn llama_of_candle_transformers_gets_the_gradients_that_candle_gives() {
    let config = Config {
        hidden_size: 16,
        intermediate_size: 24,
        vocab_size: 11,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 8,
        tie_word_embeddings: false,
    };
    let ids = Tensor::new(&[[1u32, 4, 2, 9]], &Device::Cpu).unwrap();
    let loss = |m: &Llama| {
        let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu)?;
        weighted(&m.forward(&ids, 0, &mut cache)?)
    };
    let untrained = step(|vb| Llama::load(vb, &config), loss);
    assert_eq!(untrained.len(), 20);
    assert!(!untrained.contains(&"lm_head.weight".to_owned()));
}
