//! `cargo xtask bench cli`: what `sconce-ckpt` takes for a large checkpoint, beside plain reads and copies of its files.

use super::table::{Cell, Table};
use super::{cargo_bench, output};
use crate::root;

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
struct Figure {
    place: String,
    what: String,
    bytes: f64,
    seconds: f64,
    peak: f64,
}

/// Measures; `SCONCE_BENCH_MIB` makes the checkpoint smaller than 4 GiB, `SCONCE_BENCH_PLACES` names directories.
pub(super) fn measure() -> Result<Table, String> {
    let places = std::env::var("SCONCE_BENCH_PLACES")
        .unwrap_or_else(|_| format!("/dev/shm:{}", root().join("target").display()));
    let mut command = cargo_bench("-p sconce-checkpoint --no-default-features --features cli --bench cli");
    command.env("SCONCE_BENCH_PLACES", places);
    Ok(table(&output(command)?.lines().filter_map(parse).collect::<Vec<_>>()))
}

fn table(figures: &[Figure]) -> Table {
    let mut table = Table::new(["place", "what", "sconce", "rate", "of reads", "of copies", "peak memory"]);
    for Figure { place, what, bytes, seconds, peak } in figures {
        let share = |limit: &str| {
            let limit = figures.iter().find(|other| other.place == *place && other.what == limit);
            limit.filter(|_| *bytes > 0.0).map_or(Cell::None, |limit| Cell::Share(limit.seconds / seconds))
        };
        table.rows.push(vec![
            Cell::Text(place.clone()),
            Cell::Text(what.clone()),
            Cell::Seconds(*seconds),
            if *bytes > 0.0 { Cell::Rate(bytes / seconds) } else { Cell::None },
            share("limit read"),
            share("limit copy"),
            if *peak > 0.0 { Cell::Bytes(*peak) } else { Cell::None },
        ]);
    }
    table
}

fn parse(line: &str) -> Option<Figure> {
    let fields: Vec<&str> = line.split('\t').collect();
    let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
    let (place, what) = ((*fields.first()?).to_owned(), (*fields.get(1)?).to_owned());
    Some(Figure { place, what, bytes: number(2)?, seconds: number(3)?, peak: number(4)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_limit_of_the_same_place() {
        let lines = [
            "tmpfs\tlimit read\t1024\t1\t0",
            "disk\tlimit read\t1024\t4\t0",
            "disk\tverify\t1024\t5\t1e7",
            "noise",
        ];
        let figures: Vec<Figure> = lines.iter().filter_map(|line| parse(line)).collect();
        assert_eq!(figures.len(), 3);
        assert_eq!(table(&figures).rows[2][4], Cell::Share(0.8));
    }
}
