//! The configuration of a queue pair, and what its two queues have in common.

use virtio_bindings::virtio_config as config;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring as ring;

use crate::config::VirtqueueAddresses;
use crate::driver::DriverVirtqueue;
use crate::error::Error;
use crate::eventfd::WaitableEventFd;
use crate::header::HEADER_LEN;

/// The size in bytes of a mergeable RX buffer that holds a frame of the usual MTU.
pub const MERGEABLE_BUFFER: u32 = 1526;
/// The size in bytes of an RX buffer for any frame without VLAN tags, header included: the minimum
/// for a driver that accepts segmented frames without mergeable buffers (virtio 1.3 §5.1.6.3.1).
pub const BIG_BUFFER: u32 = 65_562;

/// The features that a current Linux guest negotiates with this device.
pub const MODERN: u64 = 1 << config::VIRTIO_F_VERSION_1
    | 1 << ring::VIRTIO_RING_F_EVENT_IDX
    | 1 << ring::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << net::VIRTIO_NET_F_MRG_RXBUF
    | 1 << net::VIRTIO_NET_F_MQ
    | OFFLOADS;

/// VIRTIO_F_RING_PACKED, which is not part of [`MODERN`].
pub const PACKED: u64 = 1 << config::VIRTIO_F_RING_PACKED;

/// Checksum and TCP segmentation offloads in both directions.
pub const OFFLOADS: u64 = 1 << net::VIRTIO_NET_F_CSUM
    | 1 << net::VIRTIO_NET_F_GUEST_CSUM
    | 1 << net::VIRTIO_NET_F_HOST_TSO4
    | 1 << net::VIRTIO_NET_F_HOST_TSO6
    | 1 << net::VIRTIO_NET_F_HOST_ECN
    | 1 << net::VIRTIO_NET_F_GUEST_TSO4
    | 1 << net::VIRTIO_NET_F_GUEST_TSO6
    | 1 << net::VIRTIO_NET_F_GUEST_ECN;

/// How a TX frame is divided into buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxLayout {
    /// The header and frame in one buffer (needs VIRTIO_F_VERSION_1 or VIRTIO_F_ANY_LAYOUT).
    Single,
    /// The header in one buffer and the frame in another.
    SeparateHeader,
    /// Header and frame together in buffers of this many bytes, which must not be 0.
    Segments(u32),
}

/// How the queues of a queue pair are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverQueueConfig {
    /// The size of each virtqueue in descriptors.
    pub size: u16,
    /// The negotiated feature bits.
    pub features: u64,
    /// The position at which the virtqueues start; see
    /// [`crate::driver::DriverVirtqueueConfig::start`].
    pub start: u16,
    /// The size in bytes of each segment of an RX buffer.
    pub rx_buffer: Vec<u32>,
    /// The size in bytes of a TX slot, which holds a frame and its header.
    pub tx_slot: u32,
    /// How TX frames are divided into buffers.
    pub tx_layout: TxLayout,
}

impl DriverQueueConfig {
    /// The configuration of a Linux driver with these features: mergeable buffers of
    /// [`MERGEABLE_BUFFER`] bytes, or buffers of [`BIG_BUFFER`] bytes if it accepts segmented
    /// frames that are not merged, or else buffers for one frame of the usual MTU.
    #[must_use]
    pub fn new(size: u16, features: u64) -> Self {
        let segments = 1 << net::VIRTIO_NET_F_GUEST_TSO4
            | 1 << net::VIRTIO_NET_F_GUEST_TSO6
            | 1 << net::VIRTIO_NET_F_GUEST_UFO;
        let mergeable = features >> net::VIRTIO_NET_F_MRG_RXBUF & 1 == 1;
        let big = !mergeable && features & segments != 0;
        Self {
            size,
            features,
            start: 0,
            rx_buffer: vec![if big { BIG_BUFFER } else { MERGEABLE_BUFFER }],
            tx_slot: 2048,
            tx_layout: TxLayout::Single,
        }
    }

    /// The same configuration with TX slots of at least [`BIG_BUFFER`] bytes.
    #[must_use]
    pub fn with_big_tx(mut self) -> Self {
        self.tx_slot = BIG_BUFFER.next_multiple_of(64);
        self
    }

