//! virtio-queue, used as its documentation shows: chains by `pop_descriptor_chain` or by `iter`,
//! each piece translated by `get_slice`, `add_used` a chain, `needs_notification` a burst. The
//! memory is borrowed: what its users do with an `Arc` a chain costs more.

use anyhow::{Context, Result};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtionet_guest::memory::GuestRam;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::case::{BurstResult, DequeueMethod, RingCase};
use super::driver::{ChainDriver, SIZE};

/// The stock device's side of the ring.
#[derive(Debug)]
pub struct VirtioQueueDevice {
    queue: Queue,
    memory: GuestMemoryMmap,
    method: DequeueMethod,
    heads: Vec<u16>,
}

impl VirtioQueueDevice {
    /// On the driver's ring.
    ///
    /// # Errors
    /// When the ring cannot be had.
    pub fn new(driver: &ChainDriver, case: &RingCase) -> Result<Self> {
        let memory = map(driver.ram())?;
        let at = driver.addresses();
        let mut queue = Queue::new(SIZE)?;
        queue.try_set_desc_table_address(GuestAddress(at.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(at.driver))?;
        queue.try_set_used_ring_address(GuestAddress(at.device))?;
        queue.set_event_idx(case.event_idx);
        queue.set_ready(true);
        Ok(Self {
            queue,
            memory,
            method: case.method,
            heads: Vec::new(),
        })
    }

    /// Takes up to `most` chains, looks at every piece and gives them back.
    ///
    /// # Errors
    /// When the ring is broken.
    #[inline]
    pub fn burst(&mut self, most: u16) -> Result<BurstResult> {
        let mut did = match self.method {
            DequeueMethod::Pop => self.pop(most)?,
            DequeueMethod::Iter => self.iterate(most)?,
        };
        if did.chains > 0 {
            did.call = self.queue.needs_notification(&self.memory)?;
        }
        Ok(did)
    }

    fn pop(&mut self, most: u16) -> Result<BurstResult> {
        let mut did = BurstResult::default();
        while did.chains < most.into() {
            let Some(chain) = self.queue.pop_descriptor_chain(&self.memory) else {
                break;
            };
            let head = chain.head_index();
            for desc in chain {
                did.bytes += length(&self.memory, desc.addr(), desc.len())?;
            }
            self.queue.add_used(&self.memory, head, 0)?;
            did.chains += 1;
        }
        Ok(did)
    }

    fn iterate(&mut self, most: u16) -> Result<BurstResult> {
        let mut did = BurstResult::default();
        self.heads.clear();
        for chain in self.queue.iter(&self.memory)?.take(most.into()) {
            self.heads.push(chain.head_index());
            for desc in chain {
                did.bytes += length(&self.memory, desc.addr(), desc.len())?;
            }
        }
        for head in &self.heads {
            self.queue.add_used(&self.memory, *head, 0)?;
            did.chains += 1;
        }
        Ok(did)
    }
}

/// Translates a piece; its length.
#[inline]
fn length(memory: &GuestMemoryMmap, addr: GuestAddress, len: u32) -> Result<usize> {
    Ok(memory.get_slice(addr, usize::try_from(len)?)?.len())
}

/// The guest's memory as vm-memory maps it.
fn map(ram: &GuestRam) -> Result<GuestMemoryMmap> {
    let mut ranges = Vec::new();
    for region in ram.regions() {
        let file = ram.file().try_clone().context("no descriptor is left")?;
        let part = FileOffset::new(file, region.file_offset);
        let size = usize::try_from(region.size)?;
        ranges.push((GuestAddress(region.guest_addr), size, Some(part)));
    }
    Ok(GuestMemoryMmap::from_ranges_with_files(ranges)?)
}
