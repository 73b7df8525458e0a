//! The frames that are sent through a back-end, and the CPUs of both sides.

use std::path::PathBuf;

use anyhow::{Result, bail};
use virtionet_tests::paths::RunDir;
use virtionet_tests::sched::allowed_cpus;

/// Size of every virtqueue.
pub const QUEUE_SIZE: u16 = 256;
/// Memory of a testpmd in MiB, which is enough for the packet buffers of 64 queue pairs.
pub const MEMORY_MIB: u32 = 512;
/// Packet buffers of a testpmd beyond those of its virtqueues.
const SPARE_MBUFS: u32 = 4096;
/// The largest number of queue pairs of a virtio-user device.
const MAX_QUEUE_PAIRS_PER_DEVICE: u16 = 8;

/// The traffic that the front-end generates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficPattern {
    /// Frames that one network device receives are sent by the other one, so frames circulate in
    /// both directions.
    Forward,
    /// Both network devices send and do not receive.
    OneWay,
}

/// The load of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardingLoad {
    /// The traffic that the front-end generates.
    pub traffic: TrafficPattern,
    /// Length of a frame in bytes.
    pub frame_len: u16,
    /// Queue pairs at each end. Up to 8, one network device has all of them; beyond, they are
    /// distributed over several network devices.
    pub queue_pairs: u16,
    /// Whether the virtqueues are packed instead of split.
    pub is_packed: bool,
    /// Number of bursts that circulate on each queue.
    pub bursts: u32,
}

impl ForwardingLoad {
    /// Number of pairs of network devices.
    #[must_use]
    pub fn device_pairs(self) -> u16 {
        self.queue_pairs.div_ceil(MAX_QUEUE_PAIRS_PER_DEVICE)
    }

    /// Number of queue pairs of each network device.
    #[must_use]
    pub fn queue_pairs_per_device(self) -> u16 {
        self.queue_pairs / self.device_pairs()
    }

    /// Number of packet buffers, two for each descriptor. A testpmd uses all of its packet buffers
    /// in turn. With more of them, the time for cache misses would dominate the measurement.
    #[must_use]
    pub fn mbufs(self) -> u32 {
        SPARE_MBUFS + 2 * 4 * u32::from(QUEUE_SIZE) * u32::from(self.queue_pairs)
    }

    /// One socket for each network device. Frames are forwarded between devices 2k and 2k + 1.
    #[must_use]
    pub fn sockets(self, dir: &RunDir) -> Vec<PathBuf> {
        (0..2 * self.device_pairs())
            .map(|n| dir.join(&format!("{n}.sock")))
            .collect()
    }
}

/// The CPUs of the front-end and of the back-end. All back-ends run on the same CPU.
#[derive(Debug, Clone, Copy)]
pub struct Cpus {
    /// The CPU of the front-end.
    pub front_end: usize,
    /// The CPU of the back-end.
    pub back_end: usize,
}

impl Cpus {
    /// Returns the first and the last CPU that this process may use.
    ///
    /// # Errors
    /// When this process may use only one CPU.
    pub fn get() -> Result<Self> {
        let all = allowed_cpus()?;
        match all[..] {
            [front_end, .., back_end] => Ok(Self {
                front_end,
                back_end,
            }),
            _ => bail!(
                "this process may use only {} CPU, but the front-end and the back-end need one each",
                all.len()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_pairs_beyond_the_limit_of_a_device_are_distributed_over_devices() {
        for (queue_pairs, device_pairs, per_device) in
            [(1, 1, 1), (8, 1, 8), (16, 2, 8), (64, 8, 8)]
        {
            let load = ForwardingLoad {
                traffic: TrafficPattern::Forward,
                frame_len: 64,
                queue_pairs,
                is_packed: false,
                bursts: 1,
            };
            assert_eq!(
                (load.device_pairs(), load.queue_pairs_per_device()),
                (device_pairs, per_device)
            );
        }
    }
}
