//! The result of a group as an SVG picture for a page or a slide: one bar for each row, from the line
//! of 1.0 (as good as the peer) to the right where ours is better and to the left where it is worse.
//! The axis is logarithmic, so that twice as good and half as good are bars of the same length. A
//! thin line on a bar shows the quartiles of the pairs' ratios.
//!
//! A picture shows at most 12 rows. The columns are as wide as their longest text, so that
//! no label is cut off; lines of the head that are longer than the picture are wrapped.

use std::fmt::Write;

use crate::meta::Meta;
use crate::outcome::{GroupResult, Row, Spread};
use crate::table::figure;

/// Rows that still can be read on a slide.
const MAX_ROWS: usize = 12;
const MARGIN: f64 = 16.0;
const LINE: f64 = 18.0;
const STEP: f64 = 26.0;
const BAR: f64 = 16.0;
/// Width of the part with the bars.
const PLOT: f64 = 420.0;
/// Between the columns.
const GAP: f64 = 12.0;
/// The widest characters of the title's font, of the labels' and of the small one are a little
/// narrower than this on the average of any text.
const TITLE_CHAR: f64 = 9.5;
const LABEL_CHAR: f64 = 7.6;
const SMALL_CHAR: f64 = 6.6;

/// Axes for rows that are all close to 1: both ends and the ticks.
const CLOSE: [(f64, f64, &[f64]); 2] = [
    (0.8, 1.25, &[0.8, 0.9, 1.0, 1.1, 1.2]),
    (0.7, 1.4, &[0.7, 0.8, 0.9, 1.0, 1.2, 1.4]),
];

const STYLE: &str = "text{font:13px sans-serif;fill:#222}.h{font-size:16px;font-weight:bold}\
.s{font-size:11px;fill:#555}.e{text-anchor:end}.m{text-anchor:middle}\
.grid{stroke:#ddd}.one{stroke:#222;stroke-width:1.5}.bound{stroke:#c60;stroke-width:2}\
.spread{stroke:#222;stroke-width:1}\
.better{fill:#2a7f4f}.held{fill:#8aa04a}.worse{fill:#b8442f}";

const LEGEND: &str = "times as good as the peer; orange line: the bound; thin line: quartiles";

