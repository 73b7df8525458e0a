//! What the guest's driver chose: which vCPU each queue's interrupt goes to and which vCPUs send on
//! it, as the guest's /proc and /sys have it; and what it could do better.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Serialize;
use virtionet_tests::guest::Guest;
use virtionet_tests::topology::CARD;

/// What the driver chose.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct DriverSettings {
    /// By queue pair, of those in use.
    pub pairs: BTreeMap<usize, PairInterrupts>,
    /// One sentence each, with the command that mends it.
    pub advice: Vec<String>,
}

/// One queue pair, as the guest sees it.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct PairInterrupts {
    /// The receive queue's interrupt; none where queues share one.
    pub rx: Option<Vector>,
    /// The transmit queue's.
    pub tx: Option<Vector>,
    /// The vCPUs whose frames leave by it (XPS), as a list; empty where any may.
    pub xps: String,
}

/// An interrupt and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Vector {
    /// Its number.
    pub irq: u32,
    /// The vCPU.
    pub vcpu: u32,
}

/// Reads it from a guest that was given `offered` queue pairs and has `vcpus`.
///
/// # Errors
/// When the guest's shell does not answer.
pub fn choice(guest: &Guest, offered: u16, vcpus: u16) -> Result<DriverSettings> {
    let table = guest.ok("cat /proc/interrupts")?;
    let masks = guest.ok(&format!(
        "cd /sys/class/net/{CARD}/queues && for q in tx-*; do echo ${{q#tx-}} $(cat $q/xps_cpus); done"
    ))?;
    let mut pairs: BTreeMap<usize, PairInterrupts> = BTreeMap::new();
    for line in masks.lines() {
        let (pair, mask) = line.split_once(' ').unwrap_or((line, "0"));
        let queues = PairInterrupts {
            xps: list(mask),
            ..PairInterrupts::default()
        };
        pairs.insert(
            pair.trim().parse().context("a queue without number")?,
            queues,
        );
    }
    for (irq, way, pair) in queue_irqs(&table) {
        let Some(queues) = pairs.get_mut(&pair) else {
            continue;
        };
        let vcpu = vcpu_of(guest, irq)?;
        let vector = Some(Vector { irq, vcpu });
        match way {
            RingDirection::Receive => queues.rx = vector,
            RingDirection::Transmit => queues.tx = vector,
        }
    }
    let advice = advice(&table, pairs.len(), offered.into(), vcpus.into());
    Ok(DriverSettings { pairs, advice })
}

impl DriverSettings {
    /// The vCPU that the receive interrupt of `pair` goes to.
    pub fn receive_cpu(&self, pair: usize) -> Option<u32> {
        Some(self.pairs.get(&pair)?.rx?.vcpu)
    }

    /// Lines for people.
    pub fn lines(&self) -> String {
        let mut text = format!("in the guest ({CARD})\n");
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

/// One vCPU where the driver set the affinity; of several, the one that the controller really uses.
fn vcpu_of(guest: &Guest, irq: u32) -> Result<u32> {
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

/// Interrupt numbers, directions and queue pairs of the first card's queues.
fn queue_irqs(table: &str) -> Vec<(u32, RingDirection, usize)> {
    table
        .lines()
        .filter_map(|line| {
            let name = line.split_whitespace().last()?;
            let (way, pair) = match name.strip_prefix("virtio0-input.") {
                Some(pair) => (RingDirection::Receive, pair),
                None => (
                    RingDirection::Transmit,
                    name.strip_prefix("virtio0-output.")?,
                ),
            };
            let irq = line.split(':').next()?.trim().parse().ok()?;
            Some((irq, way, pair.parse().ok()?))
        })
        .collect()
}

/// What the guest could do better; the commands are for this card.
fn advice(table: &str, used: usize, offered: usize, vcpus: usize) -> Vec<String> {
    let mut advice = Vec::new();
    if used < offered {
        advice.push(match used < vcpus {
            true => format!(
                "the guest uses {used} of its {offered} queue pairs: run `ethtool -L {CARD} combined {}` in it",
                offered.min(vcpus)
            ),
            false => format!(
                "the guest uses {used} of its {offered} queue pairs, one for each vCPU: queues={used} would do, or run `ethtool -L {CARD} combined {offered}` in it"
            ),
        });
    }
    if queue_irqs(table).is_empty() {
        advice.push(format!(
            "the guest's queues share one interrupt vector: use vectors={} at QEMU's -device virtio-net-pci",
            2 * offered + 2
        ));
    }
    advice
}

/// The vCPUs of a mask such as `3` or `1,00000000`, as a list.
fn list(mask: &str) -> String {
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

    const OWN: &str = "           CPU0       CPU1\n\
             24:          0          0  PCI-MSI 49152-edge      virtio0-config\n\
             25:       1523          0  PCI-MSI 49153-edge      virtio0-input.0\n\
             26:          1         20  PCI-MSI 49154-edge      virtio0-output.0\n\
             27:          0        877  PCI-MSI 49155-edge      virtio0-input.1\n\
             30:          0          1  PCI-MSI 65537-edge      virtio1-input.0\n\
            LOC:       2000       2100   Local timer interrupts\n";
    const SHARED: &str = " 24:  0  0  PCI-MSI 49152-edge      virtio0-config\n\
             25:  9  0  PCI-MSI 49153-edge      virtio0-virtqueues\n";

    #[test]
    fn only_queues_of_the_first_card_count() {
        assert_eq!(
            queue_irqs(OWN),
            [
                (25, RingDirection::Receive, 0),
                (26, RingDirection::Transmit, 0),
                (27, RingDirection::Receive, 1)
            ]
        );
        assert_eq!(queue_irqs(SHARED), []);
    }

    #[test]
    fn what_is_wasted_is_told_with_its_command() {
        for (table, used, offered, vcpus, words) in [
            (OWN, 4, 4, 4, vec![]),
            (OWN, 1, 4, 4, vec!["ethtool -L eth0 combined 4"]),
            (OWN, 1, 4, 2, vec!["ethtool -L eth0 combined 2"]),
            (OWN, 2, 4, 2, vec!["queues=2 would do"]),
            (SHARED, 4, 4, 4, vec!["vectors=10"]),
            (SHARED, 1, 2, 2, vec!["combined 2", "vectors=6"]),
        ] {
            let said = advice(table, used, offered, vcpus);
            assert_eq!(said.len(), words.len(), "{said:?}");
            for (said, words) in said.iter().zip(words) {
                assert!(said.contains(words), "{said}");
            }
        }
    }

    #[test]
    fn masks_are_read_as_lists() {
        for (mask, cpus) in [("0", ""), ("1", "0"), ("a", "1,3"), ("1,00000000", "32")] {
            assert_eq!(list(mask), cpus);
        }
    }

    #[test]
    fn each_pair_has_its_line() {
        let vector = |irq| Some(Vector { irq, vcpu: 1 });
        let queues = PairInterrupts {
            rx: vector(25),
            tx: vector(26),
            xps: "1".into(),
        };
        let choice = DriverSettings {
            pairs: BTreeMap::from([(0, queues), (1, PairInterrupts::default())]),
            advice: vec!["more".into()],
        };
        assert_eq!(
            (choice.receive_cpu(0), choice.receive_cpu(1)),
            (Some(1), None)
        );
        let text = choice.lines();
        assert!(
            text.contains("   0 | receives: interrupt 25 on vCPU 1 | transmits: interrupt 26 on vCPU 1, frames of vCPU 1\n")
                && text.contains("   1 | receives: no interrupt of its own")
                && text.ends_with("note: more\n"),
            "{text}"
        );
    }
}
