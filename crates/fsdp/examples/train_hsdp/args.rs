//! Command line of the example.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Trains a small character-level transformer under HSDP, saves it, and loads it under other layouts.
#[derive(Debug, Clone, Parser)]
pub(crate) struct Args {
    /// Directory whose *.rs and *.md files are the training text.
    #[arg(long, default_value = ".")]
    pub(crate) data: PathBuf,
    /// Steps of the HSDP run; the other layouts add a fifth of them each.
    #[arg(long, default_value_t = 160, value_parser = clap::value_parser!(u32).range(2..))]
    steps: u32,
    /// Rank processes of the HSDP run.
    #[arg(long, default_value_t = 4)]
    pub(crate) ranks: usize,
    /// Mesh of the HSDP run, replicas x shards; their product is the number of ranks.
    #[arg(long, default_value = "2x2", value_parser = parse_mesh)]
    pub(crate) mesh: (usize, usize),
    /// Directory for checkpoints.
    #[arg(long, default_value = "runs/train_hsdp")]
    pub(crate) out: PathBuf,
    /// What a rank process does; set by the program when it starts itself.
    #[arg(long, hide = true)]
    pub(crate) phase: Option<Phase>,
}

/// One layout of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Phase {
    /// HSDP from the initial weights, saving twice.
    Train,
    /// FSDP on a 1-D mesh from the last checkpoint.
    Fsdp,
    /// One process from the last checkpoint.
    Single,
}

impl Phase {
    /// The option that makes a process a rank of this phase.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Phase::Train => "--phase=train",
            Phase::Fsdp => "--phase=fsdp",
            Phase::Single => "--phase=single",
        }
    }
}

impl Args {
    /// Steps of the HSDP run.
    pub(crate) fn steps(&self) -> usize {
        self.steps as usize
    }

    /// The checkpoint that ends the HSDP run.
    pub(crate) fn last_checkpoint(&self) -> PathBuf {
        crate::checkpoint_dir(&self.out, self.steps())
    }
}

fn parse_mesh(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once('x').and_then(|(r, s)| Some((r.parse().ok()?, s.parse().ok()?)));
    parsed
        .filter(|(r, s)| r * s > 0)
        .ok_or_else(|| format!("expected REPLICASxSHARDS such as 2x2, got {text:?}"))
}
