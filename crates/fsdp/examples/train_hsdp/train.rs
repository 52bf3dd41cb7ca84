//! What one rank does in each phase: build its shards, train or load, and report.

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use candle_nn::Module;
use sconce_checkpoint::{LoadOptions, SaveOptions, load_with, save_with};
use sconce_dtensor::{StateDict, Value};
use sconce_fsdp::nn::cross_entropy;
use sconce_fsdp::{
    Adam, AdamConfig, Fsdp, FsdpBuilder, FsdpConfig, Optimizer, ShardingStrategy, StateDictType, WrapPolicy,
};
use sconce_mesh::{DeviceMesh, DeviceType, GroupOptions, ProcessGroup};

use crate::args::{Args, Phase};
use crate::corpus::{BATCH, CONTEXT, Corpus};
use crate::model::Transformer;
use crate::{AnyResult, checkpoint_dir};

/// The step number whose batch no training step sees.
const FIXED_BATCH: usize = usize::MAX / 4096;

struct Trainer {
    world: ProcessGroup,
    corpus: Corpus,
    model: Transformer,
    fsdp: Fsdp,
    optim: Adam,
    step: usize,
}

/// Runs one rank of a phase from its start to its report.
pub(crate) fn run_rank(args: &Args, phase: Phase) -> AnyResult<()> {
    sconce_mesh::die_with_parent()?;
    let world = ProcessGroup::from_env(GroupOptions { timeout: Duration::from_secs(60) })?;
    let mesh = match phase {
        Phase::Train => {
            DeviceMesh::new(&world, DeviceType::Cpu, &[args.mesh.0, args.mesh.1], &["replicate", "shard"])?
        }
        Phase::Fsdp | Phase::Single => DeviceMesh::new(&world, DeviceType::Cpu, &[world.size()], &["shard"])?,
    };
    let mut trainer = Trainer::new(args, world, &mesh)?;
    if phase != Phase::Train {
        trainer.load(&args.last_checkpoint())?;
        trainer.report(&args.out, phase)?;
        return trainer.train(args.steps().div_ceil(5));
    }
    for n_steps in [args.steps() / 2, args.steps().div_ceil(2)] {
        trainer.train(n_steps)?;
        trainer.save(&args.out)?;
    }
    trainer.report(&args.out, phase)
}

impl Trainer {
    fn new(args: &Args, world: ProcessGroup, mesh: &DeviceMesh) -> AnyResult<Self> {
        let corpus = Corpus::read(&args.data)?;
        let strategy = match mesh.ndim() {
            2 => ShardingStrategy::HybridShard,
            _ => ShardingStrategy::FullShard,
        };
        let units = WrapPolicy::RepeatedBlocks(vec!["blocks".to_owned()]);
        let builder =
            FsdpBuilder::new(mesh, FsdpConfig { strategy, units, seed: 42, ..FsdpConfig::default() })?;
        let model = Transformer::new(corpus.vocabulary, builder.var_builder(), |prefix, block| {
            Ok(Box::new(builder.wrap(prefix, block)?))
        })?;
        let fsdp = builder.build()?;
        let optim = Adam::new(&fsdp, AdamConfig::adamw(2e-3))?;
        if world.rank().0 == 0 {
            let (all, own) = (fsdp.numel(), fsdp.shard_numel());
            println!("{} characters of vocabulary, {all} parameters, {own} on each rank", corpus.vocabulary);
        }
        Ok(Self { world, corpus, model, fsdp, optim, step: 0 })
    }

    fn loss(&self, (inputs, targets): &(Tensor, Tensor)) -> AnyResult<Tensor> {
        let forward = || cross_entropy(&self.model.forward(inputs)?, &targets.flatten_all()?);
        Ok(self.fsdp.forward(&[], forward)?)
    }

