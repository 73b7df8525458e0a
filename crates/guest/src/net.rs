//! What the two queues of a pair are made of.

use virtio_bindings::virtio_config as config;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring as ring;

use crate::driver::{DriverVirtqueue, VirtqueueAddresses};
use crate::error::Error;
use crate::eventfd::WaitableEventFd;
use crate::header::HEADER_LEN;

/// Bytes of a mergeable RX buffer that holds an ordinary frame.
pub const MERGEABLE_BUFFER: u32 = 1526;
/// Bytes of an RX buffer that holds the largest frame: 65,550 and its header.
pub const BIG_BUFFER: u32 = 65_562;

/// The features of a current Linux guest, as far as a device of this kind offers them.
pub const MODERN: u64 = 1 << config::VIRTIO_F_VERSION_1
    | 1 << ring::VIRTIO_RING_F_EVENT_IDX
    | 1 << ring::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << net::VIRTIO_NET_F_MRG_RXBUF
    | 1 << net::VIRTIO_NET_F_MQ
    | OFFLOADS;

/// Packed rings, which a guest must ask for beside [`MODERN`].
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

/// How a TX frame is cut into descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxLayout {
    /// Header and frame in one (VERSION_1 or ANY_LAYOUT).
    Single,
    /// The header in one, the frame in another.
    SeparateHeader,
    /// Every so many bytes (not 0), the header as well.
    Segments(u32),
}

/// How a pair's queues are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverQueueConfig {
    /// Descriptors of each ring.
    pub size: u16,
    /// Negotiated feature bits.
    pub features: u64,
    /// Where the rings begin, see [`crate::driver::DriverVirtqueueConfig::start`].
    pub start: u16,
    /// Bytes of each descriptor of an RX buffer.
    pub rx_buffer: Vec<u32>,
    /// Bytes of a TX slot: the longest frame and its header.
    pub tx_slot: u32,
    /// How TX frames are cut.
    pub tx_layout: TxLayout,
}

impl DriverQueueConfig {
    /// What a Linux driver does under these features: mergeable buffers of one page's share,
    /// buffers for the largest frame where it takes segments unmerged, else for one frame.
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

    /// With TX slots for the largest frame.
    #[must_use]
    pub fn with_big_tx(mut self) -> Self {
        self.tx_slot = BIG_BUFFER.next_multiple_of(64);
        self
    }

    pub(crate) fn has_feature(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// Whether chains of several descriptors go into indirect tables.
    pub(crate) fn indirect(&self) -> bool {
        self.has_feature(ring::VIRTIO_RING_F_INDIRECT_DESC)
    }

    /// RX buffers that the ring can hold.
    pub(crate) fn rx_buffers(&self) -> u16 {
        match u16::try_from(self.rx_buffer.len()) {
            Ok(1) => self.size,
            Ok(_) if self.indirect() => self.size,
            Ok(pieces) if pieces != 0 => self.size / pieces,
            _ => 0,
        }
    }

    /// Bytes from one RX buffer to the next: each on a cache line of its own.
    pub(crate) fn rx_stride(&self) -> u64 {
        let bytes: u64 = self.rx_buffer.iter().map(|&len| u64::from(len)).sum();
        bytes.next_multiple_of(64)
    }

    /// Bytes from one TX slot to the next.
    pub(crate) fn tx_stride(&self) -> u64 {
        u64::from(self.tx_slot).next_multiple_of(64)
    }

    /// Bytes of guest memory that a pair takes, generously.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let n = u64::from(self.size);
        let ring = 32 * n + 4096;
        // Indirect tables: at most one a head, of twice the descriptors that a chain needs.
        let tables = n * 64 * (crate::memory::to_u64(self.rx_buffer.len()) + self.tx_segments());
        2 * ring + tables + n * (self.rx_stride() + self.tx_stride())
    }

    fn tx_segments(&self) -> u64 {
        match self.tx_layout {
            TxLayout::Single => 1,
            TxLayout::SeparateHeader => 2,
            TxLayout::Segments(len) => u64::from(self.tx_slot).div_ceil(u64::from(len.max(1))),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let header = u32::try_from(HEADER_LEN).unwrap_or(u32::MAX);
        if self.rx_buffers() == 0 || self.rx_buffer.contains(&0) {
            return Err(Error::Config("an RX buffer needs descriptors, none empty"));
        }
        if self.tx_slot < header || self.tx_layout == TxLayout::Segments(0) {
            return Err(Error::Config("a TX slot must hold a header, in pieces"));
        }
        Ok(())
    }
}

/// A ring with its eventfds.
#[derive(Debug)]
pub struct DriverQueue {
    /// The ring.
    pub ring: DriverVirtqueue,
    /// Written by the driver.
    pub kick: WaitableEventFd,
    /// Written by the device.
    pub call: WaitableEventFd,
    /// Written by a device that gave the ring up.
    pub err: WaitableEventFd,
    /// Kicks that the device wanted and got.
    pub kicks: u64,
}

impl DriverQueue {
    pub(crate) fn new(ring: DriverVirtqueue) -> Result<Self, Error> {
        let notifier = || WaitableEventFd::new().map_err(Error::io("cannot make an eventfd"));
        Ok(Self {
            ring,
            kick: notifier()?,
            call: notifier()?,
            err: notifier()?,
            kicks: 0,
        })
    }

    /// Publishes what was added and kicks if the device wants it.
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

    /// Kicks, wanted or not.
    ///
    /// # Errors
    /// When the kick cannot be written.
    pub fn kick_now(&mut self) -> Result<(), Error> {
        self.kicks += 1;
        self.kick.signal().map_err(Error::io("cannot kick a ring"))
    }

    /// What a front-end must know of the ring.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn setup(&self) -> Result<VringSetup, Error> {
        let copy = |notifier: &WaitableEventFd| {
            notifier
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

/// A ring as a front-end tells it to a back-end.
#[derive(Debug)]
pub struct VringSetup {
    /// SET_VRING_NUM.
    pub size: u16,
    /// SET_VRING_ADDR, as guest addresses.
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
