//! Draws the result of a group as an SVG chart for a page or a slide. Each row has a bar that
//! starts at the line of 1.0 (as good as the peer). It extends to the right where virtionetd is
//! better, and to the left where it is worse. The axis is logarithmic, so that the bars of the
//! ratios 2 and 0.5 have the same length. A thin line on a bar shows the range of the ratios.
//!
//! A chart shows at most 12 rows. Each column is as wide as its longest text, so that no label is
//! cut off. Lines of the head that are wider than the chart are wrapped.

use std::fmt::Write;

use crate::meta::Meta;
use crate::outcome::{GroupResult, Row, Spread};
use crate::table::format_figure;

/// The largest number of rows that is readable on a slide.
const MAX_ROWS: usize = 12;
const MARGIN: f64 = 16.0;
const LINE_HEIGHT: f64 = 18.0;
const ROW_HEIGHT: f64 = 26.0;
const BAR_HEIGHT: f64 = 16.0;
/// Width of the area with the bars.
const PLOT_WIDTH: f64 = 420.0;
/// Space between two columns.
const COLUMN_GAP: f64 = 12.0;
/// Upper bounds of the average width of a character, for the fonts of the title, of the labels and
/// of the small text.
const TITLE_CHAR_WIDTH: f64 = 9.5;
const LABEL_CHAR_WIDTH: f64 = 7.6;
const SMALL_CHAR_WIDTH: f64 = 6.6;

/// Axes for rows whose ratios are all close to 1: lower end, upper end, and ticks.
const NARROW_AXES: [(f64, f64, &[f64]); 2] = [
    (0.8, 1.25, &[0.8, 0.9, 1.0, 1.1, 1.2]),
    (0.7, 1.4, &[0.7, 0.8, 0.9, 1.0, 1.2, 1.4]),
];

const STYLE: &str = "text{font:13px sans-serif;fill:#222}.h{font-size:16px;font-weight:bold}\
.s{font-size:11px;fill:#555}.e{text-anchor:end}.m{text-anchor:middle}\
.grid{stroke:#ddd}.one{stroke:#222;stroke-width:1.5}.bound{stroke:#c60;stroke-width:2}\
.spread{stroke:#222;stroke-width:1}\
.better{fill:#2a7f4f}.held{fill:#8aa04a}.worse{fill:#b8442f}";

const LEGEND: &str = "times as good as the peer; orange line: the bound; thin line: range";

