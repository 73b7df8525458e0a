//! Measures two sides in turns: A B A B. A disturbance that lasts longer than a pair of samples
//! affects both of them. Therefore the spread of the ratios of the pairs shows how reliable a
//! difference between the two medians is.

use anyhow::Result;

use crate::outcome::{Better, Row, Spread};

/// How thoroughly to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// Enough repetitions for reliable figures.
    Full,
    /// Few repetitions, which show only that everything runs.
    Quick,
}

impl Effort {
    /// Returns `full` or `quick`, depending on the effort.
    #[must_use]
    pub fn choose<T>(self, full: T, quick: T) -> T {
        match self {
            Self::Full => full,
            Self::Quick => quick,
        }
    }
}

/// Samples of both sides, measured in turns. Samples with the same index form a pair.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PairedSamples {
    ours: Vec<f64>,
    peer: Vec<f64>,
}

impl PairedSamples {
    /// Measures `count` pairs, after a first pair that warms up the caches and is not counted.
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

    /// Adds a pair of samples.
    pub fn push(&mut self, ours: f64, peer: f64) {
        self.ours.push(ours);
        self.peer.push(peer);
    }

    /// Returns a row of the medians of both sides, with the range of the ratios of the pairs.
    #[must_use]
    pub fn row(&self, case: &str, unit: &str, better: Better, peer_name: &str) -> Row {
        let peer = (peer_name, median(&self.peer));
        Row {
            spread: self.spread(better),
            ..Row::new(case, unit, better, median(&self.ours), peer)
        }
    }

    /// Returns the range of the ratios of the pairs, or `None` if there are fewer than two pairs.
    #[must_use]
    pub fn spread(&self, better: Better) -> Option<Spread> {
        let pairs = self.ours.iter().zip(&self.peer);
        let ratios = pairs.map(|(ours, peer)| better.ratio(*ours, *peer));
        (self.ours.len() > 1).then(|| Spread {
            lower: ratios.clone().fold(f64::INFINITY, f64::min),
            upper: ratios.fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

/// Returns the median of `values`, or NaN if there are none.
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
    use virtionet_tests::random::Random;

    use super::*;

    #[test]
    fn median_of_odd_even_and_no_values_is_the_middle_or_nan() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    fn pairs(samples: &[(f64, f64)]) -> PairedSamples {
        let mut pairs = PairedSamples::default();
        for (ours, peer) in samples {
            pairs.push(*ours, *peer);
        }
        pairs
    }

    #[test]
    fn disturbed_pair_does_not_change_the_ratio() {
        let disturbed = [1.0, 10.0, 1.0, 7.0, 1.0].map(|slow| (slow, 2.0 * slow));
        let row = pairs(&disturbed).row("c", "ns", Better::Lower, "p");
        assert_eq!((row.ours, row.peer, row.ratio()), (1.0, 2.0, 2.0));
        let spread = row.spread.unwrap();
        assert_eq!((spread.lower, spread.upper), (2.0, 2.0));
    }

    #[test]
    fn ratio_of_pairs_that_differ_is_that_of_the_medians_shown() {
        // The median of the ratios is 2, but the ratio of the medians is 1.
        let samples = [(1.0, 2.0), (2.0, 4.0), (3.0, 1.0), (4.0, 3.0), (5.0, 10.0)];
        let row = pairs(&samples).row("c", "Gbit/s", Better::Higher, "p");
        assert_eq!((row.ours, row.peer, row.ratio()), (3.0, 3.0, 1.0));
        let spread = row.spread.unwrap();
        assert_eq!((spread.lower, spread.upper), (0.5, 3.0));
    }

    #[test]
    fn ratio_is_within_its_range_for_all_samples() {
        let mut random = Random::new(1, 0);
        for pair_count in 2..9 {
            for _ in 0..200 {
                let mut sample = || random.pick(&[1.0, 2.0, 3.0, 5.0, 8.0]);
                let samples: Vec<_> = (0..pair_count).map(|_| (sample(), sample())).collect();
                for better in [Better::Lower, Better::Higher] {
                    let row = pairs(&samples).row("c", "ns", better, "p");
                    let Spread { lower, upper } = row.spread.unwrap();
                    let ratio = row.ratio();
                    // The last bit may differ, because the two are rounded differently.
                    let error = 1e-9 * ratio;
                    assert!(
                        (lower - error..=upper + error).contains(&ratio),
                        "{samples:?}: {ratio}"
                    );
                }
            }
        }
    }

    #[test]
    fn spread_of_one_pair_is_absent() {
        assert_eq!(pairs(&[(1.0, 2.0)]).spread(Better::Lower), None);
        assert_eq!(pairs(&[]).spread(Better::Lower), None);
    }

    #[test]
    fn sides_are_measured_in_turns_and_the_first_pair_is_not_counted() {
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
