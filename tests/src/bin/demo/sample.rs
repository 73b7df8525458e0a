//! What the control socket says about the queue pairs, read once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use virtionet_tests::daemon::Daemon;

/// Frames and bytes of one ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCount {
    /// Ethernet frames.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl FrameCount {
    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            frames: self.frames.saturating_sub(before.frames),
            bytes: self.bytes.saturating_sub(before.bytes),
        }
    }

    /// The rate over `time`, in Gbit/s.
    pub fn gbps(self, time: Duration) -> f64 {
        if time.is_zero() {
            return 0.0;
        }
        // Exact up to 2^53 bytes, which is 9 petabytes.
        self.bytes as f64 * 8.0 / 1e9 / time.as_secs_f64()
    }
}

/// One queue pair.
#[derive(Clone, Debug)]
pub struct PairSample {
    /// Its worker's name.
    pub worker: String,
    /// Its worker's thread.
    pub tid: i32,
    /// Why the worker stands where it does.
    pub placement: String,
    /// To the guest.
    pub rx: FrameCount,
    /// From the guest.
    pub tx: FrameCount,
}

/// All pairs at one moment.
#[derive(Clone, Debug)]
pub struct CounterSample {
    /// When.
    pub at: Instant,
    /// By number.
    pub pairs: Vec<PairSample>,
}

impl CounterSample {
    /// Asks the daemon.
    ///
    /// # Errors
    /// When it does not answer, or not in the known shape.
    pub fn read(daemon: &Daemon) -> Result<Self> {
        let device = daemon.device()?;
        let pairs = device["pairs"]
            .as_array()
            .context("the daemon's device has no pairs")?
            .iter()
            .map(pair)
            .collect::<Result<_>>()?;
        Ok(Self {
            at: Instant::now(),
            pairs,
        })
    }
}

fn pair(value: &Value) -> Result<PairSample> {
    let tid = value["tid"].as_i64().unwrap_or(0);
    Ok(PairSample {
        worker: text(&value["worker"]),
        tid: i32::try_from(tid)?,
        placement: text(&value["placement"]),
        rx: count(&value["rx"]["counters"])?,
        tx: count(&value["tx"]["counters"])?,
    })
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn count(value: &Value) -> Result<FrameCount> {
    let one = |name: &str| {
        value[name]
            .as_u64()
            .with_context(|| format!("a ring has no counter '{name}'"))
    };
    Ok(FrameCount {
        frames: one("frames")?,
        bytes: one("bytes")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_bits_over_time() {
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
        let added = after.since(before);
        assert_eq!(added.frames, 2);
        assert!((added.gbps(Duration::from_secs(2)) - 1.0).abs() < 1e-9);
        assert!(added.gbps(Duration::ZERO) < 1e-9);
    }
}
