//! What is wrong with where a guest's vCPUs and workers stand: one sentence each,
//! with the remedy.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::cpuset::CpuSet;

/// Something an administrator should know or mend.
///
/// Displays, and serialises, as its sentence. Two of one [`kind`](Warning::kind)
/// that are not equal tell that something changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// No vCPU thread was found.
    Unknown {
        /// What was tried, and the remedy.
        why: String,
    },
    /// vCPUs are not pinned.
    Floating {
        /// Their indices.
        vcpus: CpuSet,
        /// The CPUs that they float over.
        over: CpuSet,
        /// The thread of the first of them.
        tid: i32,
    },
    /// vCPUs are pinned to CPUs where the daemon may not run.
    Outside {
        /// Their indices.
        vcpus: CpuSet,
        /// Where they are pinned.
        on: CpuSet,
        /// Where the daemon may run.
        allowed: CpuSet,
    },
    /// vCPUs are pinned to CPUs that are all offline.
    VcpusOffline {
        /// Their indices.
        vcpus: CpuSet,
        /// The CPUs.
        on: CpuSet,
    },
    /// Workers that should poll share their CPU with a pinned vCPU, and sleep.
    NoPolling {
        /// Their queue pairs.
        pairs: CpuSet,
        /// Where they stand.
        on: CpuSet,
    },
    /// Workers stand on another NUMA node than the vCPU that they serve.
    RemoteVcpus {
        /// Their queue pairs.
        pairs: CpuSet,
        /// Where they stand.
        on: CpuSet,
        /// Where their vCPUs are.
        vcpus_on: CpuSet,
    },
    /// Workers stand on another NUMA node than their rings in the guest's memory.
    RemoteMemory {
        /// Their queue pairs.
        pairs: CpuSet,
        /// Where they stand.
        on: CpuSet,
        /// The nodes of their rings.
        nodes: CpuSet,
    },
    /// Several workers have to share a CPU.
    FewCpus {
        /// Number of workers.
        workers: usize,
        /// Where they stand.
        on: CpuSet,
    },
    /// CPUs of the list that was given are offline.
    ListOffline {
        /// They.
        cpus: CpuSet,
    },
    /// CPUs of the list that was given are no longer allowed.
    ListOutside {
        /// They.
        cpus: CpuSet,
        /// What is allowed.
        allowed: CpuSet,
    },
}

/// What a [`Warning`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WarningKind(std::mem::Discriminant<Warning>);

impl Warning {
    /// What it is about, whatever its particulars.
    #[must_use]
    pub fn kind(&self) -> WarningKind {
        WarningKind(std::mem::discriminant(self))
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { why } => write!(f, "workers cannot follow the vCPUs: {why}"),
            Self::Floating { vcpus, over, tid } => write!(
                f,
                "{} not pinned and may run on {}, so no worker can stay beside its vCPU: pin each vCPU \
                 to a CPU of its own with virsh vcpupin GUEST VCPU CPU, or taskset -pc CPU THREAD (the first is thread {tid})",
                subject("vCPU", vcpus),
                over.describe()
            ),
            Self::Outside { vcpus, on, allowed } => write!(
                f,
                "{} pinned to {}, where this daemon, on {}, may not run: widen the daemon's cpuset \
                 or start it with taskset, or pin the guest inside it",
                subject("vCPU", vcpus),
                on.describe(),
                allowed.describe()
            ),
            Self::VcpusOffline { vcpus, on } => write!(
                f,
                "{} pinned to {}, which {} offline: pin them elsewhere or bring it back",
                subject("vCPU", vcpus),
                on.describe(),
                if on.len() == 1 { "is" } else { "are" }
            ),
            Self::NoPolling { pairs, on } => write!(
                f,
                "{} sharing {} with pinned vCPUs and will sleep instead of polling: give the daemon \
                 CPUs near the guest that no vCPU is pinned to, or force it with --placement=same or list:CPUS",
                subject("worker", pairs),
                on.describe()
            ),
            Self::RemoteVcpus {
                pairs,
                on,
                vcpus_on,
            } => write!(
                f,
                "{} on {}, on another NUMA node than the vCPUs on {}: give the daemon CPUs of that node",
                subject("worker", pairs),
                on.describe(),
                vcpus_on.describe()
            ),
            Self::RemoteMemory { pairs, on, nodes } => write!(
                f,
                "{} on {}, on another NUMA node than the guest's memory (node {nodes}): keep guest and \
                 daemon on one node, with numactl or libvirt's numatune",
                subject("worker", pairs),
                on.describe()
            ),
            Self::FewCpus { workers, on } => write!(
                f,
                "{workers} workers share {}: give the daemon more CPUs or the guest fewer queue pairs",
                on.describe()
            ),
            Self::ListOffline { cpus } => write!(
                f,
                "{} of the placement list {} offline, so others stand in: bring it online or list others",
                cpus.describe(),
                if cpus.len() == 1 { "is" } else { "are" }
            ),
            Self::ListOutside { cpus, allowed } => write!(
                f,
                "{} of the placement list {} no longer in the daemon's cpuset, {}, so others stand in: \
                 widen it or list others",
                cpus.describe(),
                if cpus.len() == 1 { "is" } else { "are" },
                allowed.describe()
            ),
        }
    }
}

