//! TCP between two Linux guests through virtionetd's switch, against QEMU's own virtio-net
//! (vhost=off) of each on TAPs of a kernel bridge.
//!
//! Both pairs of guests are there all the time, but only one runs: the other is stopped over its
//! monitors. A guest's vCPUs have one CPU together, the other guest's the next one, on both sides.
//! QEMU's other threads are where the kernel puts them, and so are virtionetd's workers with
//! placement none; by default these are on their vCPU's CPU, which here runs two vCPUs already.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use virtionet_tests::accel::Accel;
use virtionet_tests::iperf::IperfLoad;
use virtionet_tests::two_guests::{GuestId, TwoGuestConfig, TwoGuestTestbed};

use crate::harness::progress;
use crate::outcome::{Better, GroupResult};
use crate::sampling::{Effort, PairedSamples};

/// Of queues and of vCPUs.
const PAIRS: u16 = 2;
const FLOWS: [u16; 2] = [1, 4];
const SETUPS: [Setup; 3] = [
    Setup {
        name: "defaults",
        rx_size: 256,
        placement: "auto",
    },
    Setup {
        name: "rx_queue_size 1024",
        rx_size: 1024,
        placement: "auto",
    },
    Setup {
        name: "rx_queue_size 1024, placement none",
        rx_size: 1024,
        placement: "none",
    },
];
const BOUND: f64 = 1.0;

/// How both sides' cards are, and where our workers stand.
struct Setup {
    name: &'static str,
    /// Buffers of a receiveq: QEMU's default and least, or its most.
    rx_size: u16,
    placement: &'static str,
}

/// Measures each set-up with each number of flows.
///
/// # Errors
/// When this process is not root, or a part fails: with its words.
pub fn run(effort: Effort) -> Result<GroupResult> {
    let mut outcome = GroupResult::default();
    for setup in &SETUPS {
        progress(&format!("guests: {}: four of them boot", setup.name));
        let prop = format!("rx_queue_size={}", setup.rx_size);
        let plan = TwoGuestConfig::new(PAIRS)
            .device("placement", setup.placement)
            .prop(GuestId::A, &prop)
            .prop(GuestId::B, &prop);
        let ours = GuestsUnderTest::boot(plan.on_switch()).context("with virtionetd")?;
        let peer = GuestsUnderTest::boot(plan.on_bridge()).context("with QEMU's own cards")?;
        for flows in FLOWS {
            let plural = if flows == 1 { "" } else { "s" };
            let name = format!("{flows} flow{plural}, {}", setup.name);
            measure(effort, &ours, &peer, (&name, flows), &mut outcome)?;
        }
    }
    let accel = Accel::Auto.resolve()?;
    outcome.notes.push(format!(
        "{PAIRS} vCPUs and pairs a guest under {accel}; each guest's vCPUs on a CPU of their own; one iperf3 process a flow; medians of the runs"
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
    let before = ours.ring_counters()?;
    let told = |who: &str, rate: Result<f64>| -> Result<f64> {
        let rate = rate.with_context(|| format!("with {who}: {name}"))?;
        progress(&format!("guests: {name}: {rate:.2} Gbit/s with {who}"));
        Ok(rate)
    };
    let taken = PairedSamples::measure_in_turns(
        effort.choose(5, 1),
        || told("virtionetd", ours.measure(flows, seconds)),
        || told("QEMU's own cards", peer.measure(flows, seconds)),
    )?;
    let work = words(&before, &ours.ring_counters()?);
    outcome.notes.push(format!("{name}: {work}"));
    let row = taken.row(name, "Gbit/s", Better::Higher, "QEMU, bridge");
    outcome.rows.push(row.bound(BOUND));
    Ok(())
}

/// Two guests and what is between them.
struct GuestsUnderTest(TwoGuestTestbed);

impl GuestsUnderTest {
    /// They stand still until they are measured.
    fn boot(testbed: Result<TwoGuestTestbed>) -> Result<Self> {
        let testbed = testbed?;
        testbed.set_running(false)?;
        Ok(Self(testbed))
    }

    /// Gbit/s at the receiver, while the guests run for this.
    fn measure(&self, flows: u16, seconds: u32) -> Result<f64> {
        self.0.set_running(true)?;
        self.0.wait_for_ping()?;
        // The first second, in which the flows find their speed, does not count.
        let load = IperfLoad::tcp(seconds).flows(flows).arg("-O").arg("1");
        let report = self.0.iperf(GuestId::A, &load, flows)?;
        self.0.set_running(false)?;
        Ok(report.gbps)
    }

    /// What the receiver's rings counted.
    fn ring_counters(&self) -> Result<BTreeMap<String, u64>> {
        self.0.counters(GuestId::B, "rx")
    }
}

/// What the receiver's rings did in between.
fn words(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> String {
    let came = |name: &str| after[name] - before[name];
    let ratio = |one: u64, other: u64| one.checked_div(other).unwrap_or(0);
    let dropped = after.keys().filter(|name| name.starts_with("dropped_"));
    let dropped: u64 = dropped.map(|name| came(name)).sum();
    let (frames, bytes, calls) = (came("frames"), came("bytes"), came("calls"));
    format!(
        "{frames} frames of {} bytes, {} an interrupt, {dropped} dropped",
        ratio(bytes, frames),
        ratio(frames, calls)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_in_between_is_told() {
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
            words(&counters(&before), &counters(&after)),
            "8 frames of 100 bytes, 4 an interrupt, 2 dropped"
        );
    }
}
