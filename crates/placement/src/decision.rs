//! A placement decision, for the log and for the statistics.

use std::fmt;

use serde::Serialize;

use crate::cpuset::CpuSet;

/// Where the worker of one queue pair stands, and why.
///
/// Displays as one line for the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The queue pair, from 0.
    pub pair: u32,
    /// Indices of all vCPUs that the driver gives to the pair, the one followed
    /// first; empty where they are not known.
    pub vcpus: Vec<u32>,
    /// Host thread of the first of them.
    pub vcpu_tid: Option<i32>,
    /// The CPUs for the worker's thread; never empty.
    pub cpus: CpuSet,
    /// Whether a worker that is told to poll may do so there: not beside a vCPU
    /// that is pinned to the same CPU, unless the policy was told to put it there.
    pub may_poll: bool,
    /// The reason, in words.
    pub why: String,
}

/// Longest name of a thread, in bytes (TASK_COMM_LEN without its end).
const MAX_THREAD_NAME_LEN: usize = 15;

/// Name of the thread that serves `pair` of `device`: `DEVICE-qPAIR`, with the
/// device's name cut where the whole would be longer than a thread's name may
/// be.
#[must_use]
pub fn worker_name(device: &str, pair: u32) -> String {
    let end = format!("-q{pair}");
    let mut length = MAX_THREAD_NAME_LEN
        .saturating_sub(end.len())
        .min(device.len());
    while !device.is_char_boundary(length) {
        length -= 1;
    }
    format!("{}{end}", device.get(..length).unwrap_or_default())
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
            why: "vCPU thread pinned there".into(),
        }
    }

    #[test]
    fn reads_as_one_line() {
        for (decision, line) in [
            (
                decision(vec![2], Some(1234), "0"),
                "pair 2 -> vCPU 2 (thread 1234) -> worker on CPU 0: vCPU thread pinned there",
            ),
            (
                decision(vec![4, 5], Some(9), "0-1"),
                "pair 2 -> vCPUs 4-5 (thread 9) -> worker on CPUs 0-1: vCPU thread pinned there",
            ),
            (
                decision(vec![], None, "3"),
                "pair 2 -> unknown vCPU -> worker on CPU 3: vCPU thread pinned there",
            ),
        ] {
            assert_eq!(decision.to_string(), line);
        }
    }

    #[test]
    fn serialises_for_the_statistics() {
        assert_eq!(
            serde_json::to_value(decision(vec![4, 5], Some(9), "0-1")).unwrap(),
            serde_json::json!({
                "pair": 2, "vcpus": [4, 5], "vcpu_tid": 9, "cpus": "0-1", "may_poll": true,
                "why": "vCPU thread pinned there",
            })
        );
    }

    #[test]
    fn worker_names_fit_a_threads_name() {
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