    pub(crate) fn has_feature(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// Whether chains of several buffers use indirect tables.
    pub(crate) fn indirect(&self) -> bool {
        self.has_feature(ring::VIRTIO_RING_F_INDIRECT_DESC)
    }

    /// The number of RX buffers that the virtqueue can hold.
    pub(crate) fn rx_buffers(&self) -> u16 {
        match u16::try_from(self.rx_buffer.len()) {
            Ok(1) => self.size,
            Ok(_) if self.indirect() => self.size,
            Ok(segments) if segments != 0 => self.size / segments,
            _ => 0,
        }
    }

    /// The distance between RX buffers in bytes. Each begins on a cache line.
    pub(crate) fn rx_stride(&self) -> u64 {
        let bytes: u64 = self.rx_buffer.iter().map(|&len| u64::from(len)).sum();
        bytes.next_multiple_of(64)
    }

    /// The distance between TX slots in bytes. Each begins on a cache line.
    pub(crate) fn tx_stride(&self) -> u64 {
        u64::from(self.tx_slot).next_multiple_of(64)
    }

    /// The number of bytes of guest memory that suffice for a queue pair.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let n = u64::from(self.size);
        let ring = 32 * n + 4096;
        // At most one indirect table for each head, with up to twice the descriptors of a chain.
        let tables = n * 64 * (crate::memory::to_u64(self.rx_buffer.len()) + self.tx_segments());
        2 * ring + tables + n * (self.rx_stride() + self.tx_stride())
    }

    /// The number of buffers of the longest TX frame.
    fn tx_segments(&self) -> u64 {
        match self.tx_layout {
            TxLayout::Single => 1,
            TxLayout::SeparateHeader => 2,
            TxLayout::Segments(len) => u64::from(self.tx_slot).div_ceil(u64::from(len.max(1))),
        }
    }

    /// Rejects RX buffers and TX slots that cannot be used.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let header = u32::try_from(HEADER_LEN).unwrap_or(u32::MAX);
        if self.rx_buffers() == 0 || self.rx_buffer.contains(&0) {
            return Err(Error::Config(
                "an RX buffer needs at least one segment, and none may be empty",
            ));
        }
        if self.tx_slot < header || self.tx_layout == TxLayout::Segments(0) {
            return Err(Error::Config(
                "a TX slot must hold a header, in segments that are not empty",
            ));
        }
        Ok(())
    }
}

/// A virtqueue with its eventfds.
#[derive(Debug)]
pub struct DriverQueue {
    /// The virtqueue.
    pub ring: DriverVirtqueue,
    /// Signalled by the driver.
    pub kick: WaitableEventFd,
    /// Signalled by the device.
    pub call: WaitableEventFd,
    /// Signalled by a device that quarantined the virtqueue.
    pub err: WaitableEventFd,
    /// The number of kicks sent.
    pub kicks: u64,
}

impl DriverQueue {
    pub(crate) fn new(ring: DriverVirtqueue) -> Result<Self, Error> {
        let eventfd = || WaitableEventFd::new().map_err(Error::io("cannot make an eventfd"));
        Ok(Self {
            ring,
            kick: eventfd()?,
            call: eventfd()?,
            err: eventfd()?,
            kicks: 0,
        })
    }

    /// Publishes the added chains and kicks the device if it wants that.
    ///
    /// # Errors
    /// When the kick cannot be written.
    #[inline(always)]
    pub fn flush(&mut self) -> Result<(), Error> {
        self.ring.publish();
        if self.ring.is_kick_needed() {
            self.kick_now()?;
        }
        Ok(())
    }

    /// Kicks the device, whether it wants that or not.
    ///
    /// # Errors
    /// When the kick cannot be written.
    pub fn kick_now(&mut self) -> Result<(), Error> {
        self.kicks += 1;
        self.kick.signal().map_err(Error::io("cannot kick a ring"))
    }

    /// What a front-end sends to the back-end for this virtqueue.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn setup(&self) -> Result<VringSetup, Error> {
        let copy = |eventfd: &WaitableEventFd| {
            eventfd
                .try_clone()
                .map_err(Error::io("cannot duplicate an eventfd"))
        };
        Ok(VringSetup {
            size: self.ring.size(),
            addresses: self.ring.addresses(),
            base: self.ring.base(),
            kick: copy(&self.kick)?,
            call: copy(&self.call)?,
            err: copy(&self.err)?,
        })
    }
}

/// The description of a vring that a front-end sends to a back-end.
#[derive(Debug)]
pub struct VringSetup {
    /// SET_VRING_NUM.
    pub size: u16,
    /// SET_VRING_ADDR, with guest addresses.
    pub addresses: VirtqueueAddresses,
    /// SET_VRING_BASE.
    pub base: u32,
    /// SET_VRING_KICK.
    pub kick: WaitableEventFd,
    /// SET_VRING_CALL.
    pub call: WaitableEventFd,
    /// SET_VRING_ERR.
    pub err: WaitableEventFd,
}
