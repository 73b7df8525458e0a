//! A sample of the queue pairs' counters, read from the control socket.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use virtionet_tests::daemon::Daemon;

/// The number of frames and bytes of one ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCount {
    /// The number of Ethernet frames.
    pub frames: u64,
    /// The number of bytes of these frames.
    pub bytes: u64,
}

impl FrameCount {
    /// Returns the difference between these counters and the earlier counters `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            frames: self.frames.saturating_sub(before.frames),
            bytes: self.bytes.saturating_sub(before.bytes),
        }
    }

    /// Returns the rate during `time` in Gbit/s.
    pub fn gbps(self, time: Duration) -> f64 {
        if time.is_zero() {
            return 0.0;
        }
        // The conversion is exact up to 2^53 bytes, which is 9 petabytes.
        self.bytes as f64 * 8.0 / 1e9 / time.as_secs_f64()
    }
}

/// A queue pair at the time of a sample.
#[derive(Clone, Debug)]
pub struct PairSample {
    /// The name of the worker.
    pub worker: String,
    /// The thread id of the worker.
    pub tid: i32,
    /// The daemon's reason for the worker's placement.
    pub placement: String,
    /// The frames to the guest.
    pub rx: FrameCount,
    /// The frames from the guest.
    pub tx: FrameCount,
}

/// All queue pairs at one moment.
#[derive(Clone, Debug)]
pub struct CounterSample {
    /// The time of the sample.
    pub at: Instant,
    /// The queue pairs, in the order of their numbers.
    pub pairs: Vec<PairSample>,
}

impl CounterSample {
    /// Reads the counters from the daemon.
    ///
    /// # Errors
    /// When the daemon does not answer, or its response lacks a documented field.
    pub fn read(daemon: &Daemon) -> Result<Self> {
        let device = daemon.device()?;
        let pairs = device["pairs"]
            .as_array()
            .context("the daemon's device has no list of pairs")?
            .iter()
            .map(parse_pair)
            .collect::<Result<_>>()?;
        Ok(Self {
            at: Instant::now(),
            pairs,
        })
    }
}

fn parse_pair(value: &Value) -> Result<PairSample> {
    let tid = value["tid"].as_i64().unwrap_or(0);
    Ok(PairSample {
        worker: to_text(&value["worker"]),
        tid: i32::try_from(tid)?,
        placement: to_text(&value["placement"]),
        rx: parse_counters(&value["rx"]["counters"])?,
        tx: parse_counters(&value["tx"]["counters"])?,
    })
}

fn to_text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn parse_counters(value: &Value) -> Result<FrameCount> {
    let counter = |name: &str| {
        value[name]
            .as_u64()
            .with_context(|| format!("a ring has no counter '{name}'"))
    };
    Ok(FrameCount {
        frames: counter("frames")?,
        bytes: counter("bytes")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_bits_divided_by_time_and_zero_without_time() {
        let (before, after) = (
            FrameCount {
                frames: 1,
                bytes: 1000,
            },
            FrameCount {
                frames: 3,
                bytes: 250_001_000,
            },
        );
        let difference = after.since(before);
        assert_eq!(difference.frames, 2);
        assert!((difference.gbps(Duration::from_secs(2)) - 1.0).abs() < 1e-9);
        assert!(difference.gbps(Duration::ZERO) < 1e-9);
    }
}
