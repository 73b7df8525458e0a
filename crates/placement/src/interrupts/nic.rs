//! The NICs that share a bridge with a TAP, and the interrupts of their queues.
//!
//! The folder `msi_irqs` of a NIC's device lists its interrupts, and `/proc/irq/N` has a folder
//! named after each handler of interrupt N. Each driver forms these names in its own way;
//! [`queue_of`] supports the forms that contain a queue's number. All other interrupts (link state,
//! admin queues, flow director) are not changed.

use std::fs;
use std::path::Path;

use super::setting::{AffinitySetting, SettingKind};
use crate::cpuset::CpuSet;
use crate::kernel_files::{list_dir, numbered_entries};

/// The number of levels of stacked interfaces (a VLAN on a bond on NICs) that are searched.
const MAX_DEPTH: usize = 4;

/// A NIC.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Nic {
    /// The interface's name.
    name: String,
    /// The device's interrupts.
    irqs: Vec<u32>,
}

/// The interrupt of a NIC's queue.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Interrupt {
    irq: u32,
    /// The queue's number.
    pub(super) queue: u32,
}

impl Interrupt {
    /// The setting that sends this interrupt to `cpus`.
    pub(super) fn setting(&self, proc: &Path, cpus: &CpuSet) -> AffinitySetting {
        AffinitySetting {
            file: proc.join(format!("irq/{}/smp_affinity_list", self.irq)),
            value: cpus.to_string(),
            kind: SettingKind::Irq(self.irq),
        }
    }
}

/// The NICs among the other ports of the bridge that the interface in folder `dir` is a port of,
/// and among the interfaces below these ports.
pub(super) fn find_on_same_bridge(dir: &Path) -> Vec<Nic> {
    let Some(net) = dir.parent() else {
        return Vec::new();
    };
    let mut ports = list_dir(&dir.join("brport/bridge/brif"));
    ports.retain(|port| Some(port.as_ref()) != dir.file_name());
    let mut nics = Vec::new();
    for _ in 0..MAX_DEPTH {
        let mut below = Vec::new();
        for port in ports {
            match irqs_of(&net.join(&port)) {
                Some(irqs) => nics.push(Nic { name: port, irqs }),
                None => below.extend(
                    list_dir(&net.join(&port))
                        .iter()
                        .filter_map(|name| name.strip_prefix("lower_"))
                        .map(str::to_owned),
                ),
            }
        }
        ports = below;
    }
    nics.sort_by(|a, b| a.name.cmp(&b.name));
    nics.dedup();
    nics
}

/// The interrupts of the device of the interface in folder `dir`, or of that device's parent, which
/// has the interrupts of a virtio device.
fn irqs_of(dir: &Path) -> Option<Vec<u32>> {
    let device = fs::canonicalize(dir.join("device")).ok()?;
    let with_irqs = |device: &Path| {
        let irqs = device.join("msi_irqs");
        irqs.is_dir().then_some(irqs)
    };
    let folder = with_irqs(&device).or_else(|| with_irqs(device.parent()?))?;
    Some(numbered_entries(&folder, ""))
}

/// The interrupts of the NIC's queues.
pub(super) fn interrupts(proc: &Path, nic: &Nic) -> Vec<Interrupt> {
    let irq = |&irq: &u32| {
        let handlers = list_dir(&proc.join(format!("irq/{irq}")));
        let queue = handlers
            .iter()
            .find_map(|handler| queue_of(handler, &nic.name))?;
        Some(Interrupt { irq, queue })
    };
    nic.irqs.iter().filter_map(irq).collect()
}

