//! What a group measured.

use serde::Serialize;

/// Which of two figures is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Times and sizes.
    Lower,
    /// Rates.
    Higher,
}

impl Better {
    /// How many times better `ours` is than `peer`: above 1 ours is the better one.
    #[must_use]
    pub fn ratio(self, ours: f64, peer: f64) -> f64 {
        match self {
            Self::Lower => peer / ours,
            Self::Higher => ours / peer,
        }
    }
}

/// One case, ours against the peer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub case: String,
    /// Our figure.
    pub ours: f64,
    /// The peer's.
    pub peer: f64,
    /// Who the peer is.
    pub peer_name: String,
    /// The unit of both.
    pub unit: String,
    /// How many times better ours is, whatever the unit.
    pub ratio: f64,
    /// The ratio that this case is held to.
    #[serde(skip)]
    pub bound: Option<f64>,
}

impl Row {
    /// A row of two figures.
    #[must_use]
    pub fn new(case: &str, unit: &str, better: Better, ours: f64, peer: (&str, f64)) -> Self {
        let (peer_name, peer) = peer;
        Self {
            case: case.to_owned(),
            ours,
            peer,
            peer_name: peer_name.to_owned(),
            unit: unit.to_owned(),
            ratio: better.ratio(ours, peer),
            bound: None,
        }
    }

    /// The same, held to a ratio of at least `bound`.
    #[must_use]
    pub fn bound(mut self, bound: f64) -> Self {
        self.bound = Some(bound);
        self
    }

    /// Whether it keeps its bound; true where there is none.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.bound.is_none_or(|bound| self.ratio >= bound)
    }
}

/// All that a group measured.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GroupResult {
    /// The cases.
    pub rows: Vec<Row>,
    /// What else is worth knowing, a sentence each.
    pub notes: Vec<String>,
    /// What is better read otherwise than by rows: a page in Markdown.
    pub page: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn above_one_is_better_in_either_unit() {
        let time = Row::new("a", "ns", Better::Lower, 2.0, ("x", 6.0));
        let rate = Row::new("b", "Gbit/s", Better::Higher, 6.0, ("x", 2.0));
        assert_eq!((time.ratio, rate.ratio), (3.0, 3.0));
        assert!(time.clone().bound(3.0).holds() && !time.bound(3.1).holds());
    }

    #[test]
    fn a_row_in_json_has_the_agreed_fields_and_no_other() {
        let row = Row::new("a", "ns", Better::Lower, 2.0, ("x", 6.0)).bound(1.0);
        let json = serde_json::to_value(&row).unwrap();
        let want = serde_json::json!({"case": "a", "ours": 2.0, "peer": 6.0, "peer_name": "x",
            "unit": "ns", "ratio": 3.0});
        assert_eq!(json, want);
    }
}
