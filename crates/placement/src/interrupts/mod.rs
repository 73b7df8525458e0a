//! The host's side of a queue's way: interrupts and steering masks that belong to a worker's CPU.
//!
//! Three kinds of files say on which CPU the kernel works for a queue:
//!
//! - **XPS** of a TAP, `/sys/class/net/IF/queues/tx-N/xps_cpus`: which CPUs' frames leave by queue
//!   N. A TAP steers by flow (tun's `ndo_select_queue`) and does not ask it; the mask tells people
//!   and tools whose queue it is, and the kernel on which node to keep the queue's qdisc.
//! - **RPS** of a TAP, `rx-N/rps_cpus`: where the host's stack goes on with frames that the guest
//!   sent. Where it is off the stack goes on at once, on the CPU of the worker that wrote the frame:
//!   that follows the worker by itself, and a mask in its place costs a turn through the backlog
//!   (a fifth to a quarter of small frames a second, measured). So it is narrowed to the worker's CPU where
//!   the host has it on, and left off where it is off.
//! - **The interrupts of a NIC** that shares a bridge with the TAP, `/proc/irq/N/smp_affinity_list`:
//!   queue k's interrupts come to worker k's CPU, which then finds the frames in its caches.
//!
//! [`desired_settings`] says what the files should hold, [`IrqAffinityManager`] writes it and puts back what was there. A
//! process that is killed puts nothing back; a queue's masks go with the TAP.

mod irqbalance;
mod manager;
mod mask;
mod nic;
mod tap;
#[cfg(test)]
mod testing;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use self::irqbalance::irqbalance_hint;
pub use self::manager::{IrqAffinityManager, SettingOutcome, SettingRefusal};
pub use self::mask::{format_mask, parse_mask};

use crate::cpuset::CpuSet;

/// What becomes of interrupts and masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IrqAffinity {
    /// They are set, and put back at the end.
    Apply,
    /// It is told how they would be set.
    Print,
    /// Nothing: the host's masks are the administrator's, and a NIC's interrupts serve others too.
    #[default]
    Off,
}

/// A mode that is none: one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no interrupt affinity mode {0:?}: use apply, print or off")]
pub struct IrqAffinityError(String);

impl FromStr for IrqAffinity {
    type Err = IrqAffinityError;

    /// An empty text is the default.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => Ok(Self::default()),
            "apply" => Ok(Self::Apply),
            "print" => Ok(Self::Print),
            "off" => Ok(Self::Off),
            _ => Err(IrqAffinityError(text.into())),
        }
    }
}

impl fmt::Display for IrqAffinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Apply => "apply",
            Self::Print => "print",
            Self::Off => "off",
        })
    }
}

/// Where the kernel's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelPaths {
    /// Its devices, `/sys`.
    pub sys: PathBuf,
    /// Its interrupts, `/proc`.
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

/// A TAP and who serves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapWorkers {
    /// The interface's name.
    pub name: String,
    /// The interface's index.
    pub index: u32,
    /// By the kernel's number of a queue: the CPUs of the worker that has it.
    pub queues: Vec<CpuSet>,
    /// By queue pair: the CPUs of its worker; empty while the pair is not in use.
    pub workers: Vec<CpuSet>,
}

/// What a file should hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AffinitySetting {
    /// The file.
    pub file: PathBuf,
    /// What it should hold, as the kernel takes it.
    pub value: String,
    /// What kind of file it is.
    pub kind: SettingKind,
}

/// What a setting is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettingKind {
    /// A TAP queue's XPS mask.
    Xps,
    /// A TAP queue's RPS mask, which is set only where it was on.
    Rps,
    /// The CPUs of this interrupt, as a list.
    Irq(u32),
}

/// What the files should hold, and what a person should know of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DesiredSettings {
    /// The files, each once.
    pub settings: Vec<AffinitySetting>,
    /// Sentences.
    pub notes: Vec<String>,
}

