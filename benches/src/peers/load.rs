//! What is sent through a back-end, and on which CPUs.

use std::path::PathBuf;

use anyhow::{Result, bail};
use virtionet_tests::paths::RunDir;
use virtionet_tests::sched::allowed_cpus;

/// Descriptors a ring.
pub const RING: u16 = 256;
/// A testpmd's memory in MiB: enough for the packet buffers of 64 pairs.
pub const MEMORY_MIB: u32 = 512;
/// Packet buffers that a testpmd has to spare.
const SPARE_MBUFS: u32 = 4096;
/// Most pairs of a card that virtio-user takes.
const MAX_QUEUE_PAIRS_PER_DEVICE: u16 = 8;

/// What the front-end does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficPattern {
    /// What comes in on one card goes out on the other: frames circulate both ways.
    Forward,
    /// Both cards send and take nothing.
    OneWay,
}

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardingLoad {
    /// What is sent.
    pub traffic: TrafficPattern,
    /// Bytes of a frame.
    pub size: u16,
    /// Queue pairs of each card; beyond 8 there are several couples of cards instead, with this
    /// many pairs together at either end.
    pub pairs: u16,
    /// Packed rings instead of split ones.
    pub packed: bool,
    /// Bursts that are put into circulation on each queue.
    pub bursts: u32,
}

impl ForwardingLoad {
    /// Couples of cards.
    #[must_use]
    pub fn device_pairs(self) -> u16 {
        self.pairs.div_ceil(MAX_QUEUE_PAIRS_PER_DEVICE)
    }

    /// Queue pairs of a card.
    #[must_use]
    pub fn queue_pairs_per_device(self) -> u16 {
        self.pairs / self.device_pairs()
    }

    /// Two packet buffers for each descriptor. A testpmd goes round through all that it has: with
    /// more of them it would wait for memory, and measure that.
    #[must_use]
    pub fn mbufs(self) -> u32 {
        SPARE_MBUFS + 2 * 4 * u32::from(RING) * u32::from(self.pairs)
    }

    /// A socket a card; cards 2k and 2k + 1 are a couple.
    #[must_use]
    pub fn sockets(self, dir: &RunDir) -> Vec<PathBuf> {
        (0..2 * self.device_pairs())
            .map(|n| dir.join(&format!("{n}.sock")))
            .collect()
    }
}

/// The CPU of either part; each back-end has the same one.
#[derive(Debug, Clone, Copy)]
pub struct Cpus {
    /// The front-end's.
    pub front: usize,
    /// The back-end's.
    pub back: usize,
}

impl Cpus {
    /// The first and the last that this process may use.
    ///
    /// # Errors
    /// When there is only one.
    pub fn get() -> Result<Self> {
        let all = allowed_cpus()?;
        match all[..] {
            [front, .., back] => Ok(Self { front, back }),
            _ => bail!(
                "only {} CPU may be used here: a front-end and a back-end need one each",
                all.len()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_pairs_than_a_card_takes_are_spread_over_couples() {
        for (pairs, device_pairs, each) in [(1, 1, 1), (8, 1, 8), (16, 2, 8), (64, 8, 8)] {
            let load = ForwardingLoad {
                traffic: TrafficPattern::Forward,
                size: 64,
                pairs,
                packed: false,
                bursts: 1,
            };
            assert_eq!(
                (load.device_pairs(), load.queue_pairs_per_device()),
                (device_pairs, each)
            );
        }
    }
}
