//! Quantiles of measured times.

use std::time::Duration;

/// The value that the share `part` of `values` does not exceed; 1 is the longest one. Zero if there
/// are none. It sorts the values.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "the rank of a value in a list that is in memory"
)]
pub fn quantile(values: &mut [Duration], part: f64) -> Duration {
    values.sort_unstable();
    let rank = (values.len() as f64 * part).ceil() as usize;
    let index = rank.clamp(1, values.len().max(1)) - 1;
    values.get(index).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantile_is_a_value_of_the_list() {
        let mut values: Vec<_> = (1..=200).rev().map(Duration::from_millis).collect();
        let mut of = |part| quantile(&mut values, part).as_millis();
        assert_eq!([of(0.0), of(0.5), of(0.99), of(1.0)], [1, 100, 198, 200]);
        assert_eq!(quantile(&mut [], 0.5), Duration::ZERO);
    }
}
