//! Measures the cost of a descriptor chain for the device, on a split virtqueue of 256 entries that
//! is in the CPU's caches. The device dequeues the chain, translates each of its segments and marks
//! the chain as used. Once for each burst, it checks whether the driver wants an interrupt.
//!
//! Both sides run against the same simulated driver ([`driver`]), on virtqueues and in memory of
//! the same layout: [`ours`] is virtionet-virtqueue, [`virtio_queue`] is the crate virtio-queue.
//! The driver's part, one store of the available index for each burst, is included in both times.

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

/// The longest acceptable time of virtionetd for a chain of two descriptors, in nanoseconds.
const BOUND: f64 = 5.0;

/// Measures every case.
///
/// # Errors
/// When a side fails or processes a wrong number of chains.
pub fn run(effort: Effort) -> Result<GroupResult> {
    run_in_thread(|| {
        pin_to_last_cpu()?;
        let mut outcome = GroupResult::default();
        for case in &CASES {
            outcome.rows.push(measure(case, effort)?);
        }
        // The first and the last case are the same for virtionetd. The bound is an absolute time,
        // so the lower median counts: a disturbance can only make a measurement slower.
        let best = outcome.rows[0].ours.min(outcome.rows[CASES.len() - 1].ours);
        let name = format!("{}: absolute bound", CASES[0].name());
        let row = Row::new(&name, "ns/chain", Better::Lower, best, ("bound", BOUND));
        outcome.rows.push(row.with_bound(1.0));
        Ok(outcome)
    })
}

fn measure(case: &RingCase, effort: Effort) -> Result<Row> {
    // A sample is shorter than a time slice of the scheduler, so that no other program interrupts
    // most of the samples.
    let bursts = 100;
    let (mut our_driver, mut ours) = prepare_ours(case)?;
    let (mut peer_driver, mut peer) = prepare_peer(case)?;
    let samples = PairedSamples::measure_in_turns(
        effort.choose(1001, 51),
        || {
            time_bursts(&mut our_driver, case.burst, bursts, || {
                ours.process_burst(case.burst)
            })
        },
        || {
            time_bursts(&mut peer_driver, case.burst, bursts, || {
                peer.process_burst(case.burst)
            })
        },
    )?;
    Ok(samples.row(&case.name(), "ns/chain", Better::Lower, case.method.name()))
}

/// Creates our device and its driver.
///
/// # Errors
/// When the guest memory or the virtqueue cannot be created.
pub fn prepare_ours(case: &RingCase) -> Result<(ChainDriver, VirtqueueDevice)> {
    let driver = ChainDriver::new(case.shape, case.event_idx)?;
    let ours = VirtqueueDevice::new(&driver, case)?;
    Ok((driver, ours))
}

/// Creates the peer's device and its driver.
///
/// # Errors
/// When the guest memory or the virtqueue cannot be created.
pub fn prepare_peer(case: &RingCase) -> Result<(ChainDriver, VirtioQueueDevice)> {
    let driver = ChainDriver::new(case.shape, case.event_idx)?;
    let peer = VirtioQueueDevice::new(&driver, case)?;
    Ok((driver, peer))
}

/// Returns the nanoseconds per chain over `bursts` bursts of `burst_len` chains.
fn time_bursts(
    driver: &mut ChainDriver,
    burst_len: u16,
    bursts: u32,
    mut device: impl FnMut() -> Result<BurstResult>,
) -> Result<f64> {
    let mut chains = 0;
    let mut bytes = 0;
    let time = time_ns(|| {
        for _ in 0..bursts {
            driver.offer(burst_len);
            let result = black_box(device()?);
            chains += result.chains;
            bytes += result.bytes;
        }
        Ok(())
    })?;
    let expected = bursts * u32::from(burst_len);
    ensure!(
        chains == expected && bytes == driver::CHAIN_BYTES * usize::try_from(expected)?,
        "the device processed {chains} chains with {bytes} bytes instead of {expected} chains"
    );
    Ok(time / f64::from(chains))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_do_the_same_work_in_every_case() {
        for case in &CASES {
            let (mut our_driver, mut ours) = prepare_ours(case).unwrap();
            let (mut peer_driver, mut peer) = prepare_peer(case).unwrap();
            // These are more than 65,536 chains, so the index wraps.
            for n in 0..1100 {
                our_driver.offer(case.burst);
                peer_driver.offer(case.burst);
                let result = ours.process_burst(case.burst).unwrap();
                assert_eq!(
                    result,
                    peer.process_burst(case.burst).unwrap(),
                    "{case:?} {n}"
                );
                assert_eq!(result.chains, u32::from(case.burst), "{case:?} {n}");
                assert_eq!(our_driver.used(), peer_driver.used(), "{case:?} {n}");
            }
            // Without available chains, a burst is empty.
            assert_eq!(ours.process_burst(case.burst).unwrap().chains, 0);
            assert_eq!(peer.process_burst(case.burst).unwrap().chains, 0);
        }
    }
}
