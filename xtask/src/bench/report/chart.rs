//! One column of a table as bars, in one self-contained SVG picture.

use std::fmt::Write as _;

use crate::bench::table::Table;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 330.0;
const ROW: f64 = 20.0;
const TOP: f64 = 46.0;

/// The bars of `column`, one a row that has a figure there; `None` if none has. Figures are on a logarithmic scale, with
/// a line at 1: the other's figure, or the whole of a limit.
pub(super) fn bars(title: &str, table: &Table, column: &str) -> Option<String> {
    let figure = |row| table.cell(row, column)?.number().filter(|n| *n > 0.0);
    let rows: Vec<(String, f64)> =
        table.rows.iter().filter_map(|row| Some((Table::about(row), figure(row)?))).collect();
    let largest = rows.iter().map(|(_, n)| *n).fold(None, |max, n| Some(f64::max(max.unwrap_or(n), n)))?;
    let smallest = rows.iter().map(|(_, n)| *n).fold(1.0, f64::min);
    let (low, high) = (smallest.min(0.5).ln(), largest.max(2.0).ln());
    let x = |n: f64| LEFT + (WIDTH - LEFT - 70.0) * (n.ln() - low) / (high - low);
    let height = TOP + ROW * rows.len() as f64 + 14.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"16\">{}</text>\n",
        escaped(title)
    );
    // Writing to a String cannot fail.
    for (nth, (about, n)) in rows.iter().enumerate() {
        let y = TOP + ROW * nth as f64;
        let colour = if *n >= 1.0 { "#2a6fbb" } else { "#d1495b" };
        let (from, to) = (x(1.0).min(x(*n)), x(1.0).max(x(*n)));
        let label = escaped(about);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\">{label}</text>\
             <rect x=\"{from:.1}\" y=\"{:.0}\" width=\"{:.1}\" height=\"14\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.0}\">{n:.2}</text>",
            LEFT - 8.0,
            y + 12.0,
            y + 1.0,
            to - from,
            to + 5.0,
            y + 12.0
        );
    }
    let one = x(1.0);
    let _ = writeln!(svg, "<path d=\"M{one:.1} {:.0}V{:.0}\" stroke=\"#333\"/>", TOP - 6.0, height - 8.0);
    Some(svg + "</svg>\n")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::table::Cell;

    #[test]
    fn each_figure_is_a_bar_from_one_and_rows_without_are_left_out() {
        let mut table = Table::new(["what", "times"]);
        let row = |what: &str, cell| vec![Cell::Text(what.to_owned()), cell];
        table.rows = vec![row("a<b", Cell::Times(4.0)), row("c", Cell::Times(0.5)), row("d", Cell::None)];
        let svg = bars("t", &table, "times").unwrap();
        assert_eq!(svg.matches("height=\"14\"").count(), 2);
        assert!(svg.contains("a&lt;b") && !svg.contains(">d<"));
        let at = |name: &str, nth: usize| {
            let bar = svg.split("height=\"14\"").nth(nth).unwrap();
            let value = bar.rsplit(&format!(" {name}=\"")).next().unwrap();
            value.split('"').next().unwrap().parse::<f64>().unwrap()
        };
        // From 1 to 4 is twice as long as from 0.5 to 1, and the second ends where the first begins.
        assert!((at("width", 0) - 2.0 * at("width", 1)).abs() < 0.2);
        assert_eq!(bars("t", &Table::new(["what"]), "times"), None);
    }
}
