//! A ring with both its ends in this process: the driver's end with raw access, a device's queue,
//! and an uplink that records the frames.
#![allow(dead_code, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used)]

pub mod packed;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use virtionet_guest::driver::DriverVirtqueueConfig;
use virtionet_guest::memory::{Area, GuestRam};
use virtionet_guest::net::MODERN;
use virtionet_guest::split::{SplitDescriptor, SplitDriverVirtqueue};
use virtionet_guest::{net, rx};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{
    MAX_RECEIVE_BUFFERS, Received, TxFrame, UplinkError, UplinkQueue,
};
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue};
use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::{GuestMemory, GuestSlice};

/// VIRTIO_F_VERSION_1 alone: a 12-byte header and nothing else.
pub const PLAIN: u64 = 1 << 32;
/// The features that a current Linux guest negotiates.
pub const FULL: u64 = MODERN;

/// The start of guest memory: address 0 is not mapped.
pub const START: u64 = 0x1000;
/// A second region, touching the first.
pub const JOINED: u64 = 0x100_0000;
/// The end of the second region, behind which is a hole.
pub const HOLE: u64 = 0x110_0000;
/// A third region, behind the hole.
pub const ISLAND: u64 = 0x200_0000;
/// The end of all memory.
pub const END: u64 = 0x201_0000;

/// The address of the tests' buffers: behind the largest ring.
pub const DATA: u64 = 0x10_0000;
/// The address of the tests' indirect tables.
pub const TABLE: u64 = 0x80_0000;

/// A frame of `len` bytes, each of which depends on its offset and on `seed`.
pub fn frame(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((seed * 31 + at * 7) % 251).unwrap())
        .collect()
}

/// The bytes of a valid TX chain: a header without offloads and a frame of 60 bytes.
pub fn good() -> Vec<u8> {
    [vec![0; 12], frame(1, 60)].concat()
}

/// Guest memory and a split ring in it, seen from the driver.
pub struct SplitRingFixture {
    pub ram: GuestRam,
    pub ring: SplitDriverVirtqueue,
    pub stats: Arc<VringStats>,
    pub uplink: RecordingUplink,
    features: u64,
    base: u16,
    next: u16,
    last_used_idx: u16,
    counted: Vec<u64>,
}

impl SplitRingFixture {
    /// An empty ring of `size` under these feature bits.
    pub fn new(size: u16, features: u64) -> Self {
        Self::starting_at(0, size, features)
    }

    /// The same with indices that begin at `start`.
    pub fn starting_at(start: u16, size: u16, features: u64) -> Self {
        let layout = [
            (START, JOINED - START),
            (JOINED, HOLE - JOINED),
            (ISLAND, END - ISLAND),
        ];
        let ram = GuestRam::with_layout(&layout).unwrap();
        let config = DriverVirtqueueConfig {
            start,
            ..DriverVirtqueueConfig::new(size, features)
        };
        let ring = SplitDriverVirtqueue::new(&ram, config).unwrap();
        let stats = Arc::new(VringStats::default());
        Self {
            counted: stats.values(),
            ram,
            ring,
            stats,
            uplink: RecordingUplink::default(),
            features,
            base: start,
            next: start,
            last_used_idx: start,
        }
    }

    /// The device's queue on this ring, from where the driver began.
    pub fn device<Q: DeviceQueue>(&self) -> Q {
        Q::new(self.config(self.base.into())).unwrap()
    }

    /// The configuration of a device's queue.
    pub fn config(&self, base: u32) -> QueueConfig {
        let at = self.ring.addresses();
        let user = |addr| self.ram.user_addr(addr).unwrap();
        QueueConfig {
            layout: VirtqueueLayout {
                size: self.ring.size(),
                desc: user(at.descriptors),
                avail: user(at.driver),
                used: user(at.device),
            },
            base,
            features: Features(self.features),
            memory: self.memory(),
            stats: Arc::clone(&self.stats),
            record: None,
        }
    }

    /// A snapshot of the memory with mappings of its own.
    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::new(self.ram.guest_memory().unwrap())
    }

    /// Writes descriptor `index`.
    pub fn desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.ring
            .set_descriptor(index, SplitDescriptor::new(addr, len, flags, next));
    }

    /// Writes a table of descriptors to [`TABLE`].
    pub fn table(&self, entries: &[(u64, u32, u16, u16)]) {
        let bytes = u64::try_from(entries.len() * 16).unwrap();
        let area = self.ram.area(TABLE, bytes).unwrap();
        for (&(addr, len, flags, next), offset) in entries.iter().zip((0..).step_by(16)) {
            SplitDescriptor::new(addr, len, flags, next).store(&area, offset);
        }
    }

    /// Makes the chains of these heads available.
    pub fn offer(&mut self, heads: &[u16]) {
        for head in heads {
            self.ring.set_avail_entry(self.next, *head);
            self.next = self.next.wrapping_add(1);
        }
        self.ring.set_avail_index(self.next);
    }

    /// Withdraws the chains from `base` on; the device must have rewound to there.
    pub fn rewind_to(&mut self, base: u32) {
        self.next = u16::try_from(base).unwrap();
        self.ring.set_avail_index(self.next);
    }

    /// Writes `bytes` to memory, and descriptor `index` over them as a whole chain.
    pub fn readable(&self, index: u16, bytes: &[u8]) {
        let addr = DATA + 0x2_0000 * u64::from(index % 64);
        self.ram.write(addr, bytes).unwrap();
        self.desc(index, addr, u32::try_from(bytes.len()).unwrap(), 0, 0);
    }

    /// The used elements (id, length) that the device published since the last call.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let to = self.ring.used_index();
        let mut elements = Vec::new();
        while self.last_used_idx != to {
            elements.push(self.ring.used_element(self.last_used_idx));
            self.last_used_idx = self.last_used_idx.wrapping_add(1);
        }
        elements
    }

    /// The counters of faults and losses that increased since the last call, and by how much.
    pub fn counted(&mut self) -> Vec<(&'static str, u64)> {
        counted(&self.stats, &mut self.counted)
    }
}

