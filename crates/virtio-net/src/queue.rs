//! What TX and RX queues share: a ring with the chains taken from it, and what they report.

use std::sync::Arc;

use virtionet_virtqueue::memory::GuestMemory;
use virtionet_virtqueue::{
    Burst, ChainFault, Direction, Virtqueue, VirtqueueConfig, VirtqueueError, VirtqueueLayout,
};

use crate::features::Features;
use crate::header::MIN_FRAME;
use crate::stats::VringStats;

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// All that a TX or RX queue needs to start.
#[derive(Debug, Clone)]
pub struct QueueConfig {
    /// Where its ring lies.
    pub layout: VirtqueueLayout,
    /// Where its ring goes on.
    pub base: u32,
    /// What the driver negotiated.
    pub features: Features,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Where it counts.
    pub stats: Arc<VringStats>,
}

/// What every queue of a device can do, whichever way its frames go.
pub trait DeviceQueue: Sized {
    /// A queue on a ring of the guest.
    ///
    /// # Errors
    /// When the configuration cannot be a ring.
    fn new(config: QueueConfig) -> Result<Self, VirtqueueError>;

    /// Number of descriptors.
    fn size(&self) -> u16;

    /// Gives back what is taken and unused; says where the ring goes on.
    fn rewind(&mut self) -> u32;

    /// Goes on in another snapshot of memory.
    ///
    /// # Errors
    /// When the ring is not in it.
    fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError>;

    /// Asks the driver for kicks; true when chains came meanwhile, for which no kick may come.
    #[must_use]
    fn enable_kicks(&mut self) -> bool;

    /// Tells the driver that kicks are not needed.
    fn disable_kicks(&mut self);
}

/// A running ring, the chains taken from it, and its counters.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) virtqueue: Virtqueue,
    pub(crate) burst: Burst,
    pub(crate) features: Features,
    pub(crate) stats: Arc<VringStats>,
}

impl Queue {
    pub(crate) fn new(config: QueueConfig, direction: Direction) -> Result<Self, VirtqueueError> {
        let features = config.features;
        let virtqueue = VirtqueueConfig {
            layout: config.layout,
            base: config.base,
            direction,
            packed: features.has(VIRTIO_F_RING_PACKED),
            event_idx: features.has(VIRTIO_RING_F_EVENT_IDX),
            indirect: features.has(VIRTIO_RING_F_INDIRECT_DESC),
            min_len: min_chain_len(direction, features),
        };
        Ok(Self {
            virtqueue: Virtqueue::new(virtqueue, &config.memory)?,
            burst: Burst::new(config.memory),
            features,
            stats: config.stats,
        })
    }

    /// Gives unused chains back; says where the ring would go on.
    pub(crate) fn rewind(&mut self) -> u32 {
        self.virtqueue.rewind(&mut self.burst);
        self.virtqueue.base()
    }

    /// Goes on in another snapshot of memory.
    pub(crate) fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError> {
        self.rewind();
        self.virtqueue = self.virtqueue.rebind(memory)?;
        self.burst = Burst::new(Arc::clone(memory));
        Ok(())
    }
}

/// What a chain must have at least: room for the header, and on RX without merging for a frame.
fn min_chain_len(direction: Direction, features: Features) -> u32 {
    let frame = match direction {
        Direction::Writable if !features.has_mergeable_buffers() => MIN_FRAME,
        _ => 0,
    };
    u32::try_from(features.header_len() + frame).unwrap_or(u32::MAX)
}

/// Counts a chain's fault under its name.
pub(crate) fn count_fault(fault: ChainFault, direction: Direction, stats: &VringStats) {
    let counter = match fault {
        ChainFault::Loop => &stats.chain_loop,
        ChainFault::TooLong => &stats.chain_too_long,
        ChainFault::TooBig => &stats.chain_too_big,
        ChainFault::TooShort if direction == Direction::Readable => &stats.header_missing,
        ChainFault::TooShort => &stats.rx_buffer_too_small,
        ChainFault::NextOutOfRange => &stats.chain_next_out_of_range,
        ChainFault::AddressInvalid => &stats.address_invalid,
        ChainFault::DirectionWrong => &stats.direction_wrong,
        ChainFault::IndirectNested => &stats.indirect_nested,
        ChainFault::IndirectWithNext => &stats.indirect_with_next,
        ChainFault::IndirectBadLength => &stats.indirect_bad_length,
        ChainFault::IndirectUnmapped => &stats.indirect_unmapped,
        ChainFault::IndirectNotNegotiated => &stats.indirect_not_negotiated,
    };
    counter.add(1);
}
