//! Formats the result of a group as text.

use std::fmt::Write;

use crate::meta::Meta;
use crate::outcome::{FrontEndBusy, GroupResult, Row, Spread};

/// Returns the conditions, the rows as a table, and the notes.
#[must_use]
pub fn render(meta: &Meta, outcome: &GroupResult) -> String {
    let mut text = format!("\n== {}: {}\n", meta.group, meta.title);
    for line in meta.lines() {
        text.push_str(&line);
        text.push('\n');
    }
    text.push('\n');
    let case = column_width(outcome, "case", |row| &row.case);
    let peer = column_width(outcome, "peer", |row| &row.peer_name);
    let unit = column_width(outcome, "unit", |row| &row.unit);
    let shows_front_end = outcome.rows.iter().any(|row| row.front_end_busy.is_some());
    let mut line = |columns: [&str; 8], front_end: &str| {
        let [c, ours, peers, u, ratio, range, p, bound] = columns;
        let front_end = match shows_front_end {
            true => format!("{front_end:>14}  "),
            false => String::new(),
        };
        // Writing to a String cannot fail.
        _ = writeln!(
            text,
            "{c:case$}  {ours:>10}  {peers:>10}  {u:unit$}  {ratio:>7}  {range:>13}  {front_end}{p:peer$}  {bound}"
        );
    };
    let head = [
        "case", "ours", "peer's", "unit", "ratio", "range", "peer", "bound",
    ];
    line(head, "front-end busy");
    for row in &outcome.rows {
        let columns = [
            &*row.case,
            &format_figure(row.ours),
            &format_figure(row.peer),
            &*row.unit,
            &format!("{:.2}", row.ratio()),
            &format_range(row.spread),
            &*row.peer_name,
            &format_bound(row),
        ];
        line(columns, &format_front_end_busy(row.front_end_busy));
    }
    for note in &outcome.notes {
        _ = writeln!(text, "note: {note}");
    }
    text
}

/// Formats a figure with about three significant digits.
#[must_use]
pub fn format_figure(value: f64) -> String {
    match value.abs() {
        x if x >= 100.0 => format!("{value:.0}"),
        x if x >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Formats the range of a ratio, for a column of a table.
#[must_use]
pub fn format_range(spread: Option<Spread>) -> String {
    spread.map_or("-".to_owned(), |Spread { lower, upper }| {
        format!("{lower:.2} to {upper:.2}")
    })
}

/// Formats the load of the front-end with our back-end and with the peer.
fn format_front_end_busy(busy: Option<FrontEndBusy>) -> String {
    busy.map_or("-".to_owned(), |FrontEndBusy { ours, peer }| {
        format!("{ours:.0} % / {peer:.0} %")
    })
}

fn format_bound(row: &Row) -> String {
    match row.bound {
        None => "-".to_owned(),
        Some(bound) if row.is_within_bound() => format!("ok (>= {bound})"),
        Some(bound) => format!("MISSED (>= {bound})"),
    }
}

fn column_width(outcome: &GroupResult, head: &str, of: impl Fn(&Row) -> &String) -> usize {
    let longest = outcome.rows.iter().map(|row| of(row).chars().count()).max();
    longest.unwrap_or(0).max(head.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::groups::Group;
    use crate::outcome::Better;
    use crate::sampling::Effort;

    #[test]
    fn ratio_in_a_table_is_that_of_the_figures_beside_it_with_its_range() {
        let meta = Meta::gather(Group::Ring, Effort::Quick).unwrap();
        let mut row = Row::new("c", "ns", Better::Lower, 2.0, ("other", 5.0)).with_bound(3.0);
        row.spread = Some(Spread {
            lower: 2.25,
            upper: 2.75,
        });
        let mut outcome = GroupResult {
            rows: vec![row, Row::new("d", "ns", Better::Lower, 1.0, ("aim", 1.0))],
            ..GroupResult::default()
        };
        let cells = |outcome: &GroupResult, case: &str| -> Vec<String> {
            let text = render(&meta, outcome);
            let line = text.lines().find(|line| line.starts_with(case)).unwrap();
            line.split("  ")
                .map(|cell| cell.trim().to_owned())
                .filter(|cell| !cell.is_empty())
                .collect()
        };
        assert_eq!(
            cells(&outcome, "c "),
            [
                "c",
                "2.00",
                "5.00",
                "ns",
                "2.50",
                "2.25 to 2.75",
                "other",
                "MISSED (>= 3)"
            ]
        );
        assert_eq!(
            cells(&outcome, "d "),
            ["d", "1.00", "1.00", "ns", "1.00", "-", "aim", "-"]
        );

        outcome.rows[0].front_end_busy = Some(FrontEndBusy {
            ours: 99.6,
            peer: 40.0,
        });
        assert_eq!(cells(&outcome, "case")[6], "front-end busy");
        assert_eq!(cells(&outcome, "c ")[6], "100 % / 40 %");
    }
}