/// Returns the chart as an SVG document.
#[must_use]
pub fn render(meta: &Meta, outcome: &GroupResult) -> String {
    let rows = shown_rows(&outcome.rows);
    let title = format!("{}: {}", meta.group, meta.title);
    let layout = Layout::new(&rows, &title);
    let axis = Axis::for_rows(&rows, layout.left);
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
    let top = MARGIN + 24.0 + LINE_HEIGHT * to_f64(head.len()) + 34.0;
    let bottom = top + ROW_HEIGHT * to_f64(rows.len());
    let (width, height) = (layout.width, bottom + 34.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\">\n<style>{STYLE}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    write_text(&mut svg, "h", MARGIN, MARGIN + 14.0, &title);
    let mut y = MARGIN + 24.0;
    for line in &head {
        y += LINE_HEIGHT;
        write_text(&mut svg, "s", MARGIN, y - 4.0, line);
    }
    write_ticks(&mut svg, &axis, top, bottom);
    for (n, row) in rows.iter().enumerate() {
        write_bar(&mut svg, &axis, row, top + ROW_HEIGHT * to_f64(n));
    }
    write_line(&mut svg, "one", axis.x_of(1.0), top - 4.0, bottom);
    write_text(&mut svg, "s", layout.left, bottom + 20.0, LEGEND);
    svg.push_str("</svg>\n");
    svg
}

/// Returns the rows that a group marked as headlines, or all rows if it marked none.
fn shown_rows(rows: &[Row]) -> Vec<&Row> {
    let has_headlines = rows.iter().any(|row| row.is_headline);
    rows.iter()
        .filter(|row| row.is_headline || !has_headlines)
        .take(MAX_ROWS)
        .collect()
}

/// Describes a row's figures, for the text to the right of its bar.
fn describe(row: &Row) -> String {
    format!(
        "{:.2} times: {} against {} {} ({})",
        row.ratio(),
        format_figure(row.ours),
        format_figure(row.peer),
        unit_in_words(&row.unit),
        row.peer_name
    )
}

fn unit_in_words(unit: &str) -> &str {
    match unit {
        "ns/chain" => "nanoseconds per chain",
        "ns/frame" => "nanoseconds per frame",
        "Gbit/s" => "gigabits per second",
        "Mbit/s" => "megabits per second",
        "kpps" => "thousand packets per second",
        "M frames/s" => "million frames per second",
        "busy cycles" => "busy cycles per frame",
        "KiB" => "kibibytes",
        "ms" => "milliseconds",
        "us" => "microseconds",
        "s/Gbit" => "CPU seconds per gigabit",
        "% of a CPU" => "per cent of a CPU",
        other => other,
    }
}

/// The positions of the columns.
#[derive(Debug)]
struct Layout {
    width: f64,
    /// Left edge of the area with the bars.
    left: f64,
}

impl Layout {
    fn new(rows: &[&Row], title: &str) -> Self {
        let widest = |of: &dyn Fn(&Row) -> usize| rows.iter().map(|row| of(row)).max().unwrap_or(0);
        let labels = LABEL_CHAR_WIDTH * to_f64(widest(&|row| row.case.chars().count()));
        let figures = SMALL_CHAR_WIDTH * to_f64(widest(&|row| describe(row).chars().count()));
        let left = MARGIN + labels + COLUMN_GAP;
        let columns = left + PLOT_WIDTH + COLUMN_GAP + figures + MARGIN;
        let legend = left + SMALL_CHAR_WIDTH * to_f64(LEGEND.len()) + MARGIN;
        let title = 2.0 * MARGIN + TITLE_CHAR_WIDTH * to_f64(title.chars().count());
        Self {
            width: columns.max(title).max(legend).ceil(),
            left: left.ceil(),
        }
    }
}

/// Breaks `text` between words into lines that fit a chart of this width in the small font.
fn wrap(text: &str, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line)
                if SMALL_CHAR_WIDTH * to_f64(line.chars().count() + 1 + word.chars().count())
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

fn write_ticks(svg: &mut String, axis: &Axis, top: f64, bottom: f64) {
    for tick in &axis.ticks {
        let x = axis.x_of(*tick);
        write_line(svg, "grid", x, top, bottom);
        write_text(svg, "s m", x, top - 8.0, &format!("{tick}x"));
    }
}

fn write_bar(svg: &mut String, axis: &Axis, row: &Row, y: f64) {
    let (one, end) = (axis.x_of(1.0), axis.x_of(row.ratio()));
    let (from, to) = (one.min(end), one.max(end));
    let class = match row.bound {
        _ if row.ratio() >= 1.0 => "better",
        Some(_) if row.is_within_bound() => "held",
        _ => "worse",
    };
    let baseline = y + BAR_HEIGHT - 3.0;
    write_text(svg, "e", axis.left - COLUMN_GAP, baseline, &row.case);
    // Writing to a String cannot fail.
    _ = writeln!(
        svg,
        "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR_HEIGHT}\"/>",
        (to - from).max(1.0)
    );
    if let Some(bound) = row.bound {
        let x = axis.x_of(bound);
        write_line(svg, "bound", x, y - 2.0, y + BAR_HEIGHT + 2.0);
    }
    if let Some(Spread { lower, upper }) = row.spread {
        let (from, to, y) = (axis.x_of(lower), axis.x_of(upper), y + BAR_HEIGHT / 2.0);
        _ = writeln!(
            svg,
            "<line class=\"spread\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
        );
    }
    write_text(
        svg,
        "s",
        axis.left + PLOT_WIDTH + COLUMN_GAP,
        baseline,
        &describe(row),
    );
}

fn write_line(svg: &mut String, class: &str, x: f64, from: f64, to: f64) {
    _ = writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{from:.1}\" y2=\"{to:.1}\"/>"
    );
}

