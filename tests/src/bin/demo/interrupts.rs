//! The interrupt settings of the guest's driver, read from the guest's /proc and /sys: the vCPU
//! that receives each queue's interrupt, and the vCPUs that transmit on each queue. Also advice on
//! how to improve the settings.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Serialize;
use virtionet_tests::guest::Guest;
use virtionet_tests::topology::GUEST_INTERFACE;

/// The interrupt settings of the guest's driver.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct DriverSettings {
    /// The queue pairs in use, by number.
    pub pairs: BTreeMap<usize, PairInterrupts>,
    /// Advice, each with the command that improves a setting.
    pub advice: Vec<String>,
}

/// The interrupts of a queue pair in the guest.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct PairInterrupts {
    /// The interrupt of the receiveq, or `None` if queues share an interrupt.
    pub rx: Option<Vector>,
    /// The interrupt of the transmitq, or `None` if queues share an interrupt.
    pub tx: Option<Vector>,
    /// The list of the vCPUs that transmit on the pair (XPS), which is empty if every vCPU may.
    pub xps: String,
}

/// An interrupt vector and the vCPU that receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Vector {
    /// The number of the interrupt.
    pub irq: u32,
    /// The vCPU.
    pub vcpu: u32,
}

/// Reads the settings of a guest whose network device offers `offered` queue pairs and that has
/// `vcpus` vCPUs.
///
/// # Errors
/// When the guest's shell does not answer, or its output cannot be parsed.
pub fn read_settings(guest: &Guest, offered: u16, vcpus: u16) -> Result<DriverSettings> {
    let table = guest.ok("cat /proc/interrupts")?;
    let masks = guest.ok(&format!(
        "cd /sys/class/net/{GUEST_INTERFACE}/queues && for q in tx-*; do echo ${{q#tx-}} $(cat $q/xps_cpus); done"
    ))?;
    let mut pairs: BTreeMap<usize, PairInterrupts> = BTreeMap::new();
    for line in masks.lines() {
        let (pair, mask) = line.split_once(' ').unwrap_or((line, "0"));
        let queues = PairInterrupts {
            xps: mask_to_list(mask),
            ..PairInterrupts::default()
        };
        pairs.insert(
            pair.trim().parse().context("a queue has no number")?,
            queues,
        );
    }
    for (irq, direction, pair) in parse_queue_irqs(&table) {
        let Some(queues) = pairs.get_mut(&pair) else {
            continue;
        };
        let vcpu = read_vcpu(guest, irq)?;
        let vector = Some(Vector { irq, vcpu });
        match direction {
            RingDirection::Receive => queues.rx = vector,
            RingDirection::Transmit => queues.tx = vector,
        }
    }
    let advice = advice(&table, pairs.len(), offered.into(), vcpus.into());
    Ok(DriverSettings { pairs, advice })
}

impl DriverSettings {
    /// Returns the vCPU that receives the interrupt of the receiveq of `pair`.
    pub fn receive_cpu(&self, pair: usize) -> Option<u32> {
        Some(self.pairs.get(&pair)?.rx?.vcpu)
    }

    /// Returns the settings and the advice as text.
    pub fn to_text(&self) -> String {
        let mut text = format!("in the guest ({GUEST_INTERFACE})\n");
        for (pair, queues) in &self.pairs {
            let vector = |vector: Option<Vector>| match vector {
                Some(Vector { irq, vcpu }) => format!("interrupt {irq} on vCPU {vcpu}"),
                None => "no interrupt of its own".into(),
            };
            let xps = match queues.xps.as_str() {
                "" => "any vCPU".to_owned(),
                list => format!("vCPU {list}"),
            };
            text += &format!(
                "{pair:>4} | receives: {} | transmits: {}, frames of {xps}\n",
                vector(queues.rx),
                vector(queues.tx)
            );
        }
        for line in &self.advice {
            text += &format!("note: {line}\n");
        }
        text
    }
}

