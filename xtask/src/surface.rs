//! The package budget: what comes with the crates that people take without a tensor library.

use std::collections::BTreeSet;
use std::process::Command;

use crate::root;

/// Crate, and the most packages its tree may hold without default features, itself included.
const BUDGETS: [(&str, usize); 2] = [("sconce-checkpoint", 30), ("sconce-mesh", 20)];

/// Never in these trees.
const BANNED: [&str; 5] = ["candle-core", "candle-nn", "cudarc", "mpi", "tokio"];

/// Counts the packages of each tree.
pub(crate) fn run() -> Result<(), String> {
    for (package, budget) in BUDGETS {
        let packages = tree(package)?;
        if let Some(banned) = BANNED.iter().find(|banned| packages.contains(**banned)) {
            return Err(format!("{package} without default features pulls in {banned}"));
        }
        if packages.len() > budget {
            return Err(format!("{package}: {} packages, budget {budget}: {packages:?}", packages.len()));
        }
        println!("{package} without default features: {} packages of {budget}", packages.len());
    }
    Ok(())
}

fn tree(package: &str) -> Result<BTreeSet<String>, String> {
    let arguments = ["tree", "-p", package, "--no-default-features", "--edges", "normal", "--prefix", "none"];
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(root()).output();
    let output = output.map_err(|e| format!("cargo tree: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo tree: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}
