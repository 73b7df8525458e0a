//! The common part of TX and RX queues: a virtqueue, the chains dequeued from it, and its counters.

use std::sync::Arc;

use virtionet_virtqueue::memory::GuestMemory;
use virtionet_virtqueue::{
    Burst, ChainFault, CrashRecord, Direction, Virtqueue, VirtqueueConfig, VirtqueueError,
    VirtqueueLayout,
};

use crate::features::Features;
use crate::header::MIN_FRAME;
use crate::stats::VringStats;

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Everything that a TX or RX queue needs to start.
#[derive(Debug, Clone)]
pub struct QueueConfig {
    /// The addresses and the size of the virtqueue.
    pub layout: VirtqueueLayout,
    /// The index at which the virtqueue continues.
    pub base: u32,
    /// The features that the driver negotiated.
    pub features: Features,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The counters of the vring.
    pub stats: Arc<VringStats>,
    /// Where the progress of a packed virtqueue is recorded, if it is.
    pub record: Option<CrashRecord>,
}

/// The operations that TX and RX queues have in common.
pub trait DeviceQueue: Sized {
    /// Creates a queue on a virtqueue of the guest.
    ///
    /// # Errors
    /// When the configuration does not describe a virtqueue.
    fn new(config: QueueConfig) -> Result<Self, VirtqueueError>;

    /// Its virtqueue.
    fn virtqueue(&self) -> &Virtqueue;

    /// The chains that are dequeued and unused.
    fn burst(&self) -> &Burst;

    /// Rewinds the chains that are dequeued and unused; returns the index at which the virtqueue
    /// continues.
    fn rewind(&mut self) -> u32;

    /// Continues in another snapshot of guest memory.
    ///
    /// # Errors
    /// When the virtqueue is not within it.
    fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError>;

    /// Logs what is written to the virtqueue itself, as [`Virtqueue::set_used_log`] says.
    fn set_used_log(&mut self, used_log: Option<u64>);

    /// The guest's memory.
    fn memory(&self) -> &Arc<GuestMemory> {
        self.burst().memory()
    }

    /// Whether chains are available that the queue could not dequeue, because the translation of an
    /// address of theirs is missing (VIRTIO_F_ACCESS_PLATFORM).
    fn waits_for_translation(&self) -> bool {
        self.burst().waits_for_translation()
    }

    /// Rewinds the chains that are dequeued and unused, and drops all copies of translations.
    fn forget_translations(&mut self);

    /// Asks the driver for kicks. Returns true when chains became available meanwhile, for which
    /// there may be no kick.
    #[must_use]
    fn enable_kicks(&mut self) -> bool;

    /// Tells the driver that kicks are not needed.
    fn disable_kicks(&mut self);
}

/// A running virtqueue, the chains dequeued from it, and its counters.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) virtqueue: Virtqueue,
    pub(crate) burst: Burst,
    pub(crate) features: Features,
    pub(crate) stats: Arc<VringStats>,
    direction: Direction,
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
        let mut virtqueue = Virtqueue::new(virtqueue, &config.memory)?;
        if let Some(record) = config.record {
            virtqueue = virtqueue.with_record(record, &config.memory);
        }
        Ok(Self {
            virtqueue,
            burst: Burst::with_direction(config.memory, direction),
            direction,
            features,
            stats: config.stats,
        })
    }

    /// Rewinds unused chains; returns the index at which the virtqueue continues.
    pub(crate) fn rewind(&mut self) -> u32 {
        self.virtqueue.rewind(&mut self.burst);
        self.virtqueue.base()
    }

    /// Continues in another snapshot of guest memory.
    pub(crate) fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError> {
        self.rewind();
        self.virtqueue = self.virtqueue.rebind(memory)?;
        self.burst = Burst::with_direction(Arc::clone(memory), self.direction);
        Ok(())
    }

    /// Rewinds unused chains, and drops all copies of translations.
    pub(crate) fn forget_translations(&mut self) {
        self.rewind();
        self.burst.forget_translations();
        self.stats.iotlb_invalidations.add(1);
    }

    /// Sets where writes to the virtqueue itself are logged.
    pub(crate) fn set_used_log(&mut self, used_log: Option<u64>) {
        self.virtqueue.set_used_log(used_log, self.burst.memory());
    }
}

/// The shortest chain that is valid: it holds the header and, on RX without mergeable buffers, the
/// shortest frame.
fn min_chain_len(direction: Direction, features: Features) -> u32 {
    let frame = match direction {
        Direction::Writable if !features.has_mergeable_buffers() => MIN_FRAME,
        _ => 0,
    };
    u32::try_from(features.header_len() + frame).unwrap_or(u32::MAX)
}

/// Adds a chain's fault to its counter.
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
