//! The state and the counters of a device's queue pairs, read from `GET /v1/devices`.

use anyhow::{Context, Result};
use serde_json::Value;

/// The counters of one ring at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounters {
    /// Whether the driver has enabled the ring.
    pub enabled: bool,
    /// The number of frames that the ring has carried.
    pub frames: u64,
    /// The number of bytes of these frames, without the virtio-net header.
    pub bytes: u64,
    /// The number of TX frames that were discarded because the ring was disabled.
    pub dropped_disabled: u64,
}

/// A queue pair and its worker at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairCounters {
    /// The name of the worker thread.
    pub worker: String,
    /// The thread id of the worker, or 0 while the pair has no worker.
    pub tid: i32,
    /// The CPUs that the worker may run on.
    pub cpus: Vec<usize>,
    /// The vCPUs that the worker serves.
    pub vcpus: Vec<usize>,
    /// The counters of the receiveq: frames to the guest.
    pub rx: RingCounters,
    /// The counters of the transmitq: frames from the guest.
    pub tx: RingCounters,
}

/// Returns the queue pairs of `device`, which is an element of `devices`, in the order of their
/// numbers.
///
/// # Errors
/// When the JSON lacks a documented field, or a field has another type.
pub fn pairs(device: &Value) -> Result<Vec<PairCounters>> {
    let pairs = device["pairs"].as_array();
    let pairs = pairs.with_context(|| format!("this device has no list of pairs: {device}"))?;
    pairs
        .iter()
        .map(|pair| {
            parse_pair(pair).with_context(|| {
                format!("a field of this queue pair is missing or invalid: {pair}")
            })
        })
        .collect()
}

fn parse_pair(pair: &Value) -> Option<PairCounters> {
    Some(PairCounters {
        worker: pair["worker"].as_str()?.to_owned(),
        tid: i32::try_from(pair["tid"].as_i64().unwrap_or(0)).ok()?,
        cpus: parse_numbers(&pair["cpus"])?,
        vcpus: parse_numbers(&pair["vcpus"])?,
        rx: parse_ring(&pair["rx"])?,
        tx: parse_ring(&pair["tx"])?,
    })
}

fn parse_ring(ring: &Value) -> Option<RingCounters> {
    let counters = &ring["counters"];
    Some(RingCounters {
        enabled: ring["enabled"].as_bool()?,
        frames: counters["frames"].as_u64()?,
        bytes: counters["bytes"].as_u64()?,
        dropped_disabled: counters["dropped_disabled"].as_u64()?,
    })
}

fn parse_numbers(list: &Value) -> Option<Vec<usize>> {
    let numbers = list.as_array()?.iter();
    numbers.map(|n| usize::try_from(n.as_u64()?).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn complete_pair_is_parsed_and_missing_field_is_an_error() {
        let ring = json!({"enabled": true, "counters": {"frames": 3, "bytes": 180, "dropped_disabled": 1}});
        let pair = json!({"worker": "vnet-q0", "tid": 9, "cpus": [1], "vcpus": [0, 1], "rx": ring, "tx": ring});
        let mut device = json!({ "pairs": [pair] });
        let parsed = &pairs(&device).unwrap()[0];
        assert_eq!((parsed.tid, &parsed.vcpus[..]), (9, &[0, 1][..]));
        assert_eq!((parsed.tx.frames, parsed.rx.dropped_disabled), (3, 1));
        device["pairs"][0]["rx"]["counters"]["frames"] = Value::Null;
        assert!(pairs(&device).is_err());
        assert!(pairs(&json!({})).is_err());
    }
}