fn write_text(svg: &mut String, class: &str, x: f64, y: f64, text: &str) {
    let text = escape(text);
    _ = writeln!(
        svg,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>"
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// The logarithmic axis of ratios, from the left edge of the area with the bars to its right edge.
#[derive(Debug)]
struct Axis {
    /// Left edge, in pixels.
    left: f64,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// Creates the shortest axis that includes every row and its bound.
    fn for_rows(rows: &[&Row], left: f64) -> Self {
        let shown = || rows.iter().flat_map(|row| [Some(row.ratio()), row.bound]);
        let finite = || shown().flatten().filter(|r| r.is_finite() && *r > 0.0);
        let (lowest, highest) = (finite().fold(1.0, f64::min), finite().fold(1.0, f64::max));
        for (low, high, ticks) in NARROW_AXES {
            if lowest >= low && highest <= high {
                let ticks = ticks.to_vec();
                return Self {
                    left,
                    low,
                    high,
                    ticks,
                };
            }
        }
        let low = lowest.log2().floor().min(-1.0);
        let high = highest.log2().ceil().max(1.0);
        let mut ticks = Vec::new();
        let mut exponent = low;
        while exponent <= high {
            ticks.push(exponent.exp2());
            exponent += 1.0;
        }
        Self {
            left,
            low: low.exp2(),
            high: high.exp2(),
            ticks,
        }
    }

    fn x_of(&self, ratio: f64) -> f64 {
        let fraction = (ratio / self.low).ln() / (self.high / self.low).ln();
        self.left + PLOT_WIDTH * fraction.clamp(0.0, 1.0)
    }
}

fn to_f64(n: usize) -> f64 {
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
    fn ratios_of_two_and_one_half_have_the_same_distance_from_one() {
        let axis = Axis::for_rows(&[&row(1.9), &row(0.6)], LEFT);
        assert_eq!(axis.ticks, [0.5, 1.0, 2.0]);
        let (half, one, twice) = (axis.x_of(0.5), axis.x_of(1.0), axis.x_of(2.0));
        assert!((one - half - (twice - one)).abs() < 1e-6);
        assert_eq!((half, twice), (LEFT, LEFT + PLOT_WIDTH));
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
            let axis = Axis::for_rows(&[&row(ratio).with_bound(bound)], LEFT);
            for value in [ratio, bound] {
                assert!(axis.low <= value && value <= axis.high, "{value}: {axis:?}");
            }
        }
    }

    #[test]
    fn bar_of_a_row_extends_from_one_to_the_ratio() {
        let axis = Axis::for_rows(&[&row(2.0), &row(0.5)], LEFT);
        for (row, class, x) in [
            (row(2.0), "better", axis.x_of(1.0)),
            (row(0.5), "worse", LEFT),
            (row(0.5).with_bound(0.4), "held", LEFT),
            (row(0.5).with_bound(0.6), "worse", LEFT),
        ] {
            let mut svg = String::new();
            write_bar(&mut svg, &axis, &row, 0.0);
            let width = PLOT_WIDTH / 2.0;
            let want = format!("class=\"{class}\" x=\"{x:.1}\" y=\"0.0\" width=\"{width:.1}\"");
            assert!(svg.contains(&want), "{svg}");
            assert!(svg.contains("a &lt; b &amp; c"), "{svg}");
        }
    }

    fn render_rows(rows: Vec<Row>) -> String {
        let meta = Meta::gather(Group::Ring, Effort::Quick).unwrap();
        let outcome = GroupResult {
            rows,
            ..GroupResult::default()
        };
        render(&meta, &outcome)
    }

    #[test]
    fn chart_of_many_rows_shows_some_and_names_the_file_with_all() {
        let svg = render_rows(vec![row(2.0); 40]);
        assert_eq!(svg.matches("class=\"better\"").count(), MAX_ROWS);
        assert!(svg.contains("12 of 40 rows; ring.json has all"), "{svg}");
    }

    #[test]
    fn chart_with_headlines_shows_only_headlines() {
        let mut rows = vec![row(2.0); 4];
        rows.push(row(0.5).with_headline(true));
        let svg = render_rows(rows);
        assert!(!svg.contains("class=\"better\""), "{svg}");
        assert_eq!(svg.matches("class=\"worse\"").count(), 1);
    }

    #[test]
    fn labels_of_any_length_lie_inside_the_chart() {
        let long = "a case with a very long name ".repeat(5);
        let mut row = Row::new(&long, "kpps", Better::Higher, 1.0, (&long, 1.0));
        row.spread = Some(Spread {
            lower: 0.9,
            upper: 1.1,
        });
        let layout = Layout::new(&[&row], "title");
        let axis = Axis::for_rows(&[&row], layout.left);
        let label = LABEL_CHAR_WIDTH * to_f64(long.chars().count());
        assert!(axis.left - COLUMN_GAP - label >= MARGIN - 1.0, "{layout:?}");
        let figures = SMALL_CHAR_WIDTH * to_f64(describe(&row).chars().count());
        assert!(
            axis.left + PLOT_WIDTH + COLUMN_GAP + figures <= layout.width,
            "{layout:?}"
        );
        let svg = render_rows(vec![row]);
        assert!(svg.contains("thousand packets per second"), "{svg}");
        assert!(svg.contains("class=\"spread\""), "{svg}");
    }

    #[test]
    fn lines_wider_than_the_chart_are_wrapped_between_words() {
        let text = "one two three four five six seven eight nine ten";
        let lines = wrap(text, 2.0 * MARGIN + 20.0 * SMALL_CHAR_WIDTH);
        assert!(lines.iter().all(|line| line.len() <= 20), "{lines:?}");
        assert_eq!(lines.join(" "), text);
    }
}
