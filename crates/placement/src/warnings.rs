//! Warnings about the placement of a guest's vCPUs and workers: one sentence each, with what to do.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::cpuset::CpuSet;

/// A problem with the placement that an administrator can solve.
///
/// It displays and serialises as one sentence. Two unequal warnings of the same
/// [`kind`](Warning::kind) mean that the problem has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// No vCPU thread was found.
    Unknown {
        /// What failed, and what to do.
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
    /// vCPUs are pinned to CPUs that the daemon may not run on.
    Outside {
        /// Their indices.
        vcpus: CpuSet,
        /// The CPUs that they are pinned to.
        on: CpuSet,
        /// The CPUs that the daemon may run on.
        allowed: CpuSet,
    },
    /// vCPUs are pinned to CPUs that are all offline.
    VcpusOffline {
        /// Their indices.
        vcpus: CpuSet,
        /// The CPUs.
        on: CpuSet,
    },
    /// Workers that are configured to poll sleep, because a vCPU is pinned to their CPU.
    NoPolling {
        /// Their queue pairs.
        pairs: CpuSet,
        /// The CPUs of these workers.
        on: CpuSet,
    },
    /// Workers are on another NUMA node than the vCPU that they serve.
    RemoteVcpus {
        /// Their queue pairs.
        pairs: CpuSet,
        /// The CPUs of these workers.
        on: CpuSet,
        /// The CPUs of their vCPUs.
        vcpus_on: CpuSet,
    },
    /// Workers are on another NUMA node than their rings in the guest's memory.
    RemoteMemory {
        /// Their queue pairs.
        pairs: CpuSet,
        /// The CPUs of these workers.
        on: CpuSet,
        /// The NUMA nodes of their rings.
        nodes: CpuSet,
    },
    /// Several workers have to share a CPU.
    FewCpus {
        /// The number of workers.
        workers: usize,
        /// The CPUs of these workers.
        on: CpuSet,
    },
    /// CPUs of the policy's list are offline.
    ListOffline {
        /// These CPUs.
        cpus: CpuSet,
    },
    /// CPUs of the policy's list are no longer allowed.
    ListOutside {
        /// These CPUs.
        cpus: CpuSet,
        /// The CPUs that the daemon may run on.
        allowed: CpuSet,
    },
}

/// The kind of a [`Warning`], without its details.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WarningKind(std::mem::Discriminant<Warning>);

impl Warning {
    /// The kind of this warning.
    #[must_use]
    pub fn kind(&self) -> WarningKind {
        WarningKind(std::mem::discriminant(self))
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { why } => write!(f, "workers cannot be pinned near their vCPUs: {why}"),
            Self::Floating { vcpus, over, tid } => fmt_floating(f, vcpus, over, *tid),
            Self::Outside { vcpus, on, allowed } => fmt_outside(f, vcpus, on, allowed),
            Self::VcpusOffline { vcpus, on } => write!(
                f,
                "{} pinned to {}, which {} offline: pin the guest to other CPUs or bring {} online",
                subject("vCPU", vcpus),
                on.describe(),
                if on.len() == 1 { "is" } else { "are" },
                on.describe()
            ),
            Self::NoPolling { pairs, on } => fmt_no_polling(f, pairs, on),
            Self::RemoteVcpus {
                pairs,
                on,
                vcpus_on,
            } => write!(
                f,
                "{} on {}, not on the NUMA node of the vCPUs on {}: give the daemon CPUs of their node",
                subject("worker", pairs),
                on.describe(),
                vcpus_on.describe()
            ),
            Self::RemoteMemory { pairs, on, nodes } => write!(
                f,
                "{} on {}, not on the NUMA node of the guest's memory (node {nodes}): keep guest and \
                 daemon on one node with numactl or libvirt's numatune",
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
                "{} of the placement list {} offline, so workers run on other CPUs: bring {} online or list other CPUs",
                cpus.describe(),
                if cpus.len() == 1 { "is" } else { "are" },
                if cpus.len() == 1 { "it" } else { "them" }
            ),
            Self::ListOutside { cpus, allowed } => write!(
                f,
                "{} of the placement list {} no longer in the daemon's cpuset, {}, so workers run on other CPUs: \
                 widen the cpuset or list other CPUs",
                cpus.describe(),
                if cpus.len() == 1 { "is" } else { "are" },
                allowed.describe()
            ),
        }
    }
}

