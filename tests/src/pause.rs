//! How long a handover paused the devices, by the log of the daemon that handed them over.

use std::time::Duration;

use anyhow::{Context, Result};

/// How long the devices were paused by the log of a daemon that has handed them over.
///
/// # Errors
/// When the log does not say so.
pub fn pause_in_log(log: &str) -> Result<Duration> {
    let text = log.split("they were paused for ").nth(1);
    let text = text.and_then(|text| text.lines().next());
    parse_duration(text.with_context(|| format!("no pause in the log: {log}"))?)
}

/// A duration as Rust's `Debug` writes it, in microseconds, milliseconds or seconds.
fn parse_duration(text: &str) -> Result<Duration> {
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(number_end.context("a duration has a unit")?);
    let number: f64 = number.parse()?;
    let seconds = match unit {
        "µs" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        other => anyhow::bail!("unknown unit {other}"),
    };
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_is_found_in_each_unit() {
        for (text, want) in [
            ("812.5µs", Duration::from_nanos(812_500)),
            ("3.1ms", Duration::from_micros(3100)),
            ("1.5s", Duration::from_millis(1500)),
        ] {
            let log = format!("before\nthey were paused for {text}\nafter");
            assert_eq!(pause_in_log(&log).unwrap(), want);
        }
        assert!(pause_in_log("no handover").is_err());
    }
}
