//! Every page of guest memory that a queue changes is in the dirty log, in both ring formats, and
//! hardly any other.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::{PLAIN, RecordingUplink, frame};
use virtionet_guest::dirty_log::{DirtyLog as FrontendLog, LOG_PAGE, MemorySnapshot};
use virtionet_guest::driver::DriverVirtqueue;
use virtionet_guest::header::NetHeader;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{DriverQueueConfig, MODERN, PACKED, VringSetup};
use virtionet_guest::rx::DriverRxQueue;
use virtionet_guest::tx::DriverTxQueue;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::TxFrame;
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue, TxQueue};
use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::{DirtyLog, GuestMemory, GuestSlice};

/// Mergeable buffers; buffers for large frames of one and of several segments; legacy headers.
const FORMATS: [(u64, &[u32]); 4] = [
    (MODERN, &[1526]),
    (PLAIN, &[70_000]),
    (PLAIN, &[20, 5000, 61_000]),
    (0, &[70_000]),
];

/// Guest memory in three regions, and the log of what a device writes to it.
struct Guest {
    ram: GuestRam,
    memory: Arc<GuestMemory>,
    log: FrontendLog,
}

impl Guest {
    fn new(bytes: u64) -> Self {
        let layout = [(0x1000, 0x3000), (0x40_0000, bytes), (0x4000_0000, bytes)];
        let ram = GuestRam::with_layout(&layout).unwrap();
        let log = FrontendLog::new(&ram).unwrap();
        let memory = Arc::new(ram.guest_memory().unwrap());
        Self { ram, memory, log }
    }

    fn logged_memory(&self) -> Arc<GuestMemory> {
        let file = self.log.file().try_clone().unwrap();
        let log = DirtyLog::map(file, self.log.size(), 0).unwrap();
        Arc::new(self.memory.with_log(Some(Arc::new(log))).unwrap())
    }

    fn take_logged(&self) -> BTreeSet<u64> {
        self.log.take().unwrap()
    }

    /// The pages that `work` changes.
    fn changed_by(&self, work: impl FnOnce()) -> BTreeSet<u64> {
        let before = MemorySnapshot::of(&self.ram).unwrap();
        work();
        before.changed_in(&MemorySnapshot::of(&self.ram).unwrap())
    }

    fn config(&self, setup: &VringSetup, features: u64) -> QueueConfig {
        let user = |addr| self.ram.user_addr(addr).unwrap();
        QueueConfig {
            layout: VirtqueueLayout {
                size: setup.size,
                desc: user(setup.addresses.descriptors),
                avail: user(setup.addresses.driver),
                used: user(setup.addresses.device),
            },
            base: setup.base,
            features: Features(features),
            memory: Arc::clone(&self.memory),
            stats: Arc::new(VringStats::default()),
            record: None,
        }
    }
}

/// The pages that belong to the ring itself.
fn ring_pages(ring: &DriverVirtqueue) -> BTreeSet<u64> {
    let at = ring.addresses();
    let size = u64::from(ring.size());
    [(at.descriptors, 16 * size), (at.device, 8 * size + 6)]
        .into_iter()
        .flat_map(|(start, len)| (start / LOG_PAGE)..=((start + len) / LOG_PAGE))
        .collect()
}

/// Runs `work` and checks that the log has what it changes, and nothing but that and the ring.
fn check(guest: &Guest, ring: &DriverVirtqueue, name: &str, work: impl FnOnce()) {
    let ring = ring_pages(ring);
    assert!(guest.take_logged().is_empty(), "{name}");
    let changed = guest.changed_by(work);
    let logged = guest.take_logged();
    assert!(!changed.is_empty(), "{name}: nothing changed");
    let missing: Vec<_> = changed.difference(&logged).collect();
    assert!(missing.is_empty(), "{name}: {missing:x?} are not logged");
    let surplus = logged
        .difference(&changed)
        .filter(|page| !ring.contains(page));
    let surplus: Vec<_> = surplus.collect();
    assert!(surplus.is_empty(), "{name}: {surplus:x?} did not change");
}

/// Frames behind zeros for a header. The bytes of frames of different rounds differ.
fn frames(header_len: usize, round: usize) -> Vec<Vec<u8>> {
    let lens = [60, 1514, 3, 9000, 60, 65_000, 60, 40_000, 1514];
    let make = |(seed, len): (usize, usize)| {
        let body = frame(seed + 9 * round, len)
            .into_iter()
            .map(|byte| byte.max(1));
        [vec![0; header_len], body.collect()].concat()
    };
    lens.into_iter().enumerate().map(make).collect()
}

fn receiveq(guest: &Guest, features: u64, buffers: &[u32]) -> (DriverRxQueue, RxQueue) {
    let config = DriverQueueConfig {
        rx_buffer: buffers.to_vec(),
        ..DriverQueueConfig::new(ring_size(buffers), features)
    };
    let driver = DriverRxQueue::new(&guest.ram, &config).unwrap();
    let setup = driver.queue.setup().unwrap();
    let device = RxQueue::new(guest.config(&setup, features)).unwrap();
    (driver, device)
}

/// Enough memory for a queue, in each of two regions.
fn memory_for(buffers: &[u32]) -> u64 {
    let bytes: u64 = buffers.iter().map(|len| u64::from(*len)).sum();
    (u64::from(ring_size(buffers)) * (bytes + 8192)).next_multiple_of(4096)
}

/// Large enough for the longest frame, and for each round's frames.
fn ring_size(buffers: &[u32]) -> u16 {
    match buffers {
        [1526] => 256,
        _ => 32,
    }
}

