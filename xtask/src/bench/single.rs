//! Benchmarks of one program that has no peer.

use std::process::Command;

use super::table::{Cell, Table};
use super::{cargo_bench, output};
use crate::root;

const MESH: &str = "-p sconce-mesh --no-default-features --features tcp-store --bench";

/// An asynchronous all_gather beside a matrix product.
pub(super) fn overlap() -> Result<Table, String> {
    let [gather, product, both] = numbers(&output(cargo_bench(&format!("{MESH} overlap")))?)?;
    let mut table = Table::new(["what", "all_gather", "product", "both", "hidden"]);
    let what = Cell::Text("all_gather of 64 MiB, 2 ranks".to_owned());
    let hidden = Cell::Share(1.0 - (both - product) / gather);
    table.rows.push(vec![what, Cell::Seconds(gather), Cell::Seconds(product), Cell::Seconds(both), hidden]);
    Ok(table)
}

/// Many clients at one store.
pub(super) fn store() -> Result<Table, String> {
    let [clients, seconds, bytes] = numbers(&output(cargo_bench(&format!("{MESH} store")))?)?;
    let mut table = Table::new(["clients", "seconds", "memory"]);
    let memory = Cell::Bytes(bytes);
    table.rows.push(vec![Cell::Count(clients as usize), Cell::Seconds(seconds), memory]);
    Ok(table)
}

/// The first line that is as many numbers, separated by tabs.
fn numbers<const N: usize>(text: &str) -> Result<[f64; N], String> {
    let line = |line: &str| {
        let numbers: Option<Vec<f64>> = line.split('\t').map(|field| field.parse().ok()).collect();
        numbers?.try_into().ok()
    };
    text.lines().find_map(line).ok_or_else(|| format!("no line of {N} numbers in:\n{text}"))
}

/// The reduction kernels are private: one of their own tests measures them, and prints its table.
pub(super) fn kernels() -> Result<(), String> {
    let mut command = Command::new(env!("CARGO"));
    let arguments = "test -q --release -p sconce-mesh --no-default-features --lib -- --ignored --nocapture";
    command.args(arguments.split(' ')).arg("speed_of_the_kernels");
    let status = command.current_dir(root()).status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_numbers_is_found() {
        assert_eq!(numbers("a warning\n1\t2\n1\t2.5\t3\n"), Ok([1.0, 2.5, 3.0]));
        assert!(numbers::<2>("1 2\n").is_err());
    }
}
