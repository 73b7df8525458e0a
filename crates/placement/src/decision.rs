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
    /// The reason, in words.
    pub why: String,
}

/// Name of the thread that serves `pair`; fits the kernel's 15 bytes for every
/// pair vhost-user can address.
#[must_use]
pub fn worker_name(pair: u32) -> String {
    format!("vnet-q{pair}")
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
        write!(
            f,
            " -> worker {} on {}: {}",
            worker_name(self.pair),
            self.cpus.words(),
            self.why
        )
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
            why: "vCPU thread pinned there".into(),
        }
    }

    #[test]
    fn reads_as_one_line() {
        for (decision, line) in [
            (
                decision(vec![2], Some(1234), "0"),
                "pair 2 -> vCPU 2 (thread 1234) -> worker vnet-q2 on CPU 0: vCPU thread pinned there",
            ),
            (
                decision(vec![4, 5], Some(9), "0-1"),
                "pair 2 -> vCPUs 4-5 (thread 9) -> worker vnet-q2 on CPUs 0-1: vCPU thread pinned there",
            ),
            (
                decision(vec![], None, "3"),
                "pair 2 -> unknown vCPU -> worker vnet-q2 on CPU 3: vCPU thread pinned there",
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
                "pair": 2, "vcpus": [4, 5], "vcpu_tid": 9, "cpus": "0-1", "why": "vCPU thread pinned there",
            })
        );
    }

    #[test]
    fn the_last_worker_name_fits_a_thread_name() {
        assert!(worker_name(127).len() <= 15);
    }
}
