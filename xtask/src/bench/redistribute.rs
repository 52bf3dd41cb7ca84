//! `cargo xtask bench redistribute`: ours beside torch's DTensor on gloo, in one run and one table.

use super::collectives::{parse, table};
use super::table::Table;
use super::{Options, cargo_bench, output};

pub(super) fn measure(options: &Options) -> Result<Table, String> {
    let mut peers = Vec::new();
    if let Some(torch) = options.torch_peer("redistribute.py") {
        peers.push(("torch", parse(&output(torch)?)));
    }
    let ours = parse(&output(cargo_bench("-p sconce-dtensor --bench redistribute"))?);
    Ok(table(&ours, &peers))
}
