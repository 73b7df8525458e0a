//! The daemon's account of its queue pairs, as `GET /v1/devices` gives it.

use anyhow::{Context, Result};
use serde_json::Value;

/// What one ring did up to a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounters {
    /// Whether the driver uses it.
    pub enabled: bool,
    /// Frames carried.
    pub frames: u64,
    /// Bytes of those, without the virtio-net header.
    pub bytes: u64,
    /// TX frames discarded because the ring was disabled.
    pub dropped_disabled: u64,
}

/// A queue pair and its worker at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairCounters {
    /// The worker thread's name.
    pub worker: String,
    /// The worker's thread id; 0 while there is none.
    pub tid: i32,
    /// The CPUs that the worker may run on.
    pub cpus: Vec<usize>,
    /// The vCPUs that the worker serves.
    pub vcpus: Vec<usize>,
    /// To the guest.
    pub rx: RingCounters,
    /// From the guest.
    pub tx: RingCounters,
}

/// The pairs of `device`, an element of `devices`, by number.
///
/// # Errors
/// When the JSON has another shape than documented.
pub fn pairs(device: &Value) -> Result<Vec<PairCounters>> {
    let pairs = device["pairs"].as_array();
    let pairs = pairs.with_context(|| format!("no pairs in {device}"))?;
    pairs
        .iter()
        .map(|pair| read(pair).with_context(|| format!("a pair without all its fields: {pair}")))
        .collect()
}

fn read(pair: &Value) -> Option<PairCounters> {
    Some(PairCounters {
        worker: pair["worker"].as_str()?.to_owned(),
        tid: i32::try_from(pair["tid"].as_i64().unwrap_or(0)).ok()?,
        cpus: numbers(&pair["cpus"])?,
        vcpus: numbers(&pair["vcpus"])?,
        rx: ring(&pair["rx"])?,
        tx: ring(&pair["tx"])?,
    })
}

fn ring(ring: &Value) -> Option<RingCounters> {
    let counters = &ring["counters"];
    Some(RingCounters {
        enabled: ring["enabled"].as_bool()?,
        frames: counters["frames"].as_u64()?,
        bytes: counters["bytes"].as_u64()?,
        dropped_disabled: counters["dropped_disabled"].as_u64()?,
    })
}

fn numbers(list: &Value) -> Option<Vec<usize>> {
    let numbers = list.as_array()?.iter();
    numbers.map(|n| usize::try_from(n.as_u64()?).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pair_is_read_and_a_missing_field_is_an_error() {
        let ring = json!({"enabled": true, "counters": {"frames": 3, "bytes": 180, "dropped_disabled": 1}});
        let pair = json!({"worker": "vnet-q0", "tid": 9, "cpus": [1], "vcpus": [0, 1], "rx": ring, "tx": ring});
        let mut device = json!({ "pairs": [pair] });
        let read = &pairs(&device).unwrap()[0];
        assert_eq!((read.tid, &read.vcpus[..]), (9, &[0, 1][..]));
        assert_eq!((read.tx.frames, read.rx.dropped_disabled), (3, 1));
        device["pairs"][0]["rx"]["counters"]["frames"] = Value::Null;
        assert!(pairs(&device).is_err());
        assert!(pairs(&json!({})).is_err());
    }
}
