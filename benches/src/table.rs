//! The result of a group as text.

use std::fmt::Write;

use crate::meta::Meta;
use crate::outcome::{FrontEndBusy, GroupResult, Row, Spread};

/// The machine, the rows in columns, the notes.
#[must_use]
pub fn render(meta: &Meta, outcome: &GroupResult) -> String {
    let mut text = format!("\n== {}: {}\n", meta.group, meta.title);
    for line in meta.lines() {
        text.push_str(&line);
        text.push('\n');
    }
    text.push('\n');
    let case = width(outcome, "case", |row| &row.case);
    let peer = width(outcome, "peer", |row| &row.peer_name);
    let unit = width(outcome, "unit", |row| &row.unit);
    let shows_front_end = outcome.rows.iter().any(|row| row.front_end_busy.is_some());
    let mut line = |columns: [&str; 8], front_end: &str| {
        let [c, ours, peers, u, ratio, quartiles, p, bound] = columns;
        let front_end = match shows_front_end {
            true => format!("{front_end:>14}  "),
            false => String::new(),
        };
        // Writing to a String cannot fail.
        _ = writeln!(
            text,
            "{c:case$}  {ours:>10}  {peers:>10}  {u:unit$}  {ratio:>7}  {quartiles:>13}  {front_end}{p:peer$}  {bound}"
        );
    };
    let head = [
        "case",
        "ours",
        "peer's",
        "unit",
        "ratio",
        "quartiles",
        "peer",
        "bound",
    ];
    line(head, "front-end busy");
    for row in &outcome.rows {
        let columns = [
            &*row.case,
            &figure(row.ours),
            &figure(row.peer),
            &*row.unit,
            &format!("{:.2}", row.ratio()),
            &quartiles(row.spread),
            &*row.peer_name,
            &verdict(row),
        ];
        line(columns, &front_end_busy(row.front_end_busy));
    }
    for note in &outcome.notes {
        _ = writeln!(text, "note: {note}");
    }
    text
}

/// A figure with about three significant digits.
#[must_use]
pub fn figure(value: f64) -> String {
    match value.abs() {
        x if x >= 100.0 => format!("{value:.0}"),
        x if x >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The spread of a ratio in a column of its own.
#[must_use]
pub fn quartiles(spread: Option<Spread>) -> String {
    spread.map_or("-".to_owned(), |Spread { lower, upper }| {
        format!("{lower:.2} to {upper:.2}")
    })
}

/// Ours and the peer's.
fn front_end_busy(busy: Option<FrontEndBusy>) -> String {
    busy.map_or("-".to_owned(), |FrontEndBusy { ours, peer }| {
        format!("{ours:.0} % / {peer:.0} %")
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::groups::Group;
    use crate::outcome::Better;
    use crate::sampling::Effort;

    #[test]
    fn ratio_in_a_table_is_that_of_the_figures_beside_it_with_its_quartiles() {
        let meta = Meta::gather(Group::Ring, Effort::Quick).unwrap();
        let mut row = Row::new("c", "ns", Better::Lower, 2.0, ("other", 5.0)).bound(3.0);
        row.spread = Some(Spread {
            lower: 2.25,
            upper: 2.75,
        });
        let mut outcome = GroupResult {
            rows: vec![row, Row::new("d", "ns", Better::Lower, 1.0, ("aim", 1.0))],
            ..GroupResult::default()
        };
        let words = |outcome: &GroupResult, case: &str| -> Vec<String> {
            let text = render(&meta, outcome);
            let line = text.lines().find(|line| line.starts_with(case)).unwrap();
            line.split("  ")
                .map(|word| word.trim().to_owned())
                .filter(|word| !word.is_empty())
                .collect()
        };
        assert_eq!(
            words(&outcome, "c "),
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
            words(&outcome, "d "),
            ["d", "1.00", "1.00", "ns", "1.00", "-", "aim", "-"]
        );

        outcome.rows[0].front_end_busy = Some(FrontEndBusy {
            ours: 99.6,
            peer: 40.0,
        });
        assert_eq!(words(&outcome, "case")[6], "front-end busy");
        assert_eq!(words(&outcome, "c ")[6], "100 % / 40 %");
    }
}