fn fmt_floating(
    f: &mut fmt::Formatter<'_>,
    vcpus: &CpuSet,
    over: &CpuSet,
    tid: i32,
) -> fmt::Result {
    write!(
        f,
        "{} not pinned and may run on {}, so workers cannot be pinned to their vCPUs' CPUs: pin each vCPU \
         to a CPU of its own with virsh vcpupin GUEST VCPU CPU, or taskset -pc CPU THREAD (the first is thread {tid})",
        subject("vCPU", vcpus),
        over.describe()
    )
}

fn fmt_outside(
    f: &mut fmt::Formatter<'_>,
    vcpus: &CpuSet,
    on: &CpuSet,
    allowed: &CpuSet,
) -> fmt::Result {
    write!(
        f,
        "{} pinned to {}, but this daemon may run on {} only: widen the daemon's cpuset, \
         start it with taskset on these CPUs, or pin the guest to CPUs of its cpuset",
        subject("vCPU", vcpus),
        on.describe(),
        allowed.describe()
    )
}

fn fmt_no_polling(f: &mut fmt::Formatter<'_>, pairs: &CpuSet, on: &CpuSet) -> fmt::Result {
    write!(
        f,
        "{} on {}, which vCPUs are pinned to, sleeping instead of polling: give the daemon \
         CPUs near the guest that no vCPU is pinned to, or force polling with --placement=same or list:CPUS",
        subject("worker", pairs),
        on.describe()
    )
}

/// The subject and verb of a sentence, such as `vCPU 3 is` or `workers 0-2 are`.
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
    fn each_warning_is_one_sentence_that_says_what_to_do() {
        let set = |list: &str| list.parse::<CpuSet>().unwrap();
        let all = [
            (
                Warning::Unknown {
                    why: "no name: give one".into(),
                },
                "workers cannot be pinned near their vCPUs: no name: give one",
            ),
            (
                Warning::Floating {
                    vcpus: set("0-3"),
                    over: set("0-7"),
                    tid: 99,
                },
                "vCPUs 0-3 are not pinned and may run on CPUs 0-7, so workers cannot be pinned to their vCPUs' CPUs: \
                 pin each vCPU to a CPU of its own with virsh vcpupin GUEST VCPU CPU, or \
                 taskset -pc CPU THREAD (the first is thread 99)",
            ),
            (
                Warning::Outside {
                    vcpus: set("1"),
                    on: set("8"),
                    allowed: set("0-3"),
                },
                "vCPU 1 is pinned to CPU 8, but this daemon may run on CPUs 0-3 only: widen the \
                 daemon's cpuset, start it with taskset on these CPUs, or pin the guest to CPUs of its cpuset",
            ),
            (
                Warning::VcpusOffline {
                    vcpus: set("1"),
                    on: set("3"),
                },
                "vCPU 1 is pinned to CPU 3, which is offline: pin the guest to other CPUs or bring CPU 3 online",
            ),
            (
                Warning::NoPolling {
                    pairs: set("0-1"),
                    on: set("2-3"),
                },
                "workers 0-1 are on CPUs 2-3, which vCPUs are pinned to, sleeping instead of polling: \
                 give the daemon CPUs near the guest that no vCPU is pinned to, or force polling with \
                 --placement=same or list:CPUS",
            ),
            (
                Warning::RemoteVcpus {
                    pairs: set("0"),
                    on: set("9"),
                    vcpus_on: set("1"),
                },
                "worker 0 is on CPU 9, not on the NUMA node of the vCPUs on CPU 1: give the daemon \
                 CPUs of their node",
            ),
            (
                Warning::RemoteMemory {
                    pairs: set("0,2"),
                    on: set("9"),
                    nodes: set("0"),
                },
                "workers 0,2 are on CPU 9, not on the NUMA node of the guest's memory (node 0): \
                 keep guest and daemon on one node with numactl or libvirt's numatune",
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
                "CPU 3 of the placement list is offline, so workers run on other CPUs: bring it online or list other CPUs",
            ),
            (
                Warning::ListOutside {
                    cpus: set("2-3"),
                    allowed: set("0"),
                },
                "CPUs 2-3 of the placement list are no longer in the daemon's cpuset, CPU 0, so workers \
                 run on other CPUs: widen the cpuset or list other CPUs",
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