/// What the files of `tap_workers` and of the NICs beside it should hold. A worker that may run on any
/// CPU that is online wants nothing.
#[must_use]
pub fn desired_settings(roots: &KernelPaths, tap_workers: &TapWorkers) -> DesiredSettings {
    let mut desired_settings = DesiredSettings::default();
    let dir = roots.sys.join("class/net").join(&tap_workers.name);
    if !tap::is_tap(&dir, tap_workers.index) {
        desired_settings.notes.push(format!(
            "{} is not the interface {} (number {}) that is served: mount sysfs in that network namespace, as `ip netns exec` does",
            dir.display(),
            tap_workers.name,
            tap_workers.index
        ));
        return desired_settings;
    }
    let online = read(&roots.sys.join("devices/system/cpu/online"))
        .ok()
        .and_then(|list| list.parse::<CpuSet>().ok());
    let pinned = |cpus: &&CpuSet| {
        let anywhere = online
            .as_ref()
            .is_some_and(|online| online.intersection(cpus) == *online);
        !cpus.is_empty() && !anywhere
    };
    for (number, cpus) in tap_workers.queues.iter().enumerate() {
        if pinned(&cpus) {
            desired_settings
                .settings
                .extend(tap::masks(&dir, number, cpus));
        }
    }
    for nic in nic::find_on_same_bridge(&dir) {
        for irq in nic::interrupts(&roots.proc, &nic) {
            let worker = usize::try_from(irq.queue)
                .ok()
                .and_then(|queue| tap_workers.workers.get(queue));
            if let Some(cpus) = worker.filter(pinned) {
                desired_settings
                    .settings
                    .push(irq.setting(&roots.proc, cpus));
            }
        }
    }
    desired_settings
}

/// A file's text without the end of its line.
fn read(path: &Path) -> io::Result<String> {
    fs::read_to_string(path).map(|text| text.trim_end().to_owned())
}

impl AffinitySetting {
    /// The command of a shell that makes this setting.
    #[must_use]
    pub fn command(&self) -> String {
        format!("echo {} > {}", self.value, self.file.display())
    }

    /// Whether a file that holds `text` is set so.
    fn matches(&self, text: &str) -> bool {
        let same = match self.kind {
            SettingKind::Irq(_) => text.parse::<CpuSet>().ok() == self.value.parse::<CpuSet>().ok(),
            _ => parse_mask(text) == parse_mask(&self.value),
        };
        same || text == self.value
    }

    /// Whether a file that held `original` is to be set at all.
    fn applies_to(&self, original: &str) -> bool {
        self.kind != SettingKind::Rps || parse_mask(original).is_none_or(|cpus| !cpus.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::testing::FakeHost;
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
        let desired_settings = desired_settings(&host.roots(), tap_workers);
        assert_eq!(desired_settings.notes, [""; 0]);
        desired_settings
            .settings
            .iter()
            .map(|setting| setting.command().replace(&root, "/"))
            .collect()
    }

    #[test]
    fn modes_are_read_and_others_refused() {
        for (text, mode) in [
            ("apply", IrqAffinity::Apply),
            ("print", IrqAffinity::Print),
            ("off", IrqAffinity::Off),
        ] {
            assert_eq!(text.parse(), Ok(mode));
            assert_eq!(mode.to_string(), text);
        }
        assert_eq!("".parse(), Ok(IrqAffinity::Off));
        assert_eq!(
            "on".parse::<IrqAffinity>().unwrap_err().to_string(),
            "there is no interrupt affinity mode \"on\": use apply, print or off"
        );
    }

    #[test]
    fn the_masks_of_a_queue_are_its_workers_whatever_its_number() {
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
    fn a_worker_that_may_be_anywhere_wants_nothing() {
        let host = FakeHost::new("irq-anywhere", "0-1");
        host.tap("tap0", 7, 4);
        let setting_lines = setting_lines(&host, &tap_workers(&["0-1", "", "0-3", "1"], &[]));
        assert!(
            setting_lines.iter().all(|line| line.contains("-3/")),
            "{setting_lines:?}"
        );
        assert_eq!(setting_lines.len(), 2);
    }

    #[test]
    fn another_interface_of_that_name_is_left_alone() {
        let host = FakeHost::new("irq-netns", "0-1");
        for index in [None, Some(8)] {
            if let Some(index) = index {
                host.tap("tap0", index, 1);
            }
            let desired_settings = desired_settings(&host.roots(), &tap_workers(&["1"], &["1"]));
            assert_eq!(desired_settings.settings, []);
            assert!(
                desired_settings.notes[0].contains("mount sysfs in that network namespace"),
                "{:?}",
                desired_settings.notes
            );
        }
    }

    #[test]
    fn interrupts_of_the_nic_in_the_bridge_follow_the_workers() {
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
        let setting_lines = setting_lines(&host, &tap_workers(&["4"], &["4", "5", ""]));
        assert_eq!(
            setting_lines[2..],
            [
                "echo 4 > /proc/irq/41/smp_affinity_list",
                "echo 5 > /proc/irq/42/smp_affinity_list",
            ]
        );
    }
}