/// Each combination of ring format and buffers, and its name.
fn each_format(mut test: impl FnMut(u64, &[u32], &str)) {
    for (features, buffers) in FORMATS {
        for packed in [0, PACKED] {
            let features = features | packed;
            if features != PACKED {
                test(features, buffers, &format!("{features:#x} {buffers:?}"));
            }
        }
    }
}

/// Lets `deliver` give the device the frames of ten rounds, which it is told the number of. Every
/// other round is logged.
fn check_rounds(
    features: u64,
    buffers: &[u32],
    name: &str,
    mut deliver: impl FnMut(&mut RxQueue, usize),
) {
    let guest = Guest::new(memory_for(buffers));
    let (mut driver, mut device) = receiveq(&guest, features, buffers);
    let used = driver.queue.ring.addresses().device;
    for round in 0..5 {
        driver.fill().unwrap();
        device.rebind(&guest.logged_memory()).unwrap();
        device.set_used_log(Some(used));
        let name = format!("{name} {round}");
        check(&guest, &driver.queue.ring, &name, || {
            deliver(&mut device, 2 * round);
        });
        driver.receive_frames().unwrap();

        driver.fill().unwrap();
        device.rebind(&guest.memory).unwrap();
        let changed = guest.changed_by(|| deliver(&mut device, 2 * round + 1));
        assert!(!changed.is_empty());
        assert!(guest.take_logged().is_empty(), "{name}");
        driver.receive_frames().unwrap();
    }
}

#[test]
fn frames_from_the_uplink_are_logged_until_the_log_ends() {
    each_format(|features, buffers, name| {
        let header_len = Features(features).header_len();
        let uplink = RecordingUplink::default();
        check_rounds(features, buffers, name, |device, round| {
            let frames = frames(header_len, round).into_iter();
            frames.for_each(|frame| uplink.feed(frame));
            device.disable_kicks();
            device.receive(&uplink, 64, usize::MAX).unwrap();
            let _ = device.enable_kicks();
        });
    });
}

#[test]
fn part_of_a_frame_that_is_lost_is_logged() {
    for packed in [0, PACKED] {
        let features = MODERN | packed;
        let guest = Guest::new(memory_for(&[1526]));
        let (mut driver, mut device) = receiveq(&guest, features, &[1526]);
        driver.fill().unwrap();
        device.rebind(&guest.logged_memory()).unwrap();
        device.set_used_log(Some(driver.queue.ring.addresses().device));
        let uplink = RecordingUplink::default();
        // Behind a large frame the next one is read directly into the buffers.
        for len in [20_000, 200_000] {
            uplink.feed(vec![7; len]);
        }
        check(&guest, &driver.queue.ring, "lost", || {
            assert_eq!(device.receive(&uplink, 64, usize::MAX).unwrap().frames, 2);
        });
    }
}

/// Pushes the frames of one round.
fn push(device: &mut RxQueue, round: usize) {
    let mut bodies = frames(0, round);
    let payloads: Vec<_> = bodies
        .iter_mut()
        .map(|body| [GuestSlice::from_private(body)])
        .collect();
    let frames = payloads.iter().map(|payload| TxFrame {
        header: VnetHeader::default(),
        payload,
        len: payload[0].len(),
    });
    let frames: Vec<_> = frames.collect();
    assert_eq!(device.push(&frames).unwrap().frames, frames.len());
}

#[test]
fn pushed_frames_are_logged_until_the_log_ends() {
    each_format(|features, buffers, name| check_rounds(features, buffers, name, push));
}

#[test]
fn used_ring_of_a_transmitq_is_logged_where_the_front_end_says() {
    for features in [MODERN, PLAIN, MODERN | PACKED, PLAIN | PACKED] {
        let guest = Guest::new(0x40_0000);
        let config = DriverQueueConfig::new(1024, features);
        let mut driver = DriverTxQueue::new(&guest.ram, &config).unwrap();
        let setup = driver.queue.setup().unwrap();
        let mut device = TxQueue::new(guest.config(&setup, features)).unwrap();
        let uplink = RecordingUplink::default();
        device.rebind(&guest.logged_memory()).unwrap();
        device.set_used_log(Some(setup.addresses.device));
        let name = format!("{features:#x}");
        // More than the ring has descriptors, so that it wraps.
        for _ in 0..12 {
            for _ in 0..200 {
                driver.queue(&NetHeader::default(), &[3; 60]).unwrap();
            }
            driver.flush().unwrap();
            check(&guest, &driver.queue.ring, &name, || {
                device.disable_kicks();
                while device.send(Some(&uplink)).unwrap().chains > 0 {}
                let _ = device.enable_kicks();
            });
            driver.reclaim().unwrap();
        }
        // A packed ring's descriptors lie where they are, whatever the address of the device area.
        device.set_used_log(Some(0x3000_0000));
        driver.queue(&NetHeader::default(), &[3; 60]).unwrap();
        driver.flush().unwrap();
        device.send(Some(&uplink)).unwrap();
        let _ = device.enable_kicks();
        let logged = guest.take_logged();
        assert!(logged.contains(&(0x3000_0000 / LOG_PAGE)), "{name}");
        let ring = ring_pages(&driver.queue.ring);
        let is_packed = features & PACKED != 0;
        assert_eq!(!logged.is_disjoint(&ring), is_packed, "{name}");

        // Without the flag nothing of the ring is logged.
        device.set_used_log(None);
        driver.queue(&NetHeader::default(), &[3; 60]).unwrap();
        driver.flush().unwrap();
        device.send(Some(&uplink)).unwrap();
        assert!(guest.take_logged().is_empty(), "{name}");
    }
}
