//! Where the guest's interrupts go: its /proc/interrupts and /proc/irq.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use virtionet_tests::guest::Guest;

/// The vCPU that the receive interrupt of each queue pair goes to, by pair.
///
/// # Errors
/// When the guest's shell does not answer.
pub fn receive_cpus(guest: &Guest) -> Result<BTreeMap<usize, u32>> {
    let table = guest.ok("cat /proc/interrupts")?;
    let mut cpus = BTreeMap::new();
    for (irq, pair) in receive_irqs(&table) {
        // One vCPU where the driver set the affinity; of several, the one
        // that the controller really uses.
        let dir = format!("/proc/irq/{irq}");
        let list = guest.ok(&format!("cat {dir}/smp_affinity_list"))?;
        let cpu = match list.trim().parse() {
            Ok(cpu) => cpu,
            Err(_) => guest
                .ok(&format!("cat {dir}/effective_affinity_list"))?
                .trim()
                .parse()
                .with_context(|| format!("the guest's interrupt {irq} has no vCPU"))?,
        };
        cpus.insert(pair, cpu);
    }
    Ok(cpus)
}

/// Interrupt numbers and queue pairs of the first card's receive queues.
fn receive_irqs(table: &str) -> Vec<(u32, usize)> {
    table
        .lines()
        .filter_map(|line| {
            let name = line.split_whitespace().last()?;
            let pair = name.strip_prefix("virtio0-input.")?.parse().ok()?;
            let irq = line.split(':').next()?.trim().parse().ok()?;
            Some((irq, pair))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_receive_queues_of_the_first_card_count() {
        let table = "           CPU0       CPU1\n\
             24:          0          0  PCI-MSI 49152-edge      virtio0-config\n\
             25:       1523          0  PCI-MSI 49153-edge      virtio0-input.0\n\
             26:          1         20  PCI-MSI 49154-edge      virtio0-output.0\n\
             27:          0        877  PCI-MSI 49155-edge      virtio0-input.1\n\
             30:          0          1  PCI-MSI 65537-edge      virtio1-input.0\n\
            LOC:       2000       2100   Local timer interrupts\n";
        assert_eq!(receive_irqs(table), [(25, 0), (27, 1)]);
    }
}
