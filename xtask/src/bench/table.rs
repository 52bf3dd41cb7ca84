//! A table of figures: for people as text, for programs as JSON lines, for the report as Markdown.

/// One figure, or what it is of. The kind says how it is written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell {
    /// What was measured, or where.
    Text(String),
    /// A number that names a case: ranks, for one.
    Count(usize),
    /// A size in bytes.
    Bytes(f64),
    /// A time in seconds.
    Seconds(f64),
    /// Bytes a second.
    Rate(f64),
    /// How many times another figure.
    Times(f64),
    /// A part of a limit: 1 is all of it.
    Share(f64),
    /// Not measured.
    None,
}

impl Cell {
    /// The number in its unit: bytes, seconds, 1.
    pub(super) fn number(&self) -> Option<f64> {
        match self {
            Cell::Count(n) => Some(*n as f64),
            Cell::Bytes(n) | Cell::Seconds(n) | Cell::Rate(n) | Cell::Times(n) | Cell::Share(n) => Some(*n),
            Cell::Text(_) | Cell::None => None,
        }
    }

    /// True for what tells rows apart.
    fn is_key(&self) -> bool {
        matches!(self, Cell::Text(_) | Cell::Count(_) | Cell::Bytes(_))
    }

    fn shown(&self) -> String {
        match self {
            Cell::Text(text) => text.clone(),
            Cell::Count(n) => n.to_string(),
            Cell::Bytes(n) => bytes(*n),
            Cell::Seconds(n) if *n < 1e-3 => format!("{:.1} µs", n * 1e6),
            Cell::Seconds(n) if *n < 1.0 => format!("{:.2} ms", n * 1e3),
            Cell::Seconds(n) => format!("{n:.2} s"),
            Cell::Rate(n) => format!("{}/s", bytes(*n)),
            Cell::Times(n) => format!("{n:.2}"),
            Cell::Share(n) => format!("{:.0} %", n * 100.0),
            Cell::None => "-".to_owned(),
        }
    }

    fn json(&self) -> serde_json::Value {
        match self {
            Cell::Text(text) => text.as_str().into(),
            other => other.number().into(),
        }
    }
}

fn bytes(n: f64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.into_iter().find(|(_, bits)| n >= (1u64 << bits) as f64);
    let (number, name) = unit.map_or((n, "B"), |(name, bits)| (n / (1u64 << bits) as f64, name));
    if number.fract() == 0.0 { format!("{number} {name}") } else { format!("{number:.2} {name}") }
}

/// What one benchmark measured.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Table {
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(super) fn new<S: Into<String>>(columns: impl IntoIterator<Item = S>) -> Self {
        Self { columns: columns.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// The row's cell in the column of that name.
    pub(super) fn cell<'r>(&self, row: &'r [Cell], column: &str) -> Option<&'r Cell> {
        row.get(self.columns.iter().position(|name| name == column)?)
    }

    /// What the row is about, in words: `4 all_reduce 64 MiB`.
    pub(super) fn about(row: &[Cell]) -> String {
        let keys: Vec<String> = row.iter().take_while(|cell| cell.is_key()).map(Cell::shown).collect();
        keys.join(" ")
    }

    /// Columns of equal width, text to the left and figures to the right.
    pub(super) fn text(&self) -> String {
        let shown: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.iter().map(Cell::shown).collect()).collect();
        let width = |at: usize| {
            let cells = shown.iter().map(|row| row[at].chars().count());
            cells.chain([self.columns[at].chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let left = |at: usize| matches!(self.rows.first().and_then(|row| row.get(at)), Some(Cell::Text(_)));
        let line = |cells: &[String]| {
            let padded = cells.iter().enumerate().map(|(at, cell)| {
                let width = widths[at];
                if left(at) { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        };
        [line(&self.columns)].into_iter().chain(shown.iter().map(|row| line(row))).collect()
    }

    /// One object a row, one line each; numbers in bytes and seconds.
    pub(super) fn json_lines(&self, bench: &str) -> String {
        let line = |row: &Vec<Cell>| {
            let fields = self.columns.iter().cloned().zip(row.iter().map(Cell::json));
            let object: serde_json::Map<_, _> =
                [("bench".to_owned(), bench.into())].into_iter().chain(fields).collect();
            serde_json::Value::Object(object).to_string() + "\n"
        };
        self.rows.iter().map(line).collect()
    }

    pub(super) fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let rule = vec!["---".to_owned(); self.columns.len()];
        let rows = self.rows.iter().map(|row| line(row.iter().map(Cell::shown).collect()));
        [line(self.columns.clone()), line(rule)].into_iter().chain(rows).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["op", "bytes", "sconce", "times gloo"]);
        let row = |bytes, seconds, times| {
            vec![Cell::Text("all_reduce".into()), Cell::Bytes(bytes), Cell::Seconds(seconds), times]
        };
        table.rows = vec![row(4096.0, 15e-6, Cell::Times(41.8)), row(67108864.0, 0.0345, Cell::None)];
        table
    }

    #[test]
    fn figures_have_units_and_columns_line_up() {
        let expected = "op           bytes    sconce  times gloo\n\
                        all_reduce   4 KiB   15.0 µs       41.80\n\
                        all_reduce  64 MiB  34.50 ms           -\n";
        assert_eq!(table().text(), expected);
        assert_eq!(Table::about(&table().rows[1]), "all_reduce 64 MiB");
    }

    #[test]
    fn json_lines_hold_plain_numbers() {
        let lines = table().json_lines("collectives");
        let first: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
        assert_eq!(first["bench"], "collectives");
        assert_eq!(first["bytes"], 4096.0);
        assert_eq!(first["sconce"], 15e-6);
        assert!(lines.lines().nth(1).unwrap().contains("\"times gloo\":null"));
    }
}
