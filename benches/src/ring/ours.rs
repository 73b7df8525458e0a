//! virtionet-virtqueue, used as the TX path uses it.

use std::sync::Arc;

use anyhow::Result;
use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueConfig, VirtqueueLayout};

use super::case::{BurstResult, ChainShape, RingCase};
use super::driver::{ChainDriver, QUEUE_SIZE};

/// The device side of a virtqueue, with virtionet-virtqueue.
#[derive(Debug)]
pub struct VirtqueueDevice {
    virtqueue: Virtqueue,
    burst: Burst,
}

impl VirtqueueDevice {
    /// Creates the device side of the driver's virtqueue.
    ///
    /// # Errors
    /// When the virtqueue cannot be created.
    pub fn new(driver: &ChainDriver, case: &RingCase) -> Result<Self> {
        let memory = Arc::new(driver.ram().guest_memory()?);
        let addresses = driver.addresses();
        let config = VirtqueueConfig {
            layout: VirtqueueLayout {
                size: QUEUE_SIZE,
                desc: driver.user_addr(addresses.descriptors)?,
                avail: driver.user_addr(addresses.driver)?,
                used: driver.user_addr(addresses.device)?,
            },
            base: 0,
            direction: Direction::Readable,
            packed: false,
            event_idx: case.event_idx,
            indirect: case.shape == ChainShape::Indirect,
            min_len: 12,
        };
        Ok(Self {
            virtqueue: Virtqueue::new(config, &memory)?,
            burst: Burst::new(memory),
        })
    }

    /// Dequeues up to `max_chains` chains, reads the length of every segment, and marks the chains
    /// as used.
    ///
    /// # Errors
    /// When the virtqueue has a fault.
    #[inline]
    pub fn process_burst(&mut self, max_chains: u16) -> Result<BurstResult> {
        let mut result = BurstResult::default();
        self.virtqueue.dequeue(&mut self.burst, max_chains.into())?;
        for chain in self.burst.chains() {
            for slice in self.burst.slices(chain) {
                result.bytes += slice.len();
            }
            result.chains += 1;
        }
        self.virtqueue.complete_all(self.burst.chains());
        self.burst.clear();
        result.needs_call = self.virtqueue.publish();
        Ok(result)
    }
}
