//! virtio-queue, used as its documentation shows: `pop_descriptor_chain` or `iter` dequeue chains,
//! `get_slice` translates each segment, `add_used` is called for each chain, and
//! `needs_notification` for each burst. The memory is borrowed, because an `Arc` for each chain,
//! which other users have, costs more.

use anyhow::{Context, Result};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtionet_guest::memory::GuestRam;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::case::{BurstResult, DequeueMethod, RingCase};
use super::driver::{ChainDriver, QUEUE_SIZE};

/// The device side of a virtqueue, with virtio-queue.
#[derive(Debug)]
pub struct VirtioQueueDevice {
    queue: Queue,
    memory: GuestMemoryMmap,
    method: DequeueMethod,
    heads: Vec<u16>,
}

impl VirtioQueueDevice {
    /// Creates the device side of the driver's virtqueue.
    ///
    /// # Errors
    /// When the virtqueue cannot be created.
    pub fn new(driver: &ChainDriver, case: &RingCase) -> Result<Self> {
        let memory = map_memory(driver.ram())?;
        let addresses = driver.addresses();
        let mut queue = Queue::new(QUEUE_SIZE)?;
        queue.try_set_desc_table_address(GuestAddress(addresses.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(addresses.driver))?;
        queue.try_set_used_ring_address(GuestAddress(addresses.device))?;
        queue.set_event_idx(case.event_idx);
        queue.set_ready(true);
        Ok(Self {
            queue,
            memory,
            method: case.method,
            heads: Vec::new(),
        })
    }

    /// Dequeues up to `max_chains` chains, reads the length of every segment, and marks the chains
    /// as used.
    ///
    /// # Errors
    /// When the virtqueue has a fault.
    #[inline]
    pub fn process_burst(&mut self, max_chains: u16) -> Result<BurstResult> {
        let mut result = match self.method {
            DequeueMethod::Pop => self.pop(max_chains)?,
            DequeueMethod::Iter => self.iterate(max_chains)?,
        };
        if result.chains > 0 {
            result.needs_call = self.queue.needs_notification(&self.memory)?;
        }
        Ok(result)
    }

    fn pop(&mut self, max_chains: u16) -> Result<BurstResult> {
        let mut result = BurstResult::default();
        while result.chains < max_chains.into() {
            let Some(chain) = self.queue.pop_descriptor_chain(&self.memory) else {
                break;
            };
            let head = chain.head_index();
            for desc in chain {
                result.bytes += translate(&self.memory, desc.addr(), desc.len())?;
            }
            self.queue.add_used(&self.memory, head, 0)?;
            result.chains += 1;
        }
        Ok(result)
    }

    fn iterate(&mut self, max_chains: u16) -> Result<BurstResult> {
        let mut result = BurstResult::default();
        self.heads.clear();
        for chain in self.queue.iter(&self.memory)?.take(max_chains.into()) {
            self.heads.push(chain.head_index());
            for desc in chain {
                result.bytes += translate(&self.memory, desc.addr(), desc.len())?;
            }
        }
        for head in &self.heads {
            self.queue.add_used(&self.memory, *head, 0)?;
            result.chains += 1;
        }
        Ok(result)
    }
}

/// Translates a segment and returns its length.
#[inline]
fn translate(memory: &GuestMemoryMmap, addr: GuestAddress, len: u32) -> Result<usize> {
    Ok(memory.get_slice(addr, usize::try_from(len)?)?.len())
}

/// Maps the guest memory with vm-memory.
fn map_memory(ram: &GuestRam) -> Result<GuestMemoryMmap> {
    let mut ranges = Vec::new();
    for region in ram.regions() {
        let file = ram
            .file()
            .try_clone()
            .context("the file descriptor of guest memory cannot be duplicated")?;
        let file_offset = FileOffset::new(file, region.file_offset);
        let size = usize::try_from(region.size)?;
        ranges.push((GuestAddress(region.guest_addr), size, Some(file_offset)));
    }
    Ok(GuestMemoryMmap::from_ranges_with_files(ranges)?)
}
