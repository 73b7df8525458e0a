//! Which files should hold which values for the workers of one TAP.

use std::path::PathBuf;

use super::setting::AffinitySetting;
use super::{nic, tap};
use crate::cpuset::CpuSet;
use crate::kernel_files::read_cpulist;

/// The mount points of the kernel's file systems.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelPaths {
    /// Sysfs, `/sys`.
    pub sys: PathBuf,
    /// Procfs, `/proc`.
    pub proc: PathBuf,
}

impl Default for KernelPaths {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
        }
    }
}

/// A TAP and the CPUs of its workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapWorkers {
    /// The interface's name.
    pub name: String,
    /// The interface's index.
    pub index: u32,
    /// By the kernel's number of a TAP queue: the CPUs of the worker that serves it.
    pub queues: Vec<CpuSet>,
    /// By queue pair: the CPUs of its worker; empty while the pair is not in use.
    pub workers: Vec<CpuSet>,
}

/// The values that files should hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DesiredSettings {
    /// The settings, at most one for each file.
    pub settings: Vec<AffinitySetting>,
    /// Problems that the user should be informed of, one sentence each.
    pub notes: Vec<String>,
}

/// The values for the files of the TAP of `tap_workers` and of the NICs that share its bridge. A
/// worker that may run on every online CPU needs no setting.
#[must_use]
pub fn desired_settings(roots: &KernelPaths, tap_workers: &TapWorkers) -> DesiredSettings {
    let mut desired = DesiredSettings::default();
    let dir = roots.sys.join("class/net").join(&tap_workers.name);
    if !tap::is_tap(&dir, tap_workers.index) {
        desired.notes.push(format!(
            "{} is not the TAP {} (interface index {}) of this device: mount sysfs in that network namespace, as `ip netns exec` does",
            dir.display(),
            tap_workers.name,
            tap_workers.index
        ));
        return desired;
    }
    let online = read_cpulist(&roots.sys.join("devices/system/cpu/online"));
    let is_pinned = |cpus: &&CpuSet| {
        let anywhere = online
            .as_ref()
            .is_some_and(|online| online.intersection(cpus) == *online);
        !cpus.is_empty() && !anywhere
    };
    for (number, cpus) in tap_workers.queues.iter().enumerate() {
        if is_pinned(&cpus) {
            desired.settings.extend(tap::masks(&dir, number, cpus));
        }
    }
    for nic in nic::find_on_same_bridge(&dir) {
        for irq in nic::interrupts(&roots.proc, &nic) {
            let worker = usize::try_from(irq.queue)
                .ok()
                .and_then(|queue| tap_workers.workers.get(queue));
            if let Some(cpus) = worker.filter(is_pinned) {
                desired.settings.push(irq.setting(&roots.proc, cpus));
            }
        }
    }
    desired
}

#[cfg(test)]
mod tests {
    use super::super::testing::FakeHost;
    use super::*;

    fn cpus(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    fn tap_workers(queues: &[&str], workers: &[&str]) -> TapWorkers {
        let sets = |lists: &[&str]| lists.iter().map(|list| cpus(list)).collect();
        TapWorkers {
            name: "tap0".into(),
            index: 7,
            queues: sets(queues),
            workers: sets(workers),
        }
    }

    fn setting_lines(host: &FakeHost, tap_workers: &TapWorkers) -> Vec<String> {
        let root = format!("{}/", host.path().display());
        let desired = desired_settings(&host.roots(), tap_workers);
        assert_eq!(desired.notes, [""; 0]);
        desired
            .settings
            .iter()
            .map(|setting| setting.command().replace(&root, "/"))
            .collect()
    }

    #[test]
    fn masks_of_each_queue_are_the_cpus_of_its_worker() {
        let host = FakeHost::new("irq-tap", "0-63");
        host.tap("tap0", 7, 3);
        assert_eq!(
            setting_lines(
                &host,
                &tap_workers(&["1", "33", "2-3"], &["1", "2-3", "33"])
            ),
            [
                "echo 2 > /sys/class/net/tap0/queues/tx-0/xps_cpus",
                "echo 2 > /sys/class/net/tap0/queues/rx-0/rps_cpus",
                "echo 2,00000000 > /sys/class/net/tap0/queues/tx-1/xps_cpus",
                "echo 2,00000000 > /sys/class/net/tap0/queues/rx-1/rps_cpus",
                "echo c > /sys/class/net/tap0/queues/tx-2/xps_cpus",
                "echo c > /sys/class/net/tap0/queues/rx-2/rps_cpus",
            ]
        );
    }

    #[test]
    fn worker_that_may_run_on_every_cpu_needs_no_setting() {
        let host = FakeHost::new("irq-every-cpu", "0-1");
        host.tap("tap0", 7, 4);
        let lines = setting_lines(&host, &tap_workers(&["0-1", "", "0-3", "1"], &[]));
        assert!(lines.iter().all(|line| line.contains("-3/")), "{lines:?}");
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn another_interface_of_the_same_name_gets_no_setting() {
        let host = FakeHost::new("irq-netns", "0-1");
        for index in [None, Some(8)] {
            if let Some(index) = index {
                host.tap("tap0", index, 1);
            }
            let desired = desired_settings(&host.roots(), &tap_workers(&["1"], &["1"]));
            assert_eq!(desired.settings, []);
            assert!(
                desired.notes[0].contains("mount sysfs in that network namespace"),
                "{:?}",
                desired.notes
            );
        }
    }

    #[test]
    fn interrupts_of_the_nic_in_the_bridge_go_to_the_workers() {
        let host = FakeHost::new("irq-bridge", "0-7");
        host.tap("tap0", 7, 1);
        host.bridge("br0", &["tap0", "eth0", "tap1"]);
        host.tap("tap1", 9, 1);
        host.nic(
            "eth0",
            &[
                (40, "eth0"),
                (41, "eth0-TxRx-0"),
                (42, "eth0-TxRx-1"),
                (43, "eth0-TxRx-2"),
                (44, "eth0-TxRx-3"),
            ],
        );
        let lines = setting_lines(&host, &tap_workers(&["4"], &["4", "5", ""]));
        assert_eq!(
            lines[2..],
            [
                "echo 4 > /proc/irq/41/smp_affinity_list",
                "echo 5 > /proc/irq/42/smp_affinity_list",
            ]
        );
    }
}
