//! What several queue pairs cost and bring against one, in the same guest.
//!
//! The guest has as many pairs as the most of them; `ethtool -L` in it says how many it uses, so
//! that both sides are one boot, one daemon and one TAP. There are two guests, one pinned and one
//! floating ([`testbed::VcpuPlacement`]), of which one runs at a time. Every round measures each load with
//! each number of pairs in turn.

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

/// Measures one pair against each of `several`.
///
/// # Errors
/// When this process is not root, or a part fails: with its words.
pub fn run(effort: Effort, several: &[u16]) -> Result<GroupResult> {
    let most = several.iter().copied().max().unwrap_or(1);
    progress("queues: two guests boot");
    let testbeds = VcpuPlacement::ALL
        .into_iter()
        .map(|vcpu_placement| {
            GuestTestbed::boot(vcpu_placement, most).map(|testbed| (vcpu_placement, testbed))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut columns = vec![1];
    columns.extend(several);
    let mut figures = QueueFigures::new(traffics(), &BACKGROUND_LOADS, &columns);
    for number in 1..=effort.choose(5_u32, 1) {
        for (vcpu_placement, testbed) in &testbeds {
            let what = format!("queues: round {number}, {}", vcpu_placement.name());
            let round = Round {
                testbed,
                number,
                seconds: effort.choose(2, 1),
                what,
            };
            round
                .take(&mut figures, *vcpu_placement)
                .with_context(|| format!("in round {number}, {}", vcpu_placement.name()))?;
        }
    }
    let accel = Accel::Auto.resolve()?;
    let mut outcome = figures.outcome();
    outcome.notes.push(format!(
        "{VCPUS} vCPUs under {accel}; ethtool -L in the guest switches between the numbers of pairs; one iperf3 process a vCPU at most"
    ));
    Ok(outcome)
}

fn traffics() -> Vec<Traffic> {
    let mut all = Vec::new();
    for direction in DIRECTIONS {
        for kind in TrafficKind::ALL {
            // The host would make large frames of them before they reach the card.
            if kind == TrafficKind::Writes && direction == Direction::HostToGuest {
                continue;
            }
            all.extend(FLOWS.map(|flows| Traffic {
                direction,
                flows,
                kind,
            }));
        }
    }
    all
}

/// One guest's turn.
struct Round<'a> {
    testbed: &'a GuestTestbed,
    number: u32,
    seconds: u32,
    what: String,
}

impl Round<'_> {
    fn take(&self, figures: &mut QueueFigures, vcpu_placement: VcpuPlacement) -> Result<()> {
        for cell in figures
            .bulk
            .iter_mut()
            .filter(|c| c.vcpu_placement == vcpu_placement)
        {
            self.bulk(cell)?;
        }
        for cell in figures
            .latency
            .iter_mut()
            .filter(|c| c.vcpu_placement == vcpu_placement)
        {
            self.latency(cell)?;
        }
        Ok(())
    }

    /// Every other round backwards: what only comes first or last is nobody's gain.
    fn alternate<'a, T>(
        &self,
        columns: &'a mut [Column<T>],
    ) -> Box<dyn Iterator<Item = &'a mut Column<T>> + 'a> {
        match self.number.is_multiple_of(2) {
            true => Box::new(columns.iter_mut().rev()),
            false => Box::new(columns.iter_mut()),
        }
    }

    fn bulk(&self, cell: &mut BulkCell) -> Result<()> {
        for Column { pairs, samples } in self.alternate(&mut cell.columns) {
            let sample = bulk::measure(self.testbed, cell.traffic, *pairs, self.seconds)?;
            let name = cell.traffic.name();
            progress(&format!(
                "{}: {name}, {pairs} pair(s): {:.3} Gbit/s",
                self.what, sample.gbps
            ));
            samples.push(sample);
        }
        Ok(())
    }

    fn latency(&self, cell: &mut LatencyCell) -> Result<()> {
        for Column { pairs, samples } in self.alternate(&mut cell.columns) {
            let times = latency::measure(self.testbed, cell.background, *pairs, self.seconds)?;
            let name = cell.background.name();
            progress(&format!(
                "{}: {name}, {pairs} pair(s): {:.0} us, p99 {:.0} us",
                self.what, times.median, times.p99
            ));
            samples.push(times);
        }
        Ok(())
    }
}
