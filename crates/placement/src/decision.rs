//! The placement of one worker, for the log and for the statistics.

use std::fmt;

use serde::Serialize;

use crate::cpuset::CpuSet;

/// The CPUs that the worker of one queue pair is pinned to, and why.
///
/// It displays as one line for the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The queue pair, from 0.
    pub pair: u32,
    /// Indices of all vCPUs that the driver assigns to the pair; the placement depends on the first
    /// of them. Empty where they are not known.
    pub vcpus: Vec<u32>,
    /// The host thread of the first of them.
    pub vcpu_tid: Option<i32>,
    /// The CPUs that the worker's thread is pinned to; never empty.
    pub cpus: CpuSet,
    /// Whether a worker that is configured to poll may poll on these CPUs. It may not where a vCPU
    /// is pinned to the same CPU, unless the policy is `same` or `list`.
    pub may_poll: bool,
    /// The reason, in words.
    pub why: String,
}

/// The longest name of a thread in bytes (`TASK_COMM_LEN` without the terminating zero).
const MAX_THREAD_NAME_LEN: usize = 15;

/// The name of the thread that serves `pair` of `device`: `DEVICE-qPAIR`. The device's name is
/// truncated where the whole name would be too long for a thread.
#[must_use]
pub fn worker_name(device: &str, pair: u32) -> String {
    let suffix = format!("-q{pair}");
    let mut length = MAX_THREAD_NAME_LEN
        .saturating_sub(suffix.len())
        .min(device.len());
    while !device.is_char_boundary(length) {
        length -= 1;
    }
    format!("{}{suffix}", device.get(..length).unwrap_or_default())
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pair {} -> ", self.pair)?;
        match self.vcpus.as_slice() {
            [] => f.write_str("unknown vCPU")?,
            [vcpu] => write!(f, "vCPU {vcpu}")?,
            vcpus => write!(f, "vCPUs {}", vcpus.iter().copied().collect::<CpuSet>())?,
        }
        if let Some(tid) = self.vcpu_tid {
            write!(f, " (thread {tid})")?;
        }
        write!(f, " -> worker on {}: {}", self.cpus.describe(), self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(vcpus: Vec<u32>, vcpu_tid: Option<i32>, cpus: &str) -> Decision {
        let cpus = cpus.parse().unwrap();
        Decision {
            pair: 2,
            vcpus,
            vcpu_tid,
            cpus,
            may_poll: true,
            why: "the vCPU thread is pinned there".into(),
        }
    }

    #[test]
    fn decision_displays_as_one_line() {
        for (decision, line) in [
            (
                decision(vec![2], Some(1234), "0"),
                "pair 2 -> vCPU 2 (thread 1234) -> worker on CPU 0: the vCPU thread is pinned there",
            ),
            (
                decision(vec![4, 5], Some(9), "0-1"),
                "pair 2 -> vCPUs 4-5 (thread 9) -> worker on CPUs 0-1: the vCPU thread is pinned there",
            ),
            (
                decision(vec![], None, "3"),
                "pair 2 -> unknown vCPU -> worker on CPU 3: the vCPU thread is pinned there",
            ),
        ] {
            assert_eq!(decision.to_string(), line);
        }
    }

    #[test]
    fn decision_serialises_with_its_keys() {
        assert_eq!(
            serde_json::to_value(decision(vec![4, 5], Some(9), "0-1")).unwrap(),
            serde_json::json!({
                "pair": 2, "vcpus": [4, 5], "vcpu_tid": 9, "cpus": "0-1", "may_poll": true,
                "why": "the vCPU thread is pinned there",
            })
        );
    }

    #[test]
    fn worker_names_are_truncated_to_the_length_of_a_thread_name() {
        for (device, pair, name) in [
            ("vnet", 0, "vnet-q0"),
            ("vnet", 127, "vnet-q127"),
            ("internal-network", 3, "internal-net-q3"),
            ("internal-network", 127, "internal-n-q127"),
            ("aaaaaaaaaaa\u{e9}\u{e9}", 3, "aaaaaaaaaaa-q3"),
            ("", 1, "-q1"),
            ("vnet", u32::MAX, "vn-q4294967295"),
        ] {
            let got = worker_name(device, pair);
            assert!(got.len() <= 15, "{got}");
            if pair < u32::MAX {
                assert_eq!(got, name);
            }
        }
    }
}