/// `vCPU 3 is`, `workers 0-2 are`.
fn subject(what: &str, numbers: &CpuSet) -> String {
    match numbers.len() {
        1 => format!("{what} {numbers} is"),
        _ => format!("{what}s {numbers} are"),
    }
}

impl Serialize for Warning {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_one_sentence_with_its_remedy() {
        let set = |list: &str| list.parse::<CpuSet>().unwrap();
        let all = [
            (
                Warning::Unknown {
                    why: "no name: give one".into(),
                },
                "workers cannot follow the vCPUs: no name: give one",
            ),
            (
                Warning::Floating {
                    vcpus: set("0-3"),
                    over: set("0-7"),
                    tid: 99,
                },
                "vCPUs 0-3 are not pinned and may run on CPUs 0-7, so no worker can stay beside its vCPU: \
                 pin each vCPU to a CPU of its own with virsh vcpupin GUEST VCPU CPU, or \
                 taskset -pc CPU THREAD (the first is thread 99)",
            ),
            (
                Warning::Outside {
                    vcpus: set("1"),
                    on: set("8"),
                    allowed: set("0-3"),
                },
                "vCPU 1 is pinned to CPU 8, where this daemon, on CPUs 0-3, may not run: widen the \
                 daemon's cpuset or start it with taskset, or pin the guest inside it",
            ),
            (
                Warning::VcpusOffline {
                    vcpus: set("1"),
                    on: set("3"),
                },
                "vCPU 1 is pinned to CPU 3, which is offline: pin them elsewhere or bring it back",
            ),
            (
                Warning::NoPolling {
                    pairs: set("0-1"),
                    on: set("2-3"),
                },
                "workers 0-1 are sharing CPUs 2-3 with pinned vCPUs and will sleep instead of polling: \
                 give the daemon CPUs near the guest that no vCPU is pinned to, or force it with \
                 --placement=same or list:CPUS",
            ),
            (
                Warning::RemoteVcpus {
                    pairs: set("0"),
                    on: set("9"),
                    vcpus_on: set("1"),
                },
                "worker 0 is on CPU 9, on another NUMA node than the vCPUs on CPU 1: give the daemon \
                 CPUs of that node",
            ),
            (
                Warning::RemoteMemory {
                    pairs: set("0,2"),
                    on: set("9"),
                    nodes: set("0"),
                },
                "workers 0,2 are on CPU 9, on another NUMA node than the guest's memory (node 0): \
                 keep guest and daemon on one node, with numactl or libvirt's numatune",
            ),
            (
                Warning::FewCpus {
                    workers: 4,
                    on: set("0-1"),
                },
                "4 workers share CPUs 0-1: give the daemon more CPUs or the guest fewer queue pairs",
            ),
            (
                Warning::ListOffline { cpus: set("3") },
                "CPU 3 of the placement list is offline, so others stand in: bring it online or list others",
            ),
            (
                Warning::ListOutside {
                    cpus: set("2-3"),
                    allowed: set("0"),
                },
                "CPUs 2-3 of the placement list are no longer in the daemon's cpuset, CPU 0, so others \
                 stand in: widen it or list others",
            ),
        ];
        let mut kinds = Vec::new();
        for (warning, sentence) in all {
            assert_eq!(warning.to_string(), sentence);
            assert_eq!(serde_json::to_value(&warning).unwrap(), sentence);
            assert!(!kinds.contains(&warning.kind()), "{warning:?}");
            kinds.push(warning.kind());
        }
    }
}