/// The picture.
#[must_use]
pub fn render(meta: &Meta, outcome: &GroupResult) -> String {
    let rows = shown_rows(&outcome.rows);
    let title = format!("{}: {}", meta.group, meta.title);
    let layout = Layout::new(&rows, &title);
    let axis = Axis::over(&rows, layout.left);
    let mut head: Vec<String> = meta
        .lines()
        .iter()
        .flat_map(|line| wrap(line, layout.width))
        .collect();
    if rows.len() < outcome.rows.len() {
        let (shown, all) = (rows.len(), outcome.rows.len());
        head.push(format!(
            "{shown} of {all} rows; {}.json has all",
            meta.group
        ));
    }
    let top = MARGIN + 24.0 + LINE * count(head.len()) + 34.0;
    let bottom = top + STEP * count(rows.len());
    let (width, height) = (layout.width, bottom + 34.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\">\n<style>{STYLE}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, "h", MARGIN, MARGIN + 14.0, &title);
    let mut y = MARGIN + 24.0;
    for line in &head {
        y += LINE;
        text(&mut svg, "s", MARGIN, y - 4.0, line);
    }
    ticks(&mut svg, &axis, top, bottom);
    for (n, row) in rows.iter().enumerate() {
        bar(&mut svg, &axis, row, top + STEP * count(n));
    }
    line(&mut svg, "one", axis.x(1.0), top - 4.0, bottom);
    text(&mut svg, "s", layout.left, bottom + 20.0, LEGEND);
    svg.push_str("</svg>\n");
    svg
}

/// The rows that a group marked as its headlines, or all of them where it marked none.
fn shown_rows(rows: &[Row]) -> Vec<&Row> {
    let has_headlines = rows.iter().any(|row| row.is_headline);
    rows.iter()
        .filter(|row| row.is_headline || !has_headlines)
        .take(MAX_ROWS)
        .collect()
}

/// A row's figures in words, right of its bar.
fn words(row: &Row) -> String {
    format!(
        "{:.2} times: {} against {} {} ({})",
        row.ratio(),
        figure(row.ours),
        figure(row.peer),
        unit_in_words(&row.unit),
        row.peer_name
    )
}

fn unit_in_words(unit: &str) -> &str {
    match unit {
        "ns/chain" => "nanoseconds a chain",
        "ns/frame" => "nanoseconds a frame",
        "Gbit/s" => "gigabits a second",
        "Mbit/s" => "megabits a second",
        "kpps" => "thousand packets a second",
        "M frames/s" => "million frames a second",
        "busy cycles" => "busy cycles a frame",
        "KiB" => "kibibytes",
        "ms" => "milliseconds",
        "us" => "microseconds",
        "s/Gbit" => "CPU seconds a gigabit",
        "% of a CPU" => "per cent of a CPU",
        other => other,
    }
}

/// Where the columns are.
#[derive(Debug)]
struct Layout {
    width: f64,
    /// Where the part with the bars begins.
    left: f64,
}

impl Layout {
    fn new(rows: &[&Row], title: &str) -> Self {
        let widest = |of: &dyn Fn(&Row) -> usize| rows.iter().map(|row| of(row)).max().unwrap_or(0);
        let labels = LABEL_CHAR * count(widest(&|row| row.case.chars().count()));
        let figures = SMALL_CHAR * count(widest(&|row| words(row).chars().count()));
        let left = MARGIN + labels + GAP;
        let columns = left + PLOT + GAP + figures + MARGIN;
        let legend = left + SMALL_CHAR * count(LEGEND.len()) + MARGIN;
        let title = 2.0 * MARGIN + TITLE_CHAR * count(title.chars().count());
        Self {
            width: columns.max(title).max(legend).ceil(),
            left: left.ceil(),
        }
    }
}

/// Lines of whole words that fit a picture of this width in the small font.
fn wrap(text: &str, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line)
                if SMALL_CHAR * count(line.chars().count() + 1 + word.chars().count())
                    <= width - 2.0 * MARGIN =>
            {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn ticks(svg: &mut String, axis: &Axis, top: f64, bottom: f64) {
    for tick in &axis.ticks {
        let x = axis.x(*tick);
        line(svg, "grid", x, top, bottom);
        text(svg, "s m", x, top - 8.0, &format!("{tick}x"));
    }
}

fn bar(svg: &mut String, axis: &Axis, row: &Row, y: f64) {
    let (one, end) = (axis.x(1.0), axis.x(row.ratio()));
    let (from, to) = (one.min(end), one.max(end));
    let class = match row.bound {
        _ if row.ratio() >= 1.0 => "better",
        Some(_) if row.holds() => "held",
        _ => "worse",
    };
    let base = y + BAR - 3.0;
    text(svg, "e", axis.left - GAP, base, &row.case);
    // Writing to a String cannot fail.
    _ = writeln!(
        svg,
        "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\"/>",
        (to - from).max(1.0)
    );
    if let Some(bound) = row.bound {
        let x = axis.x(bound);
        line(svg, "bound", x, y - 2.0, y + BAR + 2.0);
    }
    if let Some(Spread { lower, upper }) = row.spread {
        let (from, to, y) = (axis.x(lower), axis.x(upper), y + BAR / 2.0);
        _ = writeln!(
            svg,
            "<line class=\"spread\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
        );
    }
    text(svg, "s", axis.left + PLOT + GAP, base, &words(row));
}

fn line(svg: &mut String, class: &str, x: f64, from: f64, to: f64) {
    _ = writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{from:.1}\" y2=\"{to:.1}\"/>"
    );
}

fn text(svg: &mut String, class: &str, x: f64, y: f64, words: &str) {
    let words = escape(words);
    _ = writeln!(
        svg,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>"
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// The ratios from one side of the picture to the other.
#[derive(Debug)]
struct Axis {
    /// Where it begins.
    left: f64,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// Wide enough for every row and its bound, and no wider than needed.
    fn over(rows: &[&Row], left: f64) -> Self {
        let shown = || rows.iter().flat_map(|row| [Some(row.ratio()), row.bound]);
        let finite = || shown().flatten().filter(|r| r.is_finite() && *r > 0.0);
        let (least, most) = (finite().fold(1.0, f64::min), finite().fold(1.0, f64::max));
        for (low, high, ticks) in CLOSE {
            if least >= low && most <= high {
                let ticks = ticks.to_vec();
                return Self {
                    left,
                    low,
                    high,
                    ticks,
                };
            }
        }
        let low = least.log2().floor().min(-1.0);
        let high = most.log2().ceil().max(1.0);
        let mut ticks = Vec::new();
        let mut at = low;
        while at <= high {
            ticks.push(at.exp2());
            at += 1.0;
        }
        Self {
            left,
            low: low.exp2(),
            high: high.exp2(),
            ticks,
        }
    }

    fn x(&self, ratio: f64) -> f64 {
        let part = (ratio / self.low).ln() / (self.high / self.low).ln();
        self.left + PLOT * part.clamp(0.0, 1.0)
    }
}

fn count(n: usize) -> f64 {
    u32::try_from(n).map_or(f64::MAX, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::groups::Group;
    use crate::outcome::Better;
    use crate::sampling::Effort;

    const LEFT: f64 = 300.0;

    fn row(ratio: f64) -> Row {
        Row::new("a < b & c", "ns", Better::Higher, ratio, ("peer", 1.0))
    }

    #[test]
    fn ratio_of_one_is_in_the_middle_and_twice_is_as_far_as_half() {
        let axis = Axis::over(&[&row(1.9), &row(0.6)], LEFT);
        assert_eq!(axis.ticks, [0.5, 1.0, 2.0]);
        let (half, one, twice) = (axis.x(0.5), axis.x(1.0), axis.x(2.0));
        assert!((one - half - (twice - one)).abs() < 1e-6);
        assert_eq!((half, twice), (LEFT, LEFT + PLOT));
    }

    #[test]
    fn axis_includes_every_ratio_and_bound() {
        for (ratio, bound) in [
            (1.2, 0.9),
            (0.75, 0.9),
            (30.0, 1.0),
            (0.01, 1.0),
            (1.0, 0.9),
            (1.0, 5.0),
        ] {
            let axis = Axis::over(&[&row(ratio).bound(bound)], LEFT);
            for value in [ratio, bound] {
                assert!(axis.low <= value && value <= axis.high, "{value}: {axis:?}");
            }
        }
    }

    #[test]
    fn bar_of_a_row_goes_from_one_to_the_ratio() {
        let axis = Axis::over(&[&row(2.0), &row(0.5)], LEFT);
        for (row, class, x) in [
            (row(2.0), "better", axis.x(1.0)),
            (row(0.5), "worse", LEFT),
            (row(0.5).bound(0.4), "held", LEFT),
            (row(0.5).bound(0.6), "worse", LEFT),
        ] {
            let mut svg = String::new();
            bar(&mut svg, &axis, &row, 0.0);
            let width = PLOT / 2.0;
            let want = format!("class=\"{class}\" x=\"{x:.1}\" y=\"0.0\" width=\"{width:.1}\"");
            assert!(svg.contains(&want), "{svg}");
            assert!(svg.contains("a &lt; b &amp; c"), "{svg}");
        }
    }

    fn picture(rows: Vec<Row>) -> String {
        let meta = Meta::gather(Group::Ring, Effort::Quick).unwrap();
        let outcome = GroupResult {
            rows,
            ..GroupResult::default()
        };
        render(&meta, &outcome)
    }

    #[test]
    fn picture_of_many_rows_shows_few_and_names_the_file_with_all() {
        let svg = picture(vec![row(2.0); 40]);
        assert_eq!(svg.matches("class=\"better\"").count(), MAX_ROWS);
        assert!(svg.contains("12 of 40 rows; ring.json has all"), "{svg}");
    }

    #[test]
    fn picture_with_headlines_shows_only_these() {
        let mut rows = vec![row(2.0); 4];
        rows.push(row(0.5).headline(true));
        let svg = picture(rows);
        assert!(!svg.contains("class=\"better\""), "{svg}");
        assert_eq!(svg.matches("class=\"worse\"").count(), 1);
    }

    #[test]
    fn labels_of_any_length_lie_inside_the_picture() {
        let long = "a case with a very long name ".repeat(5);
        let mut row = Row::new(&long, "kpps", Better::Higher, 1.0, (&long, 1.0));
        row.spread = Some(Spread {
            lower: 0.9,
            upper: 1.1,
        });
        let layout = Layout::new(&[&row], "title");
        let axis = Axis::over(&[&row], layout.left);
        let label = LABEL_CHAR * count(long.chars().count());
        assert!(axis.left - GAP - label >= MARGIN - 1.0, "{layout:?}");
        let figures = SMALL_CHAR * count(words(&row).chars().count());
        assert!(
            axis.left + PLOT + GAP + figures <= layout.width,
            "{layout:?}"
        );
        let svg = picture(vec![row]);
        assert!(svg.contains("thousand packets a second"), "{svg}");
        assert!(svg.contains("class=\"spread\""), "{svg}");
    }

    #[test]
    fn lines_longer_than_the_picture_are_wrapped_at_words() {
        let text = "one two three four five six seven eight nine ten";
        let lines = wrap(text, 2.0 * MARGIN + 20.0 * SMALL_CHAR);
        assert!(lines.iter().all(|line| line.len() <= 20), "{lines:?}");
        assert_eq!(lines.join(" "), text);
    }
}