/// Returns the vCPU that receives `irq`. If the affinity contains several vCPUs, that is the one in
/// the effective affinity.
fn read_vcpu(guest: &Guest, irq: u32) -> Result<u32> {
    let dir = format!("/proc/irq/{irq}");
    let list = guest.ok(&format!("cat {dir}/smp_affinity_list"))?;
    if let Ok(cpu) = list.trim().parse() {
        return Ok(cpu);
    }
    let effective = guest.ok(&format!("cat {dir}/effective_affinity_list"))?;
    effective
        .trim()
        .parse()
        .with_context(|| format!("the guest's interrupt {irq} has no vCPU"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RingDirection {
    Receive,
    Transmit,
}

/// Returns the interrupt number, the direction and the queue pair of each queue of the first
/// network device.
fn parse_queue_irqs(table: &str) -> Vec<(u32, RingDirection, usize)> {
    table
        .lines()
        .filter_map(|line| {
            let name = line.split_whitespace().last()?;
            let (direction, pair) = match name.strip_prefix("virtio0-input.") {
                Some(pair) => (RingDirection::Receive, pair),
                None => (
                    RingDirection::Transmit,
                    name.strip_prefix("virtio0-output.")?,
                ),
            };
            let irq = line.split(':').next()?.trim().parse().ok()?;
            Some((irq, direction, pair.parse().ok()?))
        })
        .collect()
}

/// Returns advice for the guest's first network device.
fn advice(table: &str, used: usize, offered: usize, vcpus: usize) -> Vec<String> {
    let mut advice = Vec::new();
    if used < offered {
        advice.push(match used < vcpus {
            true => format!(
                "the guest uses {used} of its {offered} queue pairs: run `ethtool -L {GUEST_INTERFACE} combined {}` in the guest",
                offered.min(vcpus)
            ),
            false => format!(
                "the guest uses {used} of its {offered} queue pairs, one for each vCPU: queues={used} would do, or run `ethtool -L {GUEST_INTERFACE} combined {offered}` in the guest"
            ),
        });
    }
    if parse_queue_irqs(table).is_empty() {
        advice.push(format!(
            "the guest's queues share one interrupt vector: use vectors={} at QEMU's -device virtio-net-pci",
            2 * offered + 2
        ));
    }
    advice
}

/// Converts a mask of vCPUs, such as `3` or `1,00000000`, to a list.
fn mask_to_list(mask: &str) -> String {
    let digits: String = mask.chars().filter(char::is_ascii_hexdigit).collect();
    let bits = digits.chars().rev().filter_map(|digit| digit.to_digit(16));
    let cpus = bits.zip((0_u32..).step_by(4)).flat_map(|(bits, base)| {
        (0..4)
            .filter(move |bit| bits >> bit & 1 == 1)
            .map(move |bit| (base + bit).to_string())
    });
    cpus.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEPARATE_VECTORS: &str = "           CPU0       CPU1\n\
             24:          0          0  PCI-MSI 49152-edge      virtio0-config\n\
             25:       1523          0  PCI-MSI 49153-edge      virtio0-input.0\n\
             26:          1         20  PCI-MSI 49154-edge      virtio0-output.0\n\
             27:          0        877  PCI-MSI 49155-edge      virtio0-input.1\n\
             30:          0          1  PCI-MSI 65537-edge      virtio1-input.0\n\
            LOC:       2000       2100   Local timer interrupts\n";
    const SHARED_VECTOR: &str = " 24:  0  0  PCI-MSI 49152-edge      virtio0-config\n\
             25:  9  0  PCI-MSI 49153-edge      virtio0-virtqueues\n";

    #[test]
    fn only_the_queues_of_the_first_network_device_are_parsed() {
        assert_eq!(
            parse_queue_irqs(SEPARATE_VECTORS),
            [
                (25, RingDirection::Receive, 0),
                (26, RingDirection::Transmit, 0),
                (27, RingDirection::Receive, 1)
            ]
        );
        assert_eq!(parse_queue_irqs(SHARED_VECTOR), []);
    }

    #[test]
    fn unused_pairs_and_shared_vectors_give_advice_with_a_command() {
        for (table, used, offered, vcpus, expected) in [
            (SEPARATE_VECTORS, 4, 4, 4, vec![]),
            (
                SEPARATE_VECTORS,
                1,
                4,
                4,
                vec!["ethtool -L eth0 combined 4"],
            ),
            (
                SEPARATE_VECTORS,
                1,
                4,
                2,
                vec!["ethtool -L eth0 combined 2"],
            ),
            (SEPARATE_VECTORS, 2, 4, 2, vec!["queues=2 would do"]),
            (SHARED_VECTOR, 4, 4, 4, vec!["vectors=10"]),
            (SHARED_VECTOR, 1, 2, 2, vec!["combined 2", "vectors=6"]),
        ] {
            let advice = advice(table, used, offered, vcpus);
            assert_eq!(advice.len(), expected.len(), "{advice:?}");
            for (advice, expected) in advice.iter().zip(expected) {
                assert!(advice.contains(expected), "{advice}");
            }
        }
    }

    #[test]
    fn mask_is_converted_to_a_list() {
        for (mask, cpus) in [("0", ""), ("1", "0"), ("a", "1,3"), ("1,00000000", "32")] {
            assert_eq!(mask_to_list(mask), cpus);
        }
    }

    #[test]
    fn text_has_a_line_for_each_pair_and_each_advice() {
        let vector = |irq| Some(Vector { irq, vcpu: 1 });
        let queues = PairInterrupts {
            rx: vector(25),
            tx: vector(26),
            xps: "1".into(),
        };
        let settings = DriverSettings {
            pairs: BTreeMap::from([(0, queues), (1, PairInterrupts::default())]),
            advice: vec!["more".into()],
        };
        assert_eq!(
            (settings.receive_cpu(0), settings.receive_cpu(1)),
            (Some(1), None)
        );
        let text = settings.to_text();
        assert!(
            text.contains("   0 | receives: interrupt 25 on vCPU 1 | transmits: interrupt 26 on vCPU 1, frames of vCPU 1\n")
                && text.contains("   1 | receives: no interrupt of its own")
                && text.ends_with("note: more\n"),
            "{text}"
        );
    }
}
