//! A group's outcome as a picture: one bar a case, from the line of 1.0 (as good as the peer) to
//! the right where ours is better and to the left where it is worse. The axis is logarithmic, so
//! that twice as good and half as good are bars of one length.

use std::fmt::Write;

use crate::meta::Meta;
use crate::outcome::{GroupResult, Row};
use crate::table::figure;

const WIDTH: f64 = 1080.0;
const MARGIN: f64 = 16.0;
const LINE: f64 = 18.0;
const STEP: f64 = 26.0;
const BAR: f64 = 16.0;
/// Where the bars' part begins and ends.
const LEFT: f64 = 330.0;
const RIGHT: f64 = 790.0;

/// Axes for rows that are all close to 1: both ends and the ticks.
const CLOSE: [(f64, f64, &[f64]); 2] = [
    (0.8, 1.25, &[0.8, 0.9, 1.0, 1.1, 1.2]),
    (0.7, 1.4, &[0.7, 0.8, 0.9, 1.0, 1.2, 1.4]),
];

const STYLE: &str = "text{font:13px sans-serif;fill:#222}.h{font-size:16px;font-weight:bold}\
.s{font-size:11px;fill:#555}.e{text-anchor:end}.m{text-anchor:middle}\
.grid{stroke:#ddd}.one{stroke:#222;stroke-width:1.5}.bound{stroke:#c60;stroke-width:2}\
.better{fill:#2a7f4f}.held{fill:#8aa04a}.worse{fill:#b8442f}";

/// The picture.
#[must_use]
pub fn render(meta: &Meta, outcome: &GroupResult) -> String {
    let axis = Axis::over(&outcome.rows);
    let lines = meta.lines();
    let top = MARGIN + 24.0 + LINE * count(lines.len()) + 34.0;
    let bottom = top + STEP * count(outcome.rows.len());
    let height = bottom + 34.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\">\n<style>{STYLE}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    let title = format!("{}: {}", meta.group, meta.title);
    text(&mut svg, "h", MARGIN, MARGIN + 14.0, &title);
    let mut y = MARGIN + 24.0;
    for line in &lines {
        y += LINE;
        text(&mut svg, "s", MARGIN, y - 4.0, line);
    }
    ticks(&mut svg, &axis, top, bottom);
    for (n, row) in outcome.rows.iter().enumerate() {
        bar(&mut svg, &axis, row, top + STEP * count(n));
    }
    line(&mut svg, "one", axis.x(1.0), top - 4.0, bottom);
    let legend = "ratio to the peer: 1.0 is as good, right of it is better; orange line: the bound";
    text(&mut svg, "s", LEFT, bottom + 20.0, legend);
    svg.push_str("</svg>\n");
    svg
}

fn ticks(svg: &mut String, axis: &Axis, top: f64, bottom: f64) {
    for tick in &axis.ticks {
        let x = axis.x(*tick);
        line(svg, "grid", x, top, bottom);
        text(svg, "s m", x, top - 8.0, &format!("{tick}x"));
    }
}

fn bar(svg: &mut String, axis: &Axis, row: &Row, y: f64) {
    let (one, end) = (axis.x(1.0), axis.x(row.ratio));
    let (from, to) = (one.min(end), one.max(end));
    let class = match row.bound {
        _ if row.ratio >= 1.0 => "better",
        Some(_) if row.holds() => "held",
        _ => "worse",
    };
    let base = y + BAR - 3.0;
    text(svg, "e", LEFT - 12.0, base, &row.case);
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
    let words = format!(
        "{:.2}x: {} against {} {} ({})",
        row.ratio,
        figure(row.ours),
        figure(row.peer),
        row.unit,
        row.peer_name
    );
    text(svg, "s", RIGHT + 12.0, base, &words);
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
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// Wide enough for every row and its bound, and no wider than needed.
    fn over(rows: &[Row]) -> Self {
        let shown = || rows.iter().flat_map(|row| [Some(row.ratio), row.bound]);
        let finite = || shown().flatten().filter(|r| r.is_finite() && *r > 0.0);
        let (least, most) = (finite().fold(1.0, f64::min), finite().fold(1.0, f64::max));
        for (low, high, ticks) in CLOSE {
            if least >= low && most <= high {
                let ticks = ticks.to_vec();
                return Self { low, high, ticks };
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
            low: low.exp2(),
            high: high.exp2(),
            ticks,
        }
    }

    fn x(&self, ratio: f64) -> f64 {
        let part = (ratio / self.low).ln() / (self.high / self.low).ln();
        LEFT + (RIGHT - LEFT) * part.clamp(0.0, 1.0)
    }
}

fn count(n: usize) -> f64 {
    u32::try_from(n).map_or(f64::MAX, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Better;

    fn row(ratio: f64) -> Row {
        Row::new("a < b & c", "ns", Better::Higher, ratio, ("peer", 1.0))
    }

    #[test]
    fn as_good_lies_in_the_middle_and_twice_is_as_far_as_half() {
        let axis = Axis::over(&[row(1.9), row(0.6)]);
        assert_eq!(axis.ticks, [0.5, 1.0, 2.0]);
        let (half, one, twice) = (axis.x(0.5), axis.x(1.0), axis.x(2.0));
        assert!((one - half - (twice - one)).abs() < 1e-6);
        assert_eq!((half, twice), (LEFT, RIGHT));
    }

    #[test]
    fn the_axis_holds_every_ratio_and_bound() {
        for (ratio, bound) in [
            (1.2, 0.9),
            (0.75, 0.9),
            (30.0, 1.0),
            (0.01, 1.0),
            (1.0, 0.9),
            (1.0, 5.0),
        ] {
            let axis = Axis::over(&[row(ratio).bound(bound)]);
            for value in [ratio, bound] {
                assert!(axis.low <= value && value <= axis.high, "{value}: {axis:?}");
            }
        }
    }

    #[test]
    fn a_bar_goes_from_one_to_the_ratio() {
        let axis = Axis::over(&[row(2.0), row(0.5)]);
        for (row, class, x) in [
            (row(2.0), "better", axis.x(1.0)),
            (row(0.5), "worse", LEFT),
            (row(0.5).bound(0.4), "held", LEFT),
            (row(0.5).bound(0.6), "worse", LEFT),
        ] {
            let mut svg = String::new();
            bar(&mut svg, &axis, &row, 0.0);
            let width = (RIGHT - LEFT) / 2.0;
            let want = format!("class=\"{class}\" x=\"{x:.1}\" y=\"0.0\" width=\"{width:.1}\"");
            assert!(svg.contains(&want), "{svg}");
            assert!(svg.contains("a &lt; b &amp; c"), "{svg}");
        }
    }
}
