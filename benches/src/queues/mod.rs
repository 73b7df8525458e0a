//! Compares several queue pairs with one queue pair in the same guest.
//!
//! The guest has the largest of the numbers of queue pairs, and `ethtool -L` in the guest sets how
//! many it uses. Therefore both sides have the same boot, the same daemon and the same TAP. There
//! are two guests, one pinned and one floating ([`testbed::VcpuPlacement`]), of which one runs at a
//! time. Every round measures each load with each number of queue pairs in turn.

pub mod bulk;
mod figures;
pub mod latency;
pub mod testbed;

use anyhow::{Context, Result};
use virtionet_tests::accel::Accel;
use virtionet_tests::iperf::Direction;

use self::bulk::{Traffic, TrafficKind};
use self::figures::{BulkCell, Column, LatencyCell, QueueFigures};
use self::latency::BackgroundLoad;
use self::testbed::{GuestTestbed, VCPUS, VcpuPlacement};
use crate::harness::progress;
use crate::outcome::GroupResult;
use crate::sampling::Effort;

const FLOWS: [u16; 2] = [1, 8];
const DIRECTIONS: [Direction; 2] = [Direction::HostToGuest, Direction::GuestToHost];
const BACKGROUND_LOADS: [BackgroundLoad; 3] = [
    BackgroundLoad::Nothing,
    BackgroundLoad::Flow(Direction::HostToGuest),
    BackgroundLoad::Flow(Direction::GuestToHost),
];

/// Measures each number of queue pairs in `several` against one queue pair.
///
/// # Errors
/// When this process is not root, or a part of the testbed fails. The error contains its
/// message.
pub fn run(effort: Effort, several: &[u16]) -> Result<GroupResult> {
    let max_queue_pairs = several.iter().copied().max().unwrap_or(1);
    progress("queues: two guests boot");
    let testbeds = VcpuPlacement::ALL
        .into_iter()
        .map(|vcpu_placement| {
            GuestTestbed::boot(vcpu_placement, max_queue_pairs)
                .map(|testbed| (vcpu_placement, testbed))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut columns = vec![1];
    columns.extend(several);
    let mut figures = QueueFigures::new(traffics(), &BACKGROUND_LOADS, &columns);
    for number in 1..=effort.choose(5_u32, 1) {
        for (vcpu_placement, testbed) in &testbeds {
            let label = format!("queues: round {number}, {}", vcpu_placement.name());
            let round = Round {
                testbed,
                number,
                seconds: effort.choose(2, 1),
                label,
            };
            round
                .measure(&mut figures, *vcpu_placement)
                .with_context(|| format!("in round {number}, {}", vcpu_placement.name()))?;
        }
    }
    let accel = Accel::Auto.resolve()?;
    let mut outcome = figures.outcome();
    outcome.notes.push(format!(
        "{VCPUS} vCPUs under {accel}; ethtool -L in the guest switches between the numbers of queue pairs; at most one iperf3 process for each vCPU"
    ));
    Ok(outcome)
}

fn traffics() -> Vec<Traffic> {
    let mut traffics = Vec::new();
    for direction in DIRECTIONS {
        for kind in TrafficKind::ALL {
            // The host merges small writes into large frames before the network device receives
            // them.
            if kind == TrafficKind::Writes && direction == Direction::HostToGuest {
                continue;
            }
            traffics.extend(FLOWS.map(|flows| Traffic {
                direction,
                flows,
                kind,
            }));
        }
    }
    traffics
}

/// The measurement of one guest in one round.
struct Round<'a> {
    testbed: &'a GuestTestbed,
    number: u32,
    seconds: u32,
    label: String,
}

impl Round<'_> {
    fn measure(&self, figures: &mut QueueFigures, vcpu_placement: VcpuPlacement) -> Result<()> {
        for cell in figures
            .bulk
            .iter_mut()
            .filter(|c| c.vcpu_placement == vcpu_placement)
        {
            self.measure_bulk(cell)?;
        }
        for cell in figures
            .latency
            .iter_mut()
            .filter(|c| c.vcpu_placement == vcpu_placement)
        {
            self.measure_latency(cell)?;
        }
        Ok(())
    }

    /// Returns the columns in reverse order in every other round, so that the order does not favour
    /// a side.
    fn in_alternating_order<'a, T>(
        &self,
        columns: &'a mut [Column<T>],
    ) -> Box<dyn Iterator<Item = &'a mut Column<T>> + 'a> {
        match self.number.is_multiple_of(2) {
            true => Box::new(columns.iter_mut().rev()),
            false => Box::new(columns.iter_mut()),
        }
    }

    fn measure_bulk(&self, cell: &mut BulkCell) -> Result<()> {
        for Column {
            queue_pairs,
            samples,
        } in self.in_alternating_order(&mut cell.columns)
        {
            let sample = bulk::measure(self.testbed, cell.traffic, *queue_pairs, self.seconds)?;
            let name = cell.traffic.name();
            progress(&format!(
                "{}: {name}, {queue_pairs} queue pair(s): {:.3} Gbit/s",
                self.label, sample.gbps
            ));
            samples.push(sample);
        }
        Ok(())
    }

    fn measure_latency(&self, cell: &mut LatencyCell) -> Result<()> {
        for Column {
            queue_pairs,
            samples,
        } in self.in_alternating_order(&mut cell.columns)
        {
            let percentiles =
                latency::measure(self.testbed, cell.background, *queue_pairs, self.seconds)?;
            let name = cell.background.name();
            progress(&format!(
                "{}: {name}, {queue_pairs} queue pair(s): {:.0} us, p99 {:.0} us",
                self.label, percentiles.median, percentiles.p99
            ));
            samples.push(percentiles);
        }
        Ok(())
    }
}
