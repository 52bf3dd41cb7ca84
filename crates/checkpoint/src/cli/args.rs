//! The arguments of `sconce-ckpt`.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

/// Looks at, checks, compares and converts checkpoints: Sconce's, safetensors', and PyTorch's without Python.
///
/// Exit codes: 0 as asked, 1 damage or a difference was found, 2 wrong arguments, 3 nothing that can be read or written.
#[derive(Debug, Parser)]
#[command(name = "sconce-ckpt", version)]
pub(super) struct Args {
    /// Print JSON for programs.
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List what a checkpoint holds, without reading its data.
    Inspect(Inspect),
    /// Read everything and compare every checksum; list damaged files, blocks and tensors.
    Verify(Verify),
    /// Compare two checkpoints of any formats: names, shapes, dtypes, values.
    Diff(Diff),
    /// Write a checkpoint in another format. Nothing is published before all of it is written.
    Convert(Convert),
    /// Write a checkpoint as that many ranks would have saved it.
    Reshard(Reshard),
    /// Print the values of a tensor, with statistics and a histogram.
    Cat(Cat),
    /// Write a page that shows which file holds which box of each tensor, and how large each module is.
    Plot(Plot),
    /// Remove old checkpoints of a directory.
    Prune(Prune),
    /// Report checkpoints of a directory as they appear.
    Watch(Watch),
    /// Print the completion script of a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

/// What is read beside tensors.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct Values {
    /// Leave out values that are no tensors. Of torch's no class is refused then, since nothing is made of any.
    #[arg(long)]
    pub(super) tensors_only: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Inspect {
    /// The checkpoint: a directory, a .safetensors file or a .pt file.
    pub(super) path: PathBuf,
    /// Only names that contain this; `*` stands for anything.
    #[arg(long, short)]
    pub(super) filter: Option<String>,
    /// Show the nesting.
    #[arg(long, short)]
    pub(super) tree: bool,
    /// Show the boxes of each tensor and where they lie.
    #[arg(long, short)]
    pub(super) chunks: bool,
    /// Show at most that many tensors, and as many values; 0 for all. Without it 100, and all for programs.
    #[arg(long)]
    pub(super) limit: Option<usize>,
    #[command(flatten)]
    pub(super) values: Values,
}

#[derive(Debug, clap::Args)]
pub(super) struct Verify {
    /// The checkpoint.
    pub(super) path: PathBuf,
    /// Threads that read and check; all processors by default.
    #[arg(long, short = 'j')]
    pub(super) threads: Option<usize>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Diff {
    /// One checkpoint.
    pub(super) a: PathBuf,
    /// The other.
    pub(super) b: PathBuf,
    /// Differences of values up to this are none.
    #[arg(long, default_value_t = 0.0)]
    pub(super) tolerance: f64,
    /// Compare names, shapes and dtypes, and no values of tensors.
    #[arg(long)]
    pub(super) structure: bool,
    #[command(flatten)]
    pub(super) values: Values,
}

/// A format that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum To {
    /// Sconce's own: safetensors with a checksummed manifest.
    Sconce,
    /// What torch.distributed.checkpoint.load reads.
    Torch,
    /// Hugging Face's directory, or one file if the path ends in .safetensors.
    Safetensors,
}

#[derive(Debug, clap::Args)]
pub(super) struct Convert {
    /// The checkpoint.
    pub(super) from: PathBuf,
    /// Where to write; nothing may be there.
    #[arg(value_name = "TARGET")]
    pub(super) to_path: PathBuf,
    /// The format to write.
    #[arg(long, value_name = "FORMAT")]
    pub(super) to: To,
    /// Begin another file after that many bytes (safetensors).
    #[arg(long, value_name = "BYTES", default_value_t = 5_000_000_000)]
    pub(super) max_shard_bytes: u64,
    #[command(flatten)]
    pub(super) values: Values,
}

#[derive(Debug, clap::Args)]
pub(super) struct Reshard {
    /// The checkpoint.
    pub(super) from: PathBuf,
    /// Where to write; nothing may be there.
    #[arg(value_name = "TARGET")]
    pub(super) to_path: PathBuf,
    /// The number of ranks.
    #[arg(long, short = 'n', value_name = "RANKS", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(super) world: u32,
    /// The format to write: that of the checkpoint by default.
    #[arg(long, value_name = "FORMAT")]
    pub(super) to: Option<To>,
    #[command(flatten)]
    pub(super) values: Values,
}

#[derive(Debug, clap::Args)]
pub(super) struct Cat {
    /// The checkpoint.
    pub(super) path: PathBuf,
    /// The tensor or value.
    pub(super) fqn: String,
    /// Print that many values.
    #[arg(long, short, default_value_t = 32)]
    pub(super) number: usize,
    /// Begin at that element.
    #[arg(long, default_value_t = 0)]
    pub(super) start: usize,
    #[command(flatten)]
    pub(super) values: Values,
}

#[derive(Debug, clap::Args)]
pub(super) struct Plot {
    /// The checkpoint.
    pub(super) path: PathBuf,
    /// The page to write.
    #[arg(long, short, default_value = "checkpoint.html")]
    pub(super) output: PathBuf,
    #[command(flatten)]
    pub(super) values: Values,
}

#[derive(Debug, clap::Args)]
pub(super) struct Prune {
    /// A directory of checkpoints whose names end in numbers.
    pub(super) path: PathBuf,
    /// Keep that many of the latest; at least one.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) keep_last: u32,
    /// Keep also those whose number is a multiple of this.
    #[arg(long)]
    pub(super) keep_every: Option<u64>,
    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Watch {
    /// A directory in which checkpoints appear.
    pub(super) path: PathBuf,
    /// Verify each.
    #[arg(long)]
    pub(super) verify: bool,
    /// End after that many.
    #[arg(long)]
    pub(super) count: Option<usize>,
    /// Look every so many seconds.
    #[arg(long, default_value_t = 1.0)]
    pub(super) interval: f64,
    #[command(flatten)]
    pub(super) values: Values,
}

/// Whether `name` matches a filter: parts between `*` occur in it, in order.
pub(super) fn matches(filter: &str, name: &str) -> bool {
    let mut rest = name;
    filter.split('*').all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}
