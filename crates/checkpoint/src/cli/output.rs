//! What the program prints: text and tables for people, JSON lines for programs.

use std::io::{self, IsTerminal as _, Write as _};

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Error;

/// Where a command's words go. What cannot be written ends no command before its work is done.
pub(super) struct Output {
    json: bool,
    /// Why nothing more can be written.
    failed: Option<io::Error>,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json, failed: None }
    }

    /// Whether programs read it.
    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// Whether nobody can be told anything any more.
    pub(super) fn is_closed(&self) -> bool {
        self.failed.is_some()
    }

    /// Why something was not written, unless its reader went away: that one knows.
    pub(super) fn failure(&self) -> Option<&io::Error> {
        self.failed.as_ref().filter(|e| e.kind() != io::ErrorKind::BrokenPipe)
    }

    /// For people.
    pub(super) fn line(&mut self, text: impl AsRef<str>) {
        if !self.json {
            self.text(&format!("{}\n", text.as_ref()));
        }
    }

    /// For programs: one object a line.
    pub(super) fn object(&mut self, value: &serde_json::Value) {
        if self.json {
            self.text(&format!("{value}\n"));
        }
    }

    /// As it is.
    pub(super) fn text(&mut self, text: &str) {
        if self.failed.is_none() {
            let mut stdout = io::stdout().lock();
            self.failed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).err();
        }
    }

    pub(super) fn error(&mut self, error: &Error) {
        self.object(&serde_json::json!({ "error": error.to_string() }));
        let _ = writeln!(io::stderr().lock(), "sconce-ckpt: {error}");
    }

    /// A table whose columns from `numbers` on are numbers.
    pub(super) fn table(&mut self, header: &[&str], numbers: usize, rows: Vec<Vec<String>>) {
        if self.json || rows.is_empty() {
            return;
        }
        let mut table = Table::new();
        // One line a row, however wide: what is piped into `grep` stays whole.
        let style = TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));
        table.load_style(style).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(header);
        table.add_rows(rows);
        for nth in numbers..header.len() {
            if let Some(column) = table.column_mut(nth) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        self.line(table.trim_fmt());
    }

    /// A bar over bytes with rate and time left, on a terminal.
    pub(super) fn progress(&self, bytes: u64, what: &'static str) -> ProgressBar {
        if self.json || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(bytes).with_message(what);
        let style = "{msg} {wide_bar} {bytes}/{total_bytes}  {binary_bytes_per_sec}  {eta} left";
        match ProgressStyle::with_template(style) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }
}

/// `1.50 MiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

/// `1.50 GiB in 0.30 s, 5.00 GiB/s`.
pub(super) fn rate(bytes: u64, took: std::time::Duration) -> String {
    let seconds = took.as_secs_f64().max(1e-9);
    format!("{} in {seconds:.2} s, {}/s", size(bytes), size((bytes as f64 / seconds) as u64))
}

/// `1 file`, `2 files`.
pub(super) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A number as short as it can be read: whole ones as such, tiny and huge ones with an exponent.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if value == value.trunc() && size < 1e15 {
        return format!("{value}");
    }
    if (1e-4..1e7).contains(&size) { format!("{value:.6}") } else { format!("{value:.5e}") }
}

/// `[3, 5]`, or `scalar`.
pub(super) fn shape(shape: &[usize]) -> String {
    if shape.is_empty() { "scalar".to_owned() } else { format!("{shape:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_what_matters_of_them() {
        let shown = [0.0, -3.0, 0.1, 1.5e-9, 1e20, f64::NAN, f64::NEG_INFINITY].map(number);
        assert_eq!(shown, ["0", "-3", "0.100000", "1.50000e-9", "1.00000e20", "NaN", "-inf"]);
    }
}
