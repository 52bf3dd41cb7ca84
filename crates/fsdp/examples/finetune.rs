//! Fine-tunes a Llama from a Hugging Face directory, sharded over two ranks, and exports it as one safetensors file that
//! plain candle loads. The model is a small one with random weights; a real one differs by its numbers in `Config`.
//!
//! `cargo run --release -p sconce-fsdp --example finetune`

#![allow(clippy::print_stdout, reason = "an example talks to the person who started it")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder, VarMap, rotary_emb::rope_slow};
use sconce_checkpoint::{DefaultSavePlanner, LoadOptions, StateDict, Value, hf, load_from, save_to};
use sconce_fsdp::nn::{
    Embedding, Linear, RmsNorm, causal_attention, cross_entropy, embedding, linear_no_bias, rms_norm,
};
use sconce_fsdp::{Adam, AdamConfig, FsdpBuilder, FsdpConfig, Optimizer as _, StateDictType, WrapPolicy};
use sconce_mesh::{DeviceMesh, DeviceType, GroupOptions, ProcessGroup, RankEnv, RankOutput, RankProcesses};

type AnyResult<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const OUT: &str = "runs/finetune";
const STEPS: usize = 30;
const VOCABULARY: usize = 32;
const WIDTH: usize = 64;
const HEADS: usize = 4;
const LAYERS: usize = 3;
const CONTEXT: usize = 16;

/// Parameters have the names of `transformers.LlamaForCausalLM`.
struct Llama {
    embed_tokens: Embedding,
    layers: Vec<Box<dyn Module>>,
    norm: RmsNorm,
    lm_head: Linear,
}

impl Llama {
    fn new(vb: VarBuilder, wrap: impl Fn(&str, Layer) -> AnyResult<Box<dyn Module>>) -> AnyResult<Self> {
        let layer = |nth| {
            let name = format!("model.layers.{nth}");
            wrap(&name, Layer::new(vb.pp(&name))?)
        };
        Ok(Self {
            embed_tokens: embedding(VOCABULARY, WIDTH, vb.pp("model.embed_tokens"))?,
            layers: (0..LAYERS).map(layer).collect::<AnyResult<_>>()?,
            norm: rms_norm(WIDTH, 1e-5, vb.pp("model.norm"))?,
            lm_head: linear_no_bias(WIDTH, VOCABULARY, vb.pp("lm_head"))?,
        })
    }

    /// Of the next token, for each of `[batch, CONTEXT + 1]` tokens but the last.
    fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        let x = self.embed_tokens.forward(&tokens.narrow(1, 0, CONTEXT)?.contiguous()?)?;
        let x = self.layers.iter().try_fold(x, |x, layer| layer.forward(&x))?;
        let logits = self.lm_head.forward(&self.norm.forward(&x)?.flatten_to(1)?)?;
        cross_entropy(&logits, &tokens.narrow(1, 1, CONTEXT)?.flatten_all()?)
    }
}

struct Layer {
    input_layernorm: RmsNorm,
    q_k_v: [Linear; 3],
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_up_down: [Linear; 3],
}

impl Layer {
    fn new(vb: VarBuilder) -> Result<Self> {
        let (attention, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
        let square = |name| linear_no_bias(WIDTH, WIDTH, attention.pp(name));
        let wide = |name| linear_no_bias(WIDTH, 3 * WIDTH, mlp.pp(name));
        let down = linear_no_bias(3 * WIDTH, WIDTH, mlp.pp("down_proj"))?;
        Ok(Self {
            input_layernorm: rms_norm(WIDTH, 1e-5, vb.pp("input_layernorm"))?,
            q_k_v: [square("q_proj")?, square("k_proj")?, square("v_proj")?],
            o_proj: square("o_proj")?,
            post_attention_layernorm: rms_norm(WIDTH, 1e-5, vb.pp("post_attention_layernorm"))?,
            gate_up_down: [wide("gate_proj")?, wide("up_proj")?, down],
        })
    }
}

impl Module for Layer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = self.input_layernorm.forward(x)?;
        let [q, k, v] = &self.q_k_v;
        let qkv = [rotated(&q.forward(&normed)?)?, rotated(&k.forward(&normed)?)?, v.forward(&normed)?];
        let x = (x + self.o_proj.forward(&causal_attention(&Tensor::cat(&qkv, 2)?, HEADS)?)?)?;
        let normed = self.post_attention_layernorm.forward(&x)?;
        let [gate, up, down] = &self.gate_up_down;
        x + down.forward(&(gate.forward(&normed)?.silu()? * up.forward(&normed)?)?)?
    }
}