/// The queue's number in the name of an interrupt's handler: the digits at its end (before a device
/// address, as in `mlx5_comp3@pci:0000:3b:00.0`), after a word for a queue or the interface's name.
fn queue_of(handler: &str, interface: &str) -> Option<u32> {
    const WORDS: [&str; 9] = [
        "rx-", "tx-", "txrx-", "rxtx-", "input.", "output.", "_comp", "fp-", "mlx4-",
    ];
    let name = handler.split('@').next()?;
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = name.strip_prefix(stem)?.parse().ok()?;
    let is_own_name = stem
        .strip_prefix(interface)
        .is_some_and(|rest| rest == "-" || rest == "-q" || rest == " (queue ");
    let lower = stem.to_ascii_lowercase();
    let has_queue_word = WORDS.iter().any(|word| lower.ends_with(word));
    // The vectors of Intel's flow director have names like those of a queue.
    ((is_own_name || has_queue_word) && !lower.contains("fdir")).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::super::testing::FakeHost;
    use super::*;

    #[test]
    fn handler_names_of_queues_give_the_queue_and_others_nothing() {
        for (handler, queue) in [
            ("eth0-TxRx-3", Some(3)),
            ("i40e-eth0-TxRx-11", Some(11)),
            ("ice-eth0-TxRx-0", Some(0)),
            ("eth0-Tx-Rx-2", Some(2)),
            ("eth0-rxtx-5", Some(5)),
            ("eth0-rx-1", Some(1)),
            ("eth0-tx-1", Some(1)),
            ("eth0-fp-6", Some(6)),
            ("eth0-7", Some(7)),
            ("virtio3-input.2", Some(2)),
            ("virtio3-output.2", Some(2)),
            ("mlx5_comp3@pci:0000:3b:00.0", Some(3)),
            ("mlx4-4@0000:05:00.0", Some(4)),
            ("eth0", None),
            ("eth1-7", None),
            ("virtio3-config", None),
            ("virtio3", None),
            ("mlx5_async0@pci:0000:3b:00.0", None),
            ("i40e-0000:3b:00.0:misc", None),
            ("i40e-0000:3b:00.0:fdir-TxRx-0", None),
            ("smp_affinity", None),
            ("nvme0q3", None),
            ("eth0-TxRx-99999999999", None),
        ] {
            assert_eq!(queue_of(handler, "eth0"), queue, "{handler}");
        }
    }

    #[test]
    fn nics_are_found_in_the_bridge_and_below_its_ports() {
        let host = FakeHost::new("irq-nics", "0-7");
        host.tap("tap0", 7, 1);
        let net = host.roots().sys.join("class/net");
        assert_eq!(find_on_same_bridge(&net.join("tap0")), []);
        host.bridge("br0", &["tap0", "bond0.5", "virt0", "veth0"]);
        host.stacked("bond0.5", &["bond0"]);
        host.stacked("bond0", &["eth0", "eth1"]);
        host.stacked("veth0", &[]);
        host.nic("eth0", &[(50, "eth0-rx-0")]);
        host.nic("eth1", &[(61, "eth1-rx-1"), (60, "eth1-rx-0")]);
        host.virtio_nic("virt0", &[(70, "virtio3-config"), (71, "virtio3-input.0")]);
        let nics = find_on_same_bridge(&net.join("tap0"));
        let found: Vec<_> = nics
            .iter()
            .map(|nic| (nic.name.as_str(), nic.irqs.clone()))
            .collect();
        assert_eq!(
            found,
            [
                ("eth0", vec![50]),
                ("eth1", vec![60, 61]),
                ("virt0", vec![70, 71])
            ]
        );
        assert_eq!(
            interrupts(&host.roots().proc, &nics[2]),
            [Interrupt { irq: 71, queue: 0 }]
        );
    }

    /// Reads the interrupts of this machine's NIC, where it has one, and changes nothing.
    #[test]
    fn affinity_files_of_real_interrupts_hold_a_cpu_list() {
        for port in list_dir(Path::new("/sys/class/net")) {
            let Some(irqs) = irqs_of(&Path::new("/sys/class/net").join(&port)) else {
                continue;
            };
            let nic = Nic { name: port, irqs };
            for irq in interrupts(Path::new("/proc"), &nic) {
                let setting = irq.setting(Path::new("/proc"), &CpuSet::default());
                let now = crate::kernel_files::read_text(&setting.file).unwrap();
                assert!(now.parse::<CpuSet>().is_ok(), "{setting:?}: {now}");
            }
        }
    }
}
