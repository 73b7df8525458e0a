//! The main use case: a Linux guest under QEMU with four queue pairs. Each pair carries frames in
//! both directions, its interrupts go to its vCPU, and its worker runs on the CPU of that vCPU.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use virtionet_tests::counters::{PairCounters, pairs};
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::sched;
use virtionet_tests::testbed::{BOOT_TIMEOUT, Testbed, TestbedConfig};

const PAIRS: u16 = 4;

#[test]
fn four_pairs_carry_frames_both_ways_each_with_worker_and_interrupts_on_its_vcpu() {
    let testbed = TestbedConfig::new(PAIRS).start().unwrap();
    let before = pairs(&testbed.daemon.device().unwrap()).unwrap();
    assert_eq!(before.len(), usize::from(PAIRS));
    assert_workers_share_vcpu_affinity(&testbed, &before).unwrap();
    assert_interrupts_go_to_reported_vcpus(testbed.qemu.guest(), &before).unwrap();

    let interrupts_before = read_interrupts(testbed.qemu.guest()).unwrap();
    let iperf = testbed.iperf().unwrap();
    let mut last = before;
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let report = iperf.run(&IperfLoad::tcp(3).flows(16), direction).unwrap();
        eprintln!(
            "{direction:?}: {:.2} Gbit/s {:?}",
            report.gbps, report.gbps_by_process
        );
        assert!(
            report.gbps_by_process.iter().all(|gbps| *gbps > 0.0),
            "{report:?}"
        );
        let now = pairs(&testbed.daemon.device().unwrap()).unwrap();
        for (k, (old, new)) in last.iter().zip(&now).enumerate() {
            let rx = new.rx.frames - old.rx.frames;
            let tx = new.tx.frames - old.tx.frames;
            eprintln!("pair {k}: {rx} frames to the guest, {tx} from it");
            assert!(
                rx > 0 && tx > 0,
                "pair {k} carried {rx} RX frames and {tx} TX frames"
            );
        }
        last = now;
    }

    for (name, after) in read_interrupts(testbed.qemu.guest()).unwrap() {
        let before = &interrupts_before[&name].counts;
        let pair = parse_pair_number(&name).unwrap();
        for (vcpu, (after, before)) in after.counts.iter().zip(before).enumerate() {
            let count = after - before;
            assert_eq!(
                count > 0,
                vcpu == pair,
                "{name}: {count} interrupts on vCPU {vcpu}"
            );
        }
    }
}

#[test]
fn guest_with_packed_rings_moves_data_both_ways_before_and_after_a_reboot() {
    let mut testbed = TestbedConfig::new(2).prop("packed=on").start().unwrap();
    let features = testbed.daemon.device().unwrap()["frontend"]["features"].clone();
    assert!(features.to_string().contains("RING_PACKED"), "{features}");
    testbed.move_data_both_ways().unwrap();
    testbed.qemu.guest().reboot(BOOT_TIMEOUT).unwrap();
    testbed.configure_guest().unwrap();
    testbed.move_data_both_ways().unwrap();
    for pair in pairs(&testbed.daemon.device().unwrap()).unwrap() {
        assert!(pair.rx.frames > 0 && pair.tx.frames > 0, "{pair:?}");
    }
}

/// Checks that the reported CPUs of worker k are the affinity of the worker and of vCPU k.
fn assert_workers_share_vcpu_affinity(testbed: &Testbed, pairs: &[PairCounters]) -> Result<()> {
    let vcpus = testbed.qemu.vcpu_threads()?;
    let threads: BTreeMap<i32, String> =
        sched::threads(testbed.daemon.pid())?.into_iter().collect();
    for (k, (pair, vcpu)) in pairs.iter().zip(vcpus).enumerate() {
        assert_eq!(pair.worker, format!("vnet-q{k}"));
        assert_eq!(threads.get(&pair.tid), Some(&pair.worker), "{threads:?}");
        assert_eq!(pair.vcpus, [k]);
        assert_eq!(pair.cpus, sched::affinity(vcpu)?, "pair {k}");
        assert_eq!(pair.cpus, sched::affinity(pair.tid)?, "pair {k}");
    }
    Ok(())
}

/// Checks that the driver has assigned the vectors of pair k to the vCPUs that the daemon reports
/// for it.
fn assert_interrupts_go_to_reported_vcpus(guest: &Guest, pairs: &[PairCounters]) -> Result<()> {
    let vectors = read_interrupts(guest)?;
    assert_eq!(vectors.len(), 2 * pairs.len(), "{vectors:?}");
    for (name, vector) in vectors {
        let affinity = guest.ok(&format!("cat /proc/irq/{}/smp_affinity_list", vector.irq))?;
        let pair = &pairs[parse_pair_number(&name)?];
        let vcpus: Vec<String> = pair.vcpus.iter().map(ToString::to_string).collect();
        assert_eq!(affinity.trim(), vcpus.join(","), "{name}");
    }
    Ok(())
}

#[derive(Debug)]
struct Vector {
    irq: String,
    /// The number of interrupts on each vCPU.
    counts: Vec<u64>,
}

/// Reads the vectors of the first network device's queues, by name.
fn read_interrupts(guest: &Guest) -> Result<BTreeMap<String, Vector>> {
    let table = guest.ok("cat /proc/interrupts")?;
    let mut vectors = BTreeMap::new();
    for line in table.lines() {
        let mut words = line.split_whitespace();
        let Some(name) = line.split_whitespace().next_back() else {
            continue;
        };
        if !name.starts_with("virtio0-input.") && !name.starts_with("virtio0-output.") {
            continue;
        }
        let irq = words.next().context("a line of the table is empty")?;
        let counts = words.map_while(|word| word.parse().ok());
        let vector = Vector {
            irq: irq.trim_end_matches(':').to_owned(),
            counts: counts.take(usize::from(PAIRS)).collect(),
        };
        vectors.insert(name.to_owned(), vector);
    }
    Ok(vectors)
}

fn parse_pair_number(vector: &str) -> Result<usize> {
    let (_, number) = vector
        .split_once('.')
        .with_context(|| format!("the vector {vector} has no number"))?;
    Ok(number.parse()?)
}
