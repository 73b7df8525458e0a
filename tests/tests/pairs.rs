//! The main job: a Linux guest under QEMU with four queue pairs. Each pair
//! carries frames both ways, its interrupts are its vCPU's, and its worker
//! stands on the CPU of that vCPU.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use virtionet_tests::counters::{PairCounters, pairs};
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::sched;
use virtionet_tests::testbed::{BOOT, Testbed, TestbedConfig};

const PAIRS: u16 = 4;

#[test]
fn four_pairs_carry_frames_both_ways_each_on_its_own_cpu() {
    let testbed = TestbedConfig::new(PAIRS).start().unwrap();
    let before = pairs(&testbed.daemon.device().unwrap()).unwrap();
    assert_eq!(before.len(), usize::from(PAIRS));
    workers_stand_on_their_vcpus_cpus(&testbed, &before).unwrap();
    interrupts_belong_to_their_vcpus(testbed.qemu.guest(), &before).unwrap();

    let calls = interrupts(testbed.qemu.guest()).unwrap();
    let iperf = testbed.iperf().unwrap();
    let mut last = before;
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let report = iperf.run(&IperfLoad::tcp(3).flows(16), direction).unwrap();
        eprintln!("{direction:?}: {:.2} Gbit/s {:?}", report.gbps, report.each);
        assert!(report.each.iter().all(|gbps| *gbps > 0.0), "{report:?}");
        let now = pairs(&testbed.daemon.device().unwrap()).unwrap();
        for (k, (old, new)) in last.iter().zip(&now).enumerate() {
            let rx = new.rx.frames - old.rx.frames;
            let tx = new.tx.frames - old.tx.frames;
            eprintln!("pair {k}: {rx} frames to the guest, {tx} from it");
            assert!(
                rx > 0 && tx > 0,
                "pair {k} stood still: {rx} rx, {tx} tx frames"
            );
        }
        last = now;
    }

    for (name, now) in interrupts(testbed.qemu.guest()).unwrap() {
        let before = &calls[&name].counts;
        let pair = pair_of(&name).unwrap();
        for (cpu, (now, before)) in now.counts.iter().zip(before).enumerate() {
            let came = now - before;
            assert_eq!(came > 0, cpu == pair, "{name}: {came} on vCPU {cpu}");
        }
    }
}

#[test]
fn a_guest_with_packed_rings_moves_data_both_ways_and_reboots() {
    let mut testbed = TestbedConfig::new(2).prop("packed=on").start().unwrap();
    let features = testbed.daemon.device().unwrap()["frontend"]["features"].clone();
    assert!(features.to_string().contains("RING_PACKED"), "{features}");
    testbed.move_data_both_ways().unwrap();
    testbed.qemu.guest().reboot(BOOT).unwrap();
    testbed.configure_guest().unwrap();
    testbed.move_data_both_ways().unwrap();
    for pair in pairs(&testbed.daemon.device().unwrap()).unwrap() {
        assert!(pair.rx.frames > 0 && pair.tx.frames > 0, "{pair:?}");
    }
}

/// The stated CPUs are those of vCPU k's thread, and the kernel says the same.
fn workers_stand_on_their_vcpus_cpus(testbed: &Testbed, pairs: &[PairCounters]) -> Result<()> {
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

/// The driver gave pair k's vectors to the vCPUs that the daemon names for it.
fn interrupts_belong_to_their_vcpus(guest: &Guest, pairs: &[PairCounters]) -> Result<()> {
    let vectors = interrupts(guest)?;
    assert_eq!(vectors.len(), 2 * pairs.len(), "{vectors:?}");
    for (name, vector) in vectors {
        let affinity = guest.ok(&format!("cat /proc/irq/{}/smp_affinity_list", vector.irq))?;
        let pair = &pairs[pair_of(&name)?];
        let vcpus: Vec<String> = pair.vcpus.iter().map(ToString::to_string).collect();
        assert_eq!(affinity.trim(), vcpus.join(","), "{name}");
    }
    Ok(())
}

#[derive(Debug)]
struct Vector {
    irq: String,
    /// Interrupts so far, by vCPU.
    counts: Vec<u64>,
}

/// The vectors of the first card's rings, by name.
fn interrupts(guest: &Guest) -> Result<BTreeMap<String, Vector>> {
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
        let irq = words.next().context("an empty line")?;
        let counts = words.map_while(|word| word.parse().ok());
        let vector = Vector {
            irq: irq.trim_end_matches(':').to_owned(),
            counts: counts.take(usize::from(PAIRS)).collect(),
        };
        vectors.insert(name.to_owned(), vector);
    }
    Ok(vectors)
}

fn pair_of(vector: &str) -> Result<usize> {
    let (_, number) = vector.split_once('.').context("no number")?;
    Ok(number.parse()?)
}
