//! Two sides measured in turns: A B A B. What disturbs the machine for a while disturbs both sides
//! of a pair, so that the ratio of a pair says more than the ratio of two means.

use anyhow::Result;

use crate::outcome::{Better, Row};

/// How long to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// For figures that are to be believed.
    Full,
    /// To see that it runs.
    Quick,
}

impl Effort {
    /// One number or the other.
    #[must_use]
    pub fn choose<T>(self, full: T, quick: T) -> T {
        match self {
            Self::Full => full,
            Self::Quick => quick,
        }
    }
}

/// Figures taken in turns: the n-th of each belong together.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PairedSamples {
    ours: Vec<f64>,
    peer: Vec<f64>,
}

impl PairedSamples {
    /// Measures `count` pairs, after one that warms up and is not counted.
    ///
    /// # Errors
    /// The first error of either side.
    pub fn measure_in_turns(
        count: usize,
        mut ours: impl FnMut() -> Result<f64>,
        mut peer: impl FnMut() -> Result<f64>,
    ) -> Result<Self> {
        let mut pairs = Self::default();
        ours()?;
        peer()?;
        for _ in 0..count {
            pairs.push(ours()?, peer()?);
        }
        Ok(pairs)
    }

    /// One more pair.
    pub fn push(&mut self, ours: f64, peer: f64) {
        self.ours.push(ours);
        self.peer.push(peer);
    }

    /// The medians of both sides, and as the ratio the median of the pairs' ratios.
    #[must_use]
    pub fn row(&self, case: &str, unit: &str, better: Better, peer_name: &str) -> Row {
        let peer = (peer_name, median(&self.peer));
        let ratios: Vec<f64> = self
            .ours
            .iter()
            .zip(&self.peer)
            .map(|(ours, peer)| better.ratio(*ours, *peer))
            .collect();
        Row {
            ratio: median(&ratios),
            ..Row::new(case, unit, better, median(&self.ours), peer)
        }
    }
}

/// The middle of `values`; not a number when there is none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.get(half) {
        None => f64::NAN,
        Some(upper) if sorted.len() % 2 == 1 => *upper,
        Some(upper) => f64::midpoint(sorted[half - 1], *upper),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_nothing() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_disturbed_pair_does_not_move_the_ratio() {
        let mut pairs = PairedSamples::default();
        for slow in [1.0, 10.0, 1.0, 7.0, 1.0] {
            pairs.push(slow, 2.0 * slow);
        }
        let row = pairs.row("c", "ns", Better::Lower, "p");
        assert_eq!((row.ours, row.peer, row.ratio), (1.0, 2.0, 2.0));
    }

    #[test]
    fn the_sides_take_turns_and_the_first_pair_is_not_counted() {
        let order = std::cell::RefCell::new(String::new());
        let call = |c: char| {
            order.borrow_mut().push(c);
            Ok(f64::from(u32::try_from(order.borrow().len()).unwrap()))
        };
        let pairs = PairedSamples::measure_in_turns(2, || call('A'), || call('B')).unwrap();
        assert_eq!(*order.borrow(), "ABABAB");
        assert_eq!(pairs.ours, [3.0, 5.0]);
        assert_eq!(pairs.peer, [4.0, 6.0]);
    }
}
