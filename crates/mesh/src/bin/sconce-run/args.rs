//! The command line. Names are torchrun's, with hyphens or underscores.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use sconce_mesh::{Error, Node, Result};

use crate::slots::Slots;

/// The secret that the launchers and ranks of several nodes share.
const TOKEN: &str = "SCONCE_STORE_TOKEN";

/// Starts the ranks of one node with torchrun's environment.
#[derive(Debug, Parser)]
#[command(name = "sconce-run", version)]
pub(crate) struct Args {
    /// Ranks on this node; `auto` takes one for each core.
    #[arg(long, alias = "nproc_per_node", default_value = "auto", value_parser = n_ranks)]
    nproc_per_node: NRanks,
    /// Nodes, each of which runs this program with the same arguments but for `--node-rank`. Their ranks meet at the store of
    /// node 0, and talk through shared memory: nodes are containers of one host. Ranks on several hosts are started by mpirun
    /// or srun.
    #[arg(long, default_value_t = 1)]
    nnodes: usize,
    /// This node.
    #[arg(long, alias = "node_rank", default_value_t = 0)]
    node_rank: usize,
    /// Address of node 0, whose launcher hosts the store. One node alone takes a free port of its own.
    #[arg(long, alias = "master_addr", default_value = "127.0.0.1")]
    master_addr: String,
    /// Port of the store on node 0.
    #[arg(long, alias = "master_port", default_value_t = 29500)]
    master_port: u16,
    /// How often all ranks are started again after one has failed; on one node only.
    #[arg(long, alias = "max_restarts", default_value_t = 0)]
    pub(crate) max_restarts: usize,
    /// Least and most ranks, on one node only: when one is lost the world is formed again without it, and with it
    /// again once `--slot-cooldown` is over. Programs go on from their last checkpoint. Each loss takes one of
    /// `--max-restarts`.
    #[arg(long, value_name = "MIN:MAX", value_parser = least_and_most, requires = "max_restarts", conflicts_with_all = ["nproc_per_node", "nnodes"])]
    elastic: Option<(usize, usize)>,
    /// Seconds after which a lost rank's place is used again: the ranks get SIGTERM, and start again with it.
    #[arg(long, default_value = "60", value_parser = seconds, requires = "elastic")]
    slot_cooldown: Duration,
    /// Shows every so many seconds which ranks run and how much memory they hold.
    #[arg(long, value_parser = seconds)]
    pub(crate) monitor: Option<Duration>,
    /// Writes the output of rank R to `rank-R.log` in this directory instead of showing it; a rank that is started again
    /// writes behind what was there.
    #[arg(long, alias = "log_dir")]
    pub(crate) log_dir: Option<PathBuf>,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) program: Vec<OsString>,
}

#[derive(Debug, Clone, Copy)]
enum NRanks {
    Auto,
    Given(usize),
}

fn n_ranks(text: &str) -> Result<NRanks, String> {
    match text {
        "auto" => Ok(NRanks::Auto),
        _ => match text.parse() {
            Ok(n) if n > 0 => Ok(NRanks::Given(n)),
            _ => Err("expected `auto` or a number from 1".to_owned()),
        },
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0);
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    duration.ok_or_else(|| "expected a number of seconds above 0".to_owned())
}

fn least_and_most(text: &str) -> Result<(usize, usize), String> {
    let parsed =
        text.split_once(':').and_then(|(least, most)| Some((least.parse().ok()?, most.parse().ok()?)));
    parsed
        .filter(|(least, most)| 0 < *least && least <= most)
        .ok_or_else(|| format!("expected MIN:MAX such as 2:4, got {text:?}"))
}

impl Args {
    /// The places for ranks on this node.
    pub(crate) fn slots(&self) -> Slots {
        match self.elastic {
            Some((least, most)) => Slots::new(least, most, self.slot_cooldown),
            None => Slots::new(self.n_ranks(), self.n_ranks(), Duration::ZERO),
        }
    }

    /// Ranks on this node.
    fn n_ranks(&self) -> usize {
        match self.nproc_per_node {
            NRanks::Given(n) => n,
            NRanks::Auto => std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// This node, with so many ranks, among several; `None` if it is the only one.
    ///
    /// # Errors
    /// `InvalidArgument`, `Environment` without a shared token.
    pub(crate) fn node(&self, n_ranks: usize) -> Result<Option<Node>> {
        if self.nnodes == 1 && self.node_rank == 0 {
            return Ok(None);
        }
        if self.node_rank >= self.nnodes {
            let expected = format!("a node below --nnodes {}", self.nnodes);
            return Err(invalid("--node-rank", expected, self.node_rank));
        }
        if self.max_restarts > 0 {
            return Err(invalid("--max-restarts", "0 with several nodes".into(), self.max_restarts));
        }
        let token = std::env::var(TOKEN).ok().filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| Error::Environment {
            name: TOKEN.into(),
            expected: "a secret, the same on all nodes",
            got: None,
        })?;
        Ok(Some(Node {
            n_nodes: self.nnodes,
            node_rank: self.node_rank,
            n_ranks,
            master_addr: self.master_addr.clone(),
            master_port: self.master_port,
            token,
        }))
    }
}

fn invalid(what: &str, expected: String, got: usize) -> Error {
    Error::InvalidArgument { op: "sconce-run", what: what.into(), expected, got: got.to_string() }
}
