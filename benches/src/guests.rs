//! Measures TCP between two Linux guests through virtionetd's switch, against two guests with
//! QEMU's own virtio-net (vhost=off) on TAPs of a kernel bridge.
//!
//! Both testbeds exist all the time, but only one runs; the guests of the other one are stopped
//! through QMP. On both sides, all vCPUs of the first guest are pinned to one CPU, and those of the
//! second guest to the next one. The kernel places QEMU's other threads, and with `placement=none`
//! also virtionetd's workers. By default, a worker runs on the CPU of its vCPU, which already runs
//! two vCPUs here.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use virtionet_tests::accel::Accel;
use virtionet_tests::iperf::IperfLoad;
use virtionet_tests::two_guests::{GuestId, TwoGuestConfig, TwoGuestTestbed};

use crate::harness::progress;
use crate::outcome::{Better, GroupResult};
use crate::sampling::{Effort, PairedSamples};

/// Queue pairs, and also vCPUs, of each guest.
const QUEUE_PAIRS: u16 = 2;
const FLOWS: [u16; 2] = [1, 4];
const SETUPS: [Setup; 3] = [
    Setup {
        name: "defaults",
        rx_queue_size: 256,
        placement: "auto",
    },
    Setup {
        name: "rx_queue_size 1024",
        rx_queue_size: 1024,
        placement: "auto",
    },
    Setup {
        name: "rx_queue_size 1024, placement none",
        rx_queue_size: 1024,
        placement: "none",
    },
];
const BOUND: f64 = 1.0;

/// The configuration of the network devices of both sides, and the placement of our workers.
struct Setup {
    name: &'static str,
    /// Size of a receiveq. QEMU allows 256 (its default) to 1024.
    rx_queue_size: u16,
    placement: &'static str,
}

/// Measures each set-up with each number of flows.
///
/// # Errors
/// When this process is not root, or a part of the testbed fails. The error contains its
/// message.
pub fn run(effort: Effort) -> Result<GroupResult> {
    let mut outcome = GroupResult::default();
    for setup in &SETUPS {
        progress(&format!("guests: {}: four guests boot", setup.name));
        let prop = format!("rx_queue_size={}", setup.rx_queue_size);
        let config = TwoGuestConfig::new(QUEUE_PAIRS)
            .device("placement", setup.placement)
            .prop(GuestId::A, &prop)
            .prop(GuestId::B, &prop);
        let ours = GuestsUnderTest::boot(config.on_switch()).context("with virtionetd")?;
        let peer =
            GuestsUnderTest::boot(config.on_bridge()).context("with QEMU's own virtio-net")?;
        for flows in FLOWS {
            let plural = if flows == 1 { "" } else { "s" };
            let name = format!("{flows} flow{plural}, {}", setup.name);
            measure(effort, &ours, &peer, (&name, flows), &mut outcome)?;
        }
    }
    let accel = Accel::Auto.resolve()?;
    outcome.notes.push(format!(
        "each guest has {QUEUE_PAIRS} vCPUs and {QUEUE_PAIRS} queue pairs, under {accel}; the vCPUs of each guest have a CPU of their own; one iperf3 process for each flow; medians of the runs"
    ));
    Ok(outcome)
}

fn measure(
    effort: Effort,
    ours: &GuestsUnderTest,
    peer: &GuestsUnderTest,
    (name, flows): (&str, u16),
    outcome: &mut GroupResult,
) -> Result<()> {
    let seconds = effort.choose(3, 1);
    let before = ours.rx_counters()?;
    let report = |who: &str, rate: Result<f64>| -> Result<f64> {
        let rate = rate.with_context(|| format!("with {who}: {name}"))?;
        progress(&format!("guests: {name}: {rate:.2} Gbit/s with {who}"));
        Ok(rate)
    };
    let samples = PairedSamples::measure_in_turns(
        effort.choose(5, 1),
        || report("virtionetd", ours.measure(flows, seconds)),
        || report("QEMU's own virtio-net", peer.measure(flows, seconds)),
    )?;
    let counters = describe_counters(&before, &ours.rx_counters()?);
    outcome.notes.push(format!("{name}: {counters}"));
    let row = samples.row(name, "Gbit/s", Better::Higher, "QEMU, bridge");
    outcome.rows.push(row.with_bound(BOUND));
    Ok(())
}

/// Two guests and the network between them.
struct GuestsUnderTest(TwoGuestTestbed);

impl GuestsUnderTest {
    /// Stops the booted guests until they are measured.
    fn boot(testbed: Result<TwoGuestTestbed>) -> Result<Self> {
        let testbed = testbed?;
        testbed.set_running(false)?;
        Ok(Self(testbed))
    }

    /// Resumes the guests, measures, and stops them again. Returns Gbit/s at the receiver.
    fn measure(&self, flows: u16, seconds: u32) -> Result<f64> {
        self.0.set_running(true)?;
        self.0.wait_for_ping()?;
        // The first second is omitted, because the flows have not reached their full rate yet.
        let load = IperfLoad::tcp(seconds).flows(flows).arg("-O").arg("1");
        let report = self.0.iperf(GuestId::A, &load, flows)?;
        self.0.set_running(false)?;
        Ok(report.gbps)
    }

    /// The counters of all receiveqs of the receiving guest.
    fn rx_counters(&self) -> Result<BTreeMap<String, u64>> {
        self.0.counters(GuestId::B, "rx")
    }
}

/// Describes by how much the receiver's counters have increased.
fn describe_counters(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> String {
    let increase = |name: &str| after[name] - before[name];
    let ratio = |dividend: u64, divisor: u64| dividend.checked_div(divisor).unwrap_or(0);
    let dropped = after.keys().filter(|name| name.starts_with("dropped_"));
    let dropped: u64 = dropped.map(|name| increase(name)).sum();
    let (frames, bytes, calls) = (increase("frames"), increase("bytes"), increase("calls"));
    format!(
        "{frames} frames of {} bytes, {} frames per interrupt, {dropped} dropped",
        ratio(bytes, frames),
        ratio(frames, calls)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn increases_of_the_counters_are_described() {
        let counters = |list: &[(&str, u64)]| -> BTreeMap<String, u64> {
            list.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect()
        };
        let before = [("frames", 1), ("bytes", 60), ("calls", 1), ("dropped_x", 5)];
        let after = [
            ("frames", 9),
            ("bytes", 860),
            ("calls", 3),
            ("dropped_x", 7),
        ];
        assert_eq!(
            describe_counters(&counters(&before), &counters(&after)),
            "8 frames of 100 bytes, 4 frames per interrupt, 2 dropped"
        );
    }
}
