//! The durations of many round trips.

use std::time::Duration;

/// Durations of one kind, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Distribution {
    sorted: Vec<Duration>,
}

impl Distribution {
    /// Returns the distribution of `durations`, or `None` if there are none.
    #[must_use]
    pub fn new(mut durations: Vec<Duration>) -> Option<Self> {
        durations.sort_unstable();
        (!durations.is_empty()).then_some(Self { sorted: durations })
    }

    /// Returns the shortest time, in microseconds, within which `per_mille` of 1,000 end.
    #[must_use]
    pub fn microseconds(&self, per_mille: usize) -> f64 {
        let count = (self.sorted.len() * per_mille).div_ceil(1000);
        let index = count.clamp(1, self.sorted.len()) - 1;
        self.sorted[index].as_secs_f64() * 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_of_a_thousand_end_within_that_time() {
        let durations = (1..=100).rev().map(Duration::from_micros).collect();
        let hundred = Distribution::new(durations).unwrap();
        let figures = [0, 500, 990, 999, 1000].map(|per_mille| hundred.microseconds(per_mille));
        assert_eq!(figures, [1.0, 50.0, 99.0, 100.0, 100.0]);
        let one = Distribution::new(vec![Duration::from_micros(7)]).unwrap();
        assert_eq!(one.microseconds(500), 7.0);
    }

    #[test]
    fn no_durations_have_no_distribution() {
        assert_eq!(Distribution::new(Vec::new()), None);
    }
}
