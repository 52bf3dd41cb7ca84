//! A small transformer under every strategy against plain candle in one process.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

mod common;

use candle_core::{D, Device, Result, Tensor};
use candle_nn::loss::cross_entropy;
use candle_nn::{
    Embedding, LayerNorm, Linear, Module, Optimizer as _, ParamsAdamW, VarBuilder, embedding,
    layer_norm_no_bias, linear, linear_no_bias,
};
use common::{STRATEGIES, mesh, plain_copy, ranks};
use sconce_fsdp::{Adam, AdamConfig, FsdpBuilder, FsdpConfig, Optimizer, WrapPolicy};
use sconce_mesh::ReduceOp;

const STEPS: usize = 50;
const VOCABULARY: usize = 17;
const WIDTH: usize = 16;
const HEADS: usize = 2;
const CONTEXT: usize = 6;
const BATCH: usize = 4;
const LR: f64 = 3e-3;

struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            norm1: layer_norm_no_bias(WIDTH, 1e-5, vb.pp("norm1"))?,
            qkv: linear_no_bias(WIDTH, 3 * WIDTH, vb.pp("qkv"))?,
            out: linear(WIDTH, WIDTH, vb.pp("out"))?,
            norm2: layer_norm_no_bias(WIDTH, 1e-5, vb.pp("norm2"))?,
            up: linear(WIDTH, 4 * WIDTH, vb.pp("up"))?,
            down: linear(4 * WIDTH, WIDTH, vb.pp("down"))?,
        })
    }

    fn attention(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, context, _) = x.dims3()?;
        let qkv = self.qkv.forward(x)?.reshape((batch, context, 3, HEADS, WIDTH / HEADS))?;
        let part = |nth: usize| qkv.narrow(2, nth, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
        let future = (0..context).flat_map(|i| (0..context).map(move |j| if j > i { -1e9f32 } else { 0.0 }));
        let mask = Tensor::from_iter(future, &Device::Cpu)?.reshape((context, context))?;
        let scores = part(0)?.matmul(&part(1)?.t()?)?.affine(1.0 / ((WIDTH / HEADS) as f64).sqrt(), 0.0)?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        self.out.forward(&weights.matmul(&part(2)?)?.transpose(1, 2)?.reshape((batch, context, WIDTH))?)
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention(&self.norm1.forward(x)?)?)?;
        let hidden = self.up.forward(&self.norm2.forward(&x)?)?.gelu()?;
        x + self.down.forward(&hidden)?
    }
}

/// The output layer is the embedding again.
struct Transformer<B> {
    token: Embedding,
    blocks: Vec<B>,
    norm: LayerNorm,
}

impl<B: Module> Transformer<B> {
    fn new(vb: VarBuilder<'_>, wrap: impl Fn(&str, Block) -> B) -> Self {
        let block = |nth: usize| {
            let name = format!("blocks.{nth}");
            wrap(&name, Block::new(vb.pp(&name)).unwrap())
        };
        let norm = layer_norm_no_bias(WIDTH, 1e-5, vb.pp("norm")).unwrap();
        Self {
            token: embedding(VOCABULARY, WIDTH, vb.pp("token")).unwrap(),
            blocks: (0..2).map(block).collect(),
            norm,
        }
    }

    fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        let context = tokens.dim(1)? - 1;
        let x = self.token.forward(&tokens.narrow(1, 0, context)?)?;
        let x = self.blocks.iter().try_fold(x, |x, block| block.forward(&x))?;
        let logits = self.norm.forward(&x)?.flatten_to(1)?.matmul(&self.token.embeddings().t()?)?;
        cross_entropy(&logits, &tokens.narrow(1, 1, context)?.flatten_all()?)
    }
}

fn batch(step: usize) -> Tensor {
    let token = |n: usize| ((step * 7919 + n * n * 31 + n * 17) % VOCABULARY) as u32;
    let tokens: Vec<u32> = (0..BATCH * (CONTEXT + 1)).map(token).collect();
    Tensor::from_vec(tokens, (BATCH, CONTEXT + 1), &Device::Cpu).unwrap()
}

#[test]
fn losses_of_a_transformer_follow_plain_candle_for_fifty_steps() {
    for strategy in STRATEGIES {
        for n in [1, 2, 4] {
            ranks(n, |world| {
                let units = WrapPolicy::RepeatedBlocks(vec!["blocks".to_owned()]);
                let config = FsdpConfig { strategy, units, seed: 4, ..FsdpConfig::default() };
                let builder = FsdpBuilder::new(&mesh(&world, strategy), config).unwrap();
                let model =
                    Transformer::new(builder.var_builder(), |name, block| builder.wrap(name, block).unwrap());
                let fsdp = builder.build().unwrap();
                let (vars, vb) = plain_copy(&fsdp);
                let plain = Transformer::new(vb, |_, block| block);
                let mut optim = Adam::new(&fsdp, AdamConfig { lr: LR, ..AdamConfig::default() }).unwrap();
                let params = ParamsAdamW { lr: LR, weight_decay: 0.0, ..ParamsAdamW::default() };
                let mut plain_optim = candle_nn::AdamW::new(vars.all_vars(), params).unwrap();
                for step in 0..STEPS {
                    let tokens = batch(step % 5);
                    let rows = BATCH / n;
                    let mine = tokens.narrow(0, world.rank().0 * rows, rows).unwrap();
                    let loss = fsdp.forward(&[], || model.loss(&mine)).unwrap();
                    fsdp.backward(&loss).unwrap();
                    optim.step(&fsdp).unwrap();
                    let mut mean = [loss.to_scalar::<f32>().unwrap()];
                    world.all_reduce(&mut mean, ReduceOp::Avg).unwrap();
                    let expected = plain.loss(&tokens).unwrap();
                    plain_optim.backward_step(&expected).unwrap();
                    let expected = expected.to_scalar::<f32>().unwrap();
                    let off = ((mean[0] - expected) / expected).abs();
                    assert!(
                        off < 1e-5,
                        "{strategy:?}, {n} ranks, step {step}: {} for {expected}, off by {off}",
                        mean[0]
                    );
                }
            });
        }
    }
}
