//! virtionet-virtqueue, used as the TX path uses it.

use std::sync::Arc;

use anyhow::Result;
use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueConfig, VirtqueueLayout};

use super::case::{BurstResult, RingCase, Shape};
use super::driver::{ChainDriver, SIZE};

/// Our device's side of the ring.
#[derive(Debug)]
pub struct VirtqueueDevice {
    ring: Virtqueue,
    burst: Burst,
}

impl VirtqueueDevice {
    /// On the driver's ring.
    ///
    /// # Errors
    /// When the ring cannot be had.
    pub fn new(driver: &ChainDriver, case: &RingCase) -> Result<Self> {
        let memory = Arc::new(driver.ram().guest_memory()?);
        let at = driver.addresses();
        let config = VirtqueueConfig {
            layout: VirtqueueLayout {
                size: SIZE,
                desc: driver.user_addr(at.descriptors)?,
                avail: driver.user_addr(at.driver)?,
                used: driver.user_addr(at.device)?,
            },
            base: 0,
            direction: Direction::Readable,
            packed: false,
            event_idx: case.event_idx,
            indirect: case.shape == Shape::Indirect,
            min_len: 12,
        };
        Ok(Self {
            ring: Virtqueue::new(config, &memory)?,
            burst: Burst::new(memory),
        })
    }

    /// Takes up to `most` chains, looks at every piece, gives them back and publishes that.
    ///
    /// # Errors
    /// When the ring is broken.
    #[inline]
    pub fn burst(&mut self, most: u16) -> Result<BurstResult> {
        let mut did = BurstResult::default();
        self.ring.dequeue(&mut self.burst, most.into())?;
        for chain in self.burst.chains() {
            for slice in self.burst.slices(chain) {
                did.bytes += slice.len();
            }
            did.chains += 1;
        }
        self.ring.complete_all(self.burst.chains());
        self.burst.clear();
        did.call = self.ring.publish();
        Ok(did)
    }
}
