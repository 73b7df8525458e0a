//! The results of a group.

use serde::Serialize;

/// Which of two figures is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// The lower one, for times and sizes.
    Lower,
    /// The higher one, for rates.
    Higher,
}

impl Better {
    /// Returns how many times better `ours` is than `peer`. Above 1, `ours` is the better one.
    #[must_use]
    pub fn ratio(self, ours: f64, peer: f64) -> f64 {
        match self {
            Self::Lower => peer / ours,
            Self::Higher => ours / peer,
        }
    }
}

/// The range of the ratios of a repeated measurement. The ratio of the medians is within it: if each
/// of our samples is at least `x` times the peer's of the same pair, so is the median of ours.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The lowest ratio of a pair.
    pub lower: f64,
    /// The highest ratio of a pair.
    pub upper: f64,
}

/// How busy the front-end was on each side, in per cent of its CPU. At about 100, the front-end
/// limits the rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FrontEndBusy {
    /// With our back-end.
    pub ours: f64,
    /// With the peer.
    pub peer: f64,
}

/// The figures of one case, ours and the peer's.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(into = "RowFile")]
pub struct Row {
    /// The name of the case.
    pub case: String,
    /// Our figure; the median where the measurement was repeated.
    pub ours: f64,
    /// The peer's figure.
    pub peer: f64,
    /// The name of the peer.
    pub peer_name: String,
    /// The unit of both figures.
    pub unit: String,
    /// Which of both figures is the better one.
    pub better: Better,
    /// The range of the ratios of all pairs of samples, where there were several.
    pub spread: Option<Spread>,
    /// The load of the front-end, where it may limit both sides.
    pub front_end_busy: Option<FrontEndBusy>,
    /// The lowest acceptable ratio.
    pub bound: Option<f64>,
    /// Whether the chart shows this row even if it does not show every row.
    pub is_headline: bool,
}

/// A row in the format of the result file.
#[derive(Serialize)]
struct RowFile {
    case: String,
    ours: f64,
    peer: f64,
    peer_name: String,
    unit: String,
    ratio: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_range: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    front_end_busy_percent: Option<FrontEndBusy>,
}

impl From<Row> for RowFile {
    fn from(row: Row) -> Self {
        Self {
            ratio: row.ratio(),
            case: row.case,
            ours: row.ours,
            peer: row.peer,
            peer_name: row.peer_name,
            unit: row.unit,
            ratio_range: row.spread,
            front_end_busy_percent: row.front_end_busy,
        }
    }
}

impl Row {
    /// Creates a row of two figures.
    #[must_use]
    pub fn new(case: &str, unit: &str, better: Better, ours: f64, peer: (&str, f64)) -> Self {
        let (peer_name, peer) = peer;
        Self {
            case: case.to_owned(),
            ours,
            peer,
            peer_name: peer_name.to_owned(),
            unit: unit.to_owned(),
            better,
            spread: None,
            front_end_busy: None,
            bound: None,
            is_headline: false,
        }
    }

    /// Returns how many times better our figure is, whatever the unit. The ratio is always computed
    /// from the two figures of the row, so that it cannot contradict them.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        self.better.ratio(self.ours, self.peer)
    }

    /// Returns the same row with `bound` as the lowest acceptable ratio.
    #[must_use]
    pub fn with_bound(mut self, bound: f64) -> Self {
        self.bound = Some(bound);
        self
    }

    /// Returns the same row, which the chart shows if `is_headline`.
    #[must_use]
    pub fn with_headline(mut self, is_headline: bool) -> Self {
        self.is_headline = is_headline;
        self
    }

    /// Whether the ratio is at least the bound. This is true for a row without a bound.
    #[must_use]
    pub fn is_within_bound(&self) -> bool {
        self.bound.is_none_or(|bound| self.ratio() >= bound)
    }
}

/// All results of a group.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GroupResult {
    /// The cases.
    pub rows: Vec<Row>,
    /// Further information, one sentence each.
    pub notes: Vec<String>,
    /// A page in Markdown, for a group whose results need more than rows.
    pub page: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_above_one_means_that_ours_is_better_in_times_and_in_rates() {
        let time = Row::new("a", "ns", Better::Lower, 2.0, ("x", 6.0));
        let rate = Row::new("b", "Gbit/s", Better::Higher, 6.0, ("x", 2.0));
        assert_eq!((time.ratio(), rate.ratio()), (3.0, 3.0));
        assert!(
            time.clone().with_bound(3.0).is_within_bound()
                && !time.with_bound(3.1).is_within_bound()
        );
    }

    #[test]
    fn ratio_of_a_row_whose_figure_changes_follows_the_figure() {
        let mut row = Row::new("a", "ns", Better::Lower, 2.0, ("x", 6.0));
        row.ours = 12.0;
        assert_eq!(row.ratio(), 0.5);
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["ratio"], 0.5);
    }

    #[test]
    fn row_in_json_has_only_the_documented_fields() {
        let mut row = Row::new("a", "ns", Better::Lower, 2.0, ("x", 6.0)).with_bound(1.0);
        let json = serde_json::to_value(&row).unwrap();
        let want = serde_json::json!({"case": "a", "ours": 2.0, "peer": 6.0, "peer_name": "x",
            "unit": "ns", "ratio": 3.0});
        assert_eq!(json, want);

        row.spread = Some(Spread {
            lower: 2.5,
            upper: 3.5,
        });
        row.front_end_busy = Some(FrontEndBusy {
            ours: 99.0,
            peer: 40.0,
        });
        let json = serde_json::to_value(&row).unwrap();
        let want = serde_json::json!({"case": "a", "ours": 2.0, "peer": 6.0, "peer_name": "x",
            "unit": "ns", "ratio": 3.0, "ratio_range": {"lower": 2.5, "upper": 3.5},
            "front_end_busy_percent": {"ours": 99.0, "peer": 40.0}});
        assert_eq!(json, want);
    }
}