/// Rotary embedding of `[batch, context, width]`, head by head.
fn rotated(x: &Tensor) -> Result<Tensor> {
    let (batch, context, width) = x.dims3()?;
    let half = width / HEADS / 2;
    let angle = |i: usize| (i / half) as f32 * 10_000f32.powf(-((i % half) as f32) / half as f32);
    let angles = Tensor::from_iter((0..context * half).map(angle), x.device())?.reshape((context, half))?;
    let heads = x.reshape((batch, context, HEADS, width / HEADS))?.transpose(1, 2)?.contiguous()?;
    rope_slow(&heads, &angles.cos()?, &angles.sin()?)?.transpose(1, 2)?.contiguous()?.flatten_from(2)
}

/// Tokens that count up by a step of one to three, which is what there is to learn.
fn batch(nth: usize) -> Result<Tensor> {
    let token = |i: usize| {
        let (row, at) = (nth * 8 + i / (CONTEXT + 1), i % (CONTEXT + 1));
        ((row * 7 + at * (1 + row % 3)) % VOCABULARY) as u32
    };
    Tensor::from_iter((0..8 * (CONTEXT + 1)).map(token), &Device::Cpu)?.reshape((8, CONTEXT + 1))
}

fn main() -> AnyResult<()> {
    if RankEnv::from_env()?.world_size > 1 {
        return finetune();
    }
    let (pretrained, tuned) = (Path::new(OUT).join("pretrained"), Path::new(OUT).join("tuned.safetensors"));
    for old in [&pretrained, &tuned] {
        let _ = std::fs::remove_dir_all(old).or_else(|_| std::fs::remove_file(old));
    }
    std::fs::create_dir_all(OUT)?;
    let plain = |_: &str, layer| Ok(Box::new(layer) as Box<dyn Module>);
    let vars = VarMap::new();
    let model = Llama::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu), plain)?;
    println!("before   loss {:.4}", model.loss(&batch(1000)?)?.to_scalar::<f32>()?);
    save_to(
        &mut hf::Writer::with_max_shard_bytes(&pretrained, 200_000),
        &mut DefaultSavePlanner,
        &state(&vars)?,
        None,
    )?;

    let program = std::env::current_exe()?;
    let command = |_: &RankEnv| Command::new(&program);
    RankProcesses::spawn(2, RankOutput::Inherited, command)?.wait(None, Duration::from_secs(10))?;

    let vb = VarBuilder::from_tensors(
        candle_core::safetensors::load(&tuned, &Device::Cpu)?,
        DType::F32,
        &Device::Cpu,
    );
    let model = Llama::new(vb, plain)?;
    let loss = model.loss(&batch(1000)?)?.to_scalar::<f32>()?;
    println!("after    loss {loss:.4}, read by plain candle from {}", tuned.display());
    if loss > 1.0 { Err("it has learnt nothing".into()) } else { Ok(()) }
}

fn state(vars: &VarMap) -> AnyResult<StateDict<'static>> {
    let vars = vars.data().lock().map_err(|_| "a thread panicked")?;
    let entry =
        |(name, var): (&String, &candle_core::Var)| Ok((name.clone(), Value::try_from(var.as_tensor())?));
    vars.iter().map(entry).collect()
}

/// One rank: reads its shards of the directory and no more, trains, and writes its part of the export.
fn finetune() -> AnyResult<()> {
    let world = ProcessGroup::from_env(GroupOptions::default())?;
    let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &[world.size()], &["shard"])?;
    let units = WrapPolicy::RepeatedBlocks(vec!["model.layers".to_owned()]);
    let builder = FsdpBuilder::new(&mesh, FsdpConfig { units, ..FsdpConfig::default() })?;
    let wrap = |name: &str, layer| Ok(Box::new(builder.wrap(name, layer)?) as Box<dyn Module>);
    let model = Llama::new(builder.var_builder(), wrap)?;
    let fsdp = builder.build_with(|state| -> AnyResult<()> {
        let options = LoadOptions { group: Some(&world), ..LoadOptions::default() };
        load_from(&hf::Reader::new(Path::new(OUT).join("pretrained")), state, options)?;
        Ok(())
    })?;
    let mut optim = Adam::new(&fsdp, AdamConfig::adamw(3e-3))?;
    for step in 0..STEPS {
        let tokens = batch(step * world.size() + world.rank().0)?;
        let loss = fsdp.forward(&[], || model.loss(&tokens))?;
        fsdp.backward(&loss)?;
        optim.step(&fsdp)?;
        if world.rank().0 == 0 && step % 10 == 0 {
            println!("step {step:>3} loss {:.4}", loss.to_scalar::<f32>()?);
        }
    }
    let mut export = hf::Writer::new(Path::new(OUT).join("tuned.safetensors"));
    save_to(&mut export, &mut DefaultSavePlanner, &fsdp.state_dict(StateDictType::FlatShard)?, Some(&world))?;
    Ok(())
}
