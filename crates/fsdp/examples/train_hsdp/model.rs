//! A decoder-only transformer made of fused modules, which candle_nn's of the same names could replace. It knows nothing
//! of sharding, except that the caller may wrap its blocks.

use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};
use sconce_fsdp::nn::{
    Embedding, LayerNorm, Linear, causal_attention, embedding, gelu, layer_norm_no_bias, linear,
    linear_no_bias,
};

use crate::AnyResult;
use crate::corpus::CONTEXT;

const WIDTH: usize = 160;
const HEADS: usize = 4;
/// Transformer blocks; each is a unit of its own.
const BLOCKS: usize = 4;

/// Characters in, logits of the next character out.
pub(crate) struct Transformer {
    token: Embedding,
    position: Embedding,
    blocks: Vec<Box<dyn Module>>,
    norm: LayerNorm,
    head: Linear,
}

impl Transformer {
    /// `wrap(prefix, block)` may make each block a unit; about 1.3 M parameters.
    pub(crate) fn new(
        vocabulary: usize,
        vb: VarBuilder<'_>,
        wrap: impl Fn(&str, Block) -> AnyResult<Box<dyn Module>>,
    ) -> AnyResult<Self> {
        let block = |nth: usize| {
            let prefix = format!("blocks.{nth}");
            wrap(&prefix, Block::new(vb.pp(&prefix))?)
        };
        Ok(Self {
            token: embedding(vocabulary, WIDTH, vb.pp("token"))?,
            position: embedding(CONTEXT, WIDTH, vb.pp("position"))?,
            blocks: (0..BLOCKS).map(block).collect::<AnyResult<_>>()?,
            norm: layer_norm_no_bias(WIDTH, 1e-5, vb.pp("norm"))?,
            head: linear_no_bias(WIDTH, vocabulary, vb.pp("head"))?,
        })
    }
}

impl Module for Transformer {
    /// `[batch, context]` tokens to `[batch · context, vocabulary]` logits.
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, context) = tokens.dims2()?;
        let positions = Tensor::arange(0u32, context as u32, tokens.device())?;
        // candle's embeddings start at deviation 1, which is far too loud for a residual stream.
        let x = self
            .token
            .forward(tokens)?
            .broadcast_add(&self.position.forward(&positions)?)?
            .affine(0.1, 0.0)?;
        let x = self.blocks.iter().try_fold(x, |x, block| block.forward(&x))?;
        self.head.forward(&self.norm.forward(&x)?.reshape((batch * context, WIDTH))?)
    }
}

/// Attention and a two-layer perceptron, each after a layer norm and added to its input.
pub(crate) struct Block {
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
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mixed = causal_attention(&self.qkv.forward(&self.norm1.forward(x)?)?, HEADS)?;
        let x = (x + self.out.forward(&mixed)?)?;
        let hidden = gelu(&self.up.forward(&self.norm2.forward(&x)?)?)?;
        x + self.down.forward(&hidden)?
    }
}