    fn train(&mut self, n_steps: usize) -> AnyResult<()> {
        let (mut since, mut tokens) = (Instant::now(), 0);
        for nth in 1..=n_steps {
            let loss = self.loss(&self.corpus.batch(self.step, self.world.rank().0)?)?;
            self.fsdp.backward(&loss)?;
            self.optim.step(&self.fsdp)?;
            self.step += 1;
            tokens += BATCH * CONTEXT * self.world.size();
            if nth % 10 == 0 || nth == n_steps {
                let mean = self.mean(loss.to_scalar()?)?;
                let rate = tokens as f64 / since.elapsed().as_secs_f64();
                self.say(format_args!("step {:>4}  loss {mean:.4}  {rate:>6.0} tokens/s", self.step));
                (since, tokens) = (Instant::now(), 0);
            }
        }
        Ok(())
    }

    fn mean(&self, value: f32) -> AnyResult<f32> {
        let mut mean = [value];
        self.world.all_reduce(&mut mean, sconce_mesh::ReduceOp::Avg)?;
        Ok(mean[0])
    }

    /// Everything that training needs to go on: this rank's shards, in place.
    fn state(&self) -> AnyResult<StateDict<'static>> {
        let model = self.fsdp.state_dict(StateDictType::FlatShard)?;
        let optim = self.optim.state_dict(&self.fsdp, StateDictType::FlatShard)?;
        let step = Value::Int(self.step as i64);
        Ok(StateDict::from_iter([("model", Value::Map(model)), ("optim", Value::Map(optim)), ("step", step)]))
    }

    fn save(&self, out: &Path) -> AnyResult<()> {
        let dir = checkpoint_dir(out, self.step);
        let options = SaveOptions { group: Some(&self.world), overwrite: true, ..Default::default() };
        let start = Instant::now();
        save_with(&dir, &self.state()?, options)?;
        self.say(format_args!("saved {} in {:.0} ms", dir.display(), start.elapsed().as_secs_f64() * 1e3));
        Ok(())
    }

    fn load(&mut self, dir: &Path) -> AnyResult<()> {
        let mut state = self.state()?;
        load_with(dir, &mut state, LoadOptions { group: Some(&self.world), ..Default::default() })?;
        let part = |name| state.map(name).ok_or_else(|| format!("{}: no {name}", dir.display()));
        self.fsdp.load_state_dict(part("model")?)?;
        self.optim.load_state_dict(&self.fsdp, part("optim")?)?;
        self.step = state.get("step").and_then(Value::as_int).unwrap_or(0) as usize;
        Ok(())
    }

    /// Writes what must not depend on the layout: a digest of all weights, and the loss on a fixed batch.
    fn report(&self, out: &Path, phase: Phase) -> AnyResult<()> {
        let full = self.fsdp.state_dict(StateDictType::Full)?;
        let mut digest = crc32fast::Hasher::new();
        for (fqn, tensor) in full.flat_tensors()? {
            digest.update(fqn.as_str().as_bytes());
            tensor.read_box(0, &mut |bytes| digest.update(bytes))?;
        }
        let loss = self.loss(&self.corpus.batch(FIXED_BATCH, 0)?)?.to_scalar::<f32>()?;
        let report = Report { digest: format!("{:08x}", digest.finalize()), loss };
        self.say(format_args!("weights {}  loss on the fixed batch {loss:.6}", report.digest));
        if self.world.rank().0 == 0 {
            std::fs::write(Report::path(out, phase), format!("{} {}", report.digest, report.loss))?;
        }
        Ok(())
    }

    fn say(&self, line: std::fmt::Arguments<'_>) {
        if self.world.rank().0 == 0 {
            println!("{line}");
        }
    }
}

/// What a phase found.
pub(crate) struct Report {
    pub(crate) digest: String,
    pub(crate) loss: f32,
}

impl Report {
    fn path(out: &Path, phase: Phase) -> std::path::PathBuf {
        out.join(format!("report{}", phase.flag()))
    }

    /// What rank 0 of a phase wrote.
    pub(crate) fn read(out: &Path, phase: Phase) -> AnyResult<Self> {
        let text = std::fs::read_to_string(Self::path(out, phase))?;
        let (digest, loss) = text.split_once(' ').ok_or("report: expected a digest and a loss")?;
        Ok(Self { digest: digest.to_owned(), loss: loss.parse()? })
    }
}
