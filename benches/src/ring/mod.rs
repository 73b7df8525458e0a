//! What a descriptor chain costs the device on a split virtqueue of 256 entries that lies in the
//! CPU's caches: the chain is dequeued, each of its segments is translated and it is completed; once
//! for each burst, the device checks whether the driver wants an interrupt.
//!
//! Both sides run against the same simulated driver ([`driver`]), on virtqueues and in memory of the
//! same layout: [`ours`] is virtionet-virtqueue, [`virtio_queue`] is the crate virtio-queue. The
//! driver's part, one store of the available index for each burst, is included in both times.

pub mod case;
pub mod driver;
pub mod ours;
pub mod virtio_queue;

use std::hint::black_box;

use anyhow::{Result, ensure};

use self::case::{BurstResult, CASES, RingCase};
use self::driver::ChainDriver;
use self::ours::VirtqueueDevice;
use self::virtio_queue::VirtioQueueDevice;
use crate::harness::{pin_to_last_cpu, run_in_thread, time_ns};
use crate::outcome::{Better, GroupResult, Row};
use crate::sampling::{Effort, PairedSamples};

/// The most that a chain of two descriptors may cost us, in ns.
const BOUND: f64 = 5.0;

/// Measures every case.
///
/// # Errors
/// When a side does not do its work.
pub fn run(effort: Effort) -> Result<GroupResult> {
    run_in_thread(|| {
        pin_to_last_cpu()?;
        let mut outcome = GroupResult::default();
        for case in &CASES {
            outcome.rows.push(measure(case, effort)?);
        }
        // The plain case is measured first and last. Of an absolute figure the better median counts:
        // a machine can only be slower than it is.
        let plain = outcome.rows[0].ours.min(outcome.rows[CASES.len() - 1].ours);
        let name = format!("{}: its bound", CASES[0].name());
        let bound = Row::new(&name, "ns/chain", Better::Lower, plain, ("bound", BOUND));
        outcome.rows.push(bound.bound(1.0));
        Ok(outcome)
    })
}

fn measure(case: &RingCase, effort: Effort) -> Result<Row> {
    // Shorter than what a scheduler gives to another program at a time: most samples have none of
    // that in them.
    let bursts = 100;
    let (mut our_driver, mut ours) = our_side(case)?;
    let (mut peer_driver, mut peer) = peer_side(case)?;
    let pairs = PairedSamples::measure_in_turns(
        effort.choose(1001, 51),
        || {
            rounds(&mut our_driver, case.burst, bursts, || {
                ours.burst(case.burst)
            })
        },
        || {
            rounds(&mut peer_driver, case.burst, bursts, || {
                peer.burst(case.burst)
            })
        },
    )?;
    Ok(pairs.row(&case.name(), "ns/chain", Better::Lower, case.method.name()))
}

/// Our device and its driver.
///
/// # Errors
/// When the memory or the ring cannot be had.
pub fn our_side(case: &RingCase) -> Result<(ChainDriver, VirtqueueDevice)> {
    let driver = ChainDriver::new(case.shape, case.event_idx)?;
    let ours = VirtqueueDevice::new(&driver, case)?;
    Ok((driver, ours))
}

/// The peer's device and its driver.
///
/// # Errors
/// When the memory or the ring cannot be had.
pub fn peer_side(case: &RingCase) -> Result<(ChainDriver, VirtioQueueDevice)> {
    let driver = ChainDriver::new(case.shape, case.event_idx)?;
    let stock = VirtioQueueDevice::new(&driver, case)?;
    Ok((driver, stock))
}

/// Nanoseconds a chain over `bursts` bursts of `size` chains.
fn rounds(
    driver: &mut ChainDriver,
    size: u16,
    bursts: u32,
    mut device: impl FnMut() -> Result<BurstResult>,
) -> Result<f64> {
    let mut chains = 0;
    let mut bytes = 0;
    let took = time_ns(|| {
        for _ in 0..bursts {
            driver.offer(size);
            let burst = black_box(device()?);
            chains += burst.chains;
            bytes += burst.bytes;
        }
        Ok(())
    })?;
    let wanted = bursts * u32::from(size);
    ensure!(
        chains == wanted && bytes == driver::CHAIN_BYTES * usize::try_from(wanted)?,
        "a device did {chains} chains with {bytes} bytes, where {wanted} chains were offered"
    );
    Ok(took / f64::from(chains))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_do_the_same_work_in_every_case() {
        for case in &CASES {
            let (mut our_driver, mut ours) = our_side(case).unwrap();
            let (mut peer_driver, mut peer) = peer_side(case).unwrap();
            // More than 65,536 chains: the index wraps.
            for n in 0..1100 {
                our_driver.offer(case.burst);
                peer_driver.offer(case.burst);
                let did = ours.burst(case.burst).unwrap();
                assert_eq!(did, peer.burst(case.burst).unwrap(), "{case:?} {n}");
                assert_eq!(did.chains, u32::from(case.burst), "{case:?} {n}");
                assert_eq!(our_driver.used(), peer_driver.used(), "{case:?} {n}");
            }
            // Nothing offered, nothing done.
            assert_eq!(ours.burst(case.burst).unwrap().chains, 0);
            assert_eq!(peer.burst(case.burst).unwrap().chains, 0);
        }
    }
}
