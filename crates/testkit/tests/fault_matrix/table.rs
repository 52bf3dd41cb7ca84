//! The outcomes of all cells, a line for each scenario and fault.

use std::collections::BTreeMap;
use std::time::Duration;

use sconce_testkit::Fault;

use crate::judge::Judged;

#[derive(Default)]
struct Line {
    cells: usize,
    finished: usize,
    failed: usize,
    wrong: usize,
    slowest: Duration,
}

impl Line {
    fn add(&mut self, judged: &Judged) {
        let is_ok = judged.told.contains("ok");
        self.cells += 1;
        self.wrong += usize::from(!judged.wrong.is_empty());
        self.finished += usize::from(judged.wrong.is_empty() && is_ok);
        self.failed += usize::from(judged.wrong.is_empty() && !is_ok);
        self.slowest = self.slowest.max(judged.latency);
    }
}

pub(crate) fn render(judged: &[Judged]) -> String {
    let mut lines = BTreeMap::<(&str, Fault), Line>::new();
    let mut total = Line::default();
    for judged in judged {
        lines.entry((&judged.cell.scenario, judged.cell.plan.fault)).or_default().add(judged);
        total.add(judged);
    }
    let head = format!(
        "{:<24} {:<8} {:>6} {:>9} {:>12} {:>6} {:>10}",
        "scenario", "fault", "cells", "finished", "failed alike", "wrong", "slowest"
    );
    let row = |scenario: &str, fault: &str, line: &Line| {
        let Line { cells, finished, failed, wrong, slowest } = line;
        let slowest = format!("{} ms", slowest.as_millis());
        format!("{scenario:<24} {fault:<8} {cells:>6} {finished:>9} {failed:>12} {wrong:>6} {slowest:>10}")
    };
    let rows = lines.iter().map(|((scenario, fault), line)| row(scenario, fault.name(), line));
    let all: Vec<String> = std::iter::once(head).chain(rows).chain([row("all", "", &total)]).collect();
    all.join("\n")
}