/// A driver's receiveq, empty, and the device's end of it.
pub struct Receiveq {
    pub ram: GuestRam,
    pub driver: rx::DriverRxQueue,
    pub device: RxQueue,
    pub stats: Arc<VringStats>,
}

impl Receiveq {
    /// Creates a receiveq with buffers of these descriptors.
    pub fn new(size: u16, features: u64, rx_buffer: &[u32]) -> Self {
        let config = net::DriverQueueConfig {
            rx_buffer: rx_buffer.to_vec(),
            ..net::DriverQueueConfig::new(size, features)
        };
        let bytes = (config.memory() + 0x10_0000).next_multiple_of(4096);
        let ram = GuestRam::new(bytes).unwrap();
        let driver = rx::DriverRxQueue::new(&ram, &config).unwrap();
        let stats = Arc::new(VringStats::default());
        let at = driver.queue.ring.addresses();
        let user = |addr| ram.user_addr(addr).unwrap();
        let device = RxQueue::new(QueueConfig {
            layout: VirtqueueLayout {
                size,
                desc: user(at.descriptors),
                avail: user(at.driver),
                used: user(at.device),
            },
            base: driver.queue.ring.base(),
            features: Features(features),
            memory: Arc::new(ram.guest_memory().unwrap()),
            stats: Arc::clone(&stats),
            record: None,
        });
        Self {
            device: device.unwrap(),
            ram,
            driver,
            stats,
        }
    }
}

/// The counters of faults and losses that increased since `last`. Updates `last`.
fn counted(stats: &VringStats, last: &mut Vec<u64>) -> Vec<(&'static str, u64)> {
    let before = std::mem::replace(last, stats.values());
    let names = VringStats::NAMES.iter().map(|(name, _)| *name);
    names
        .zip(last.iter().zip(before))
        .map(|(name, (now, before))| (name, now - before))
        .filter(|(name, n)| *n != 0 && !["frames", "bytes", "bursts"].contains(name))
        .collect()
}

/// A frame that was transmitted: its header, and its bytes as they were at that moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentFrame {
    pub header: VnetHeader,
    pub bytes: Vec<u8>,
    /// The length that the frame states.
    pub len: usize,
}

/// An uplink that records transmitted frames and lets the tests queue frames to be received.
#[derive(Debug, Default)]
pub struct RecordingUplink {
    sent: Mutex<Vec<SentFrame>>,
    waiting: Mutex<VecDeque<Vec<u8>>>,
    /// A used ring, and its index at each call of `receive`.
    pub used: Option<Area>,
    pub used_indices: Mutex<Vec<u16>>,
}

impl RecordingUplink {
    /// Frames transmitted since the last call.
    pub fn sent(&self) -> Vec<SentFrame> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    /// Queues a frame (header included) to be received.
    pub fn feed(&self, frame: Vec<u8>) {
        self.waiting().push_back(frame);
    }

    /// The frames that still wait.
    pub fn waiting(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.waiting.lock().unwrap()
    }
}

impl UplinkQueue for RecordingUplink {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        let mut sent = self.sent.lock().unwrap();
        for frame in frames {
            let mut bytes = Vec::new();
            for slice in frame.payload {
                let at = bytes.len();
                bytes.resize(at + slice.len(), 0);
                slice.copy_to(&mut bytes[at..]);
            }
            stats.frames.add(1);
            sent.push(SentFrame {
                header: frame.header,
                bytes,
                len: frame.len,
            });
        }
    }

    fn receive(&self, buffers: &[GuestSlice<'_>], bounce: &mut [u8]) -> Received {
        if let Some(used) = &self.used {
            self.used_indices.lock().unwrap().push(used.acquire(2));
        }
        let Some(frame) = self.waiting().pop_front() else {
            return Received::Empty;
        };
        // As in readv, a frame that does not fit is written in part.
        let mut done = 0;
        for slice in &buffers[..buffers.len().min(MAX_RECEIVE_BUFFERS)] {
            done += slice.copy_from(&frame[done..]);
        }
        let rest = &frame[done..];
        let bounced = rest.len().min(bounce.len());
        bounce[..bounced].copy_from_slice(&rest[..bounced]);
        match bounced == rest.len() {
            true => Received::Frame(frame.len()),
            false => Received::TooLong,
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_attached(&self, _attached: bool) -> Result<(), UplinkError> {
        Ok(())
    }
}

/// Sets its flag when it is dropped, also by a panic, so that the other thread ends.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
