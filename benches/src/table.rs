//! A group's outcome as text.

use std::fmt::Write;

use crate::meta::Meta;
use crate::outcome::{GroupResult, Row};

/// The machine, the rows in columns, the notes.
#[must_use]
pub fn render(meta: &Meta, outcome: &GroupResult) -> String {
    let mut text = format!("\n== {}: {}\n", meta.group, meta.title);
    for line in meta.lines() {
        text.push_str(&line);
        text.push('\n');
    }
    let case = width(outcome, "case", |row| &row.case);
    let peer = width(outcome, "peer", |row| &row.peer_name);
    let unit = width(outcome, "unit", |row| &row.unit);
    // Writing to a String cannot fail.
    _ = writeln!(
        text,
        "\n{:case$}  {:>10}  {:>10}  {:unit$}  {:>7}  {:peer$}  bound",
        "case", "ours", "peer's", "unit", "ratio", "peer"
    );
    for row in &outcome.rows {
        _ = writeln!(
            text,
            "{:case$}  {:>10}  {:>10}  {:unit$}  {:>7.2}  {:peer$}  {}",
            row.case,
            figure(row.ours),
            figure(row.peer),
            row.unit,
            row.ratio,
            row.peer_name,
            verdict(row)
        );
    }
    for note in &outcome.notes {
        _ = writeln!(text, "note: {note}");
    }
    text
}

/// A figure with about three digits that count.
#[must_use]
pub fn figure(value: f64) -> String {
    match value.abs() {
        x if x >= 100.0 => format!("{value:.0}"),
        x if x >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn verdict(row: &Row) -> String {
    match row.bound {
        None => "-".to_owned(),
        Some(bound) if row.holds() => format!("ok (>= {bound})"),
        Some(bound) => format!("MISSED (>= {bound})"),
    }
}

fn width(outcome: &GroupResult, head: &str, of: impl Fn(&Row) -> &String) -> usize {
    let longest = outcome.rows.iter().map(|row| of(row).chars().count()).max();
    longest.unwrap_or(0).max(head.len())
}
