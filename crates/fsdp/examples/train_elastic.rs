//! A trainer that any launcher may kill, restart and resize: all that it does for it is one `resume` and one question a
//! step. `sconce-run --elastic 2:4 --max-restarts 5 train_elastic` is how it is started.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use candle_core::{Device, Tensor};
use candle_nn::{Module as _, linear, loss::mse, seq};
use clap::Parser;
use sconce_checkpoint::{Preemption, Retention, Series, SeriesOptions};
use sconce_dtensor::{StateDict, Value};
use sconce_fsdp::{
    Adam, AdamConfig, Fsdp, FsdpBuilder, FsdpConfig, Optimizer as _, ShardingStrategy, StateDictType,
};
use sconce_mesh::{DeviceMesh, DeviceType, GroupOptions, ProcessGroup, ReduceOp};

type AnyResult<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Rows of a step's batch, over all ranks: any world of 1, 2, 3, 4, 6 or 12 ranks trains on the same.
const ROWS: usize = 12;
/// Steps between two checkpoints.
const EVERY: u64 = 20;

#[derive(Parser)]
struct Args {
    /// Directory for checkpoints and what is told of the run.
    #[arg(long, default_value = "runs/train_elastic")]
    out: PathBuf,
    /// Steps in all, over all worlds.
    #[arg(long, default_value_t = 400)]
    steps: u64,
    /// Replicas of the model among the ranks, which they must divide.
    #[arg(long, default_value_t = 1)]
    replicas: usize,
    /// Milliseconds to wait in each step, so that a person, or a killer, can follow.
    #[arg(long, default_value_t = 0)]
    pace: u64,
}

fn main() -> AnyResult<()> {
    let args = Args::parse();
    let preemption = Preemption::on_sigterm()?;
    let world = ProcessGroup::from_env(GroupOptions { timeout: Duration::from_secs(60) })?;
    std::fs::create_dir_all(&args.out)?;
    std::fs::write(args.out.join(format!("pid-{}", world.rank())), std::process::id().to_string())?;
    let shape = [args.replicas, world.size() / args.replicas];
    let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &shape, &["replicate", "shard"])?;
    let strategy = ShardingStrategy::HybridShard;
    let builder = FsdpBuilder::new(&mesh, FsdpConfig { strategy, seed: 42, ..FsdpConfig::default() })?;
    let (vb, width) = (builder.var_builder(), 64);
    let model =
        seq().add(linear(16, width, vb.pp("up"))?).add_fn(Tensor::tanh).add(linear(width, 1, vb.pp("down"))?);
    let fsdp = builder.build()?;
    let mut optim = Adam::new(&fsdp, AdamConfig::adamw(3e-3))?;

    let keep = Retention { last: Some(3), ..Retention::default() };
    let options = SeriesOptions { group: Some(&world), keep, ..SeriesOptions::default() };
    let series = Series::open(args.out.join("checkpoints"), options)?;
    let mut state = state(&fsdp, &optim, StateDictType::FlatShard)?;
    let mut done = 0;
    if let Some(resumed) = series.resume(&mut state)? {
        let part = |name| state.map(name).ok_or("the checkpoint lacks a part");
        fsdp.load_state_dict(part("model")?)?;
        optim.load_state_dict(&fsdp, part("optim")?)?;
        done = resumed.step;
        tell(&args, &world, &format!("resumed {done} {}", digest(&fsdp, &optim)?))?;
    }
    for step in done + 1..=args.steps {
        let (x, y) = batch(step, world.rank().0, world.size())?;
        let loss = fsdp.forward(&[&x], || mse(&model.forward(&x)?, &y))?;
        fsdp.backward(&loss)?;
        optim.step(&fsdp)?;
        let mut mean = [loss.to_scalar::<f32>()?];
        world.all_reduce(&mut mean, ReduceOp::Avg)?;
        tell(&args, &world, &format!("step {step} {} {}", mean[0], world.size()))?;
        std::thread::sleep(Duration::from_millis(args.pace));
        let is_asked = preemption.is_agreed(Some(&world))?;
        if is_asked || step % EVERY == 0 || step == args.steps {
            // Before the save: a commit whose digest nobody knows could not be checked.
            tell(&args, &world, &format!("saved {step} {}", digest(&fsdp, &optim)?))?;
            series.save(step, &self::state(&fsdp, &optim, StateDictType::FlatShard)?)?;
        }
        if is_asked {
            break;
        }
    }
    Ok(())
}

/// This rank's rows of the step's batch: a function of 16 numbers that the model is to learn.
fn batch(step: u64, rank: usize, n_ranks: usize) -> candle_core::Result<(Tensor, Tensor)> {
    let rows: Vec<usize> = (0..ROWS).filter(|row| row % n_ranks == rank).collect();
    let value = |row: usize, i: usize| ((step * 73 + row as u64 * 17 + i as u64 * 9) as f32 * 1.298).sin();
    let x: Vec<f32> = rows.iter().flat_map(|row| (0..16).map(|i| value(*row, i))).collect();
    let y: Vec<f32> = x.chunks(16).map(|row| (row[0] + row[1] * row[2]).sin() + 0.5 * row[3]).collect();
    let n = rows.len();
    Ok((Tensor::from_vec(x, (n, 16), &Device::Cpu)?, Tensor::from_vec(y, (n, 1), &Device::Cpu)?))
}

fn state(fsdp: &Fsdp, optim: &Adam, kind: StateDictType) -> AnyResult<StateDict<'static>> {
    let (model, optim) = (fsdp.state_dict(kind)?, optim.state_dict(fsdp, kind)?);
    Ok(StateDict::from_iter([("model", Value::Map(model)), ("optim", Value::Map(optim))]))
}

/// Of all bytes of the whole state, the same under any layout.
fn digest(fsdp: &Fsdp, optim: &Adam) -> AnyResult<String> {
    let mut digest = crc32fast::Hasher::new();
    for (fqn, tensor) in state(fsdp, optim, StateDictType::Full)?.flat_tensors()? {
        digest.update(fqn.as_str().as_bytes());
        tensor.read_box(0, &mut |bytes| digest.update(bytes))?;
    }
    Ok(format!("{:08x}", digest.finalize()))
}

/// A line of `log.txt`, from the first rank.
fn tell(args: &Args, world: &ProcessGroup, line: &str) -> AnyResult<()> {
    if world.rank().0 == 0 {
        let mut log = std::fs::File::options().create(true).append(true).open(args.out.join("log.txt"))?;
        writeln!(log, "{line}")?;
    }
    Ok(())
}
