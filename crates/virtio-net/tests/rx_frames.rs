//! Frames that a guest receives: their bytes in the buffers, and their entries in the used ring.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{FULL, Receiveq, RecordingUplink, SetOnDrop, frame};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtionet_guest::driver::DriverVirtqueue;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::packed::RingPosition;
use virtionet_guest::{net, rx};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::{DeviceQueue, RxEndReason, RxQueue};
use virtionet_virtqueue::memory::GuestMemory;

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const DIRECT: u64 = FULL & !(1 << VIRTIO_RING_F_INDIRECT_DESC);
const UNMERGED: u64 = FULL & !MERGEABLE;
const LEGACY: u64 = 0;
const PACKED: u64 = FULL | net::PACKED;
const PACKED_DIRECT: u64 = DIRECT | net::PACKED;
const PACKED_UNMERGED: u64 = UNMERGED | net::PACKED;

/// A driver's receiveq and the device's end of it.
struct RxFixture {
    ram: GuestRam,
    driver: rx::DriverRxQueue,
    device: RxQueue,
    stats: Arc<VringStats>,
    uplink: RecordingUplink,
    header_len: usize,
}

impl RxFixture {
    fn new(size: u16, features: u64, rx_buffer: &[u32]) -> Self {
        let Receiveq {
            ram,
            driver,
            device,
            stats,
        } = Receiveq::new(size, features, rx_buffer);
        Self {
            device,
            ram,
            driver,
            stats,
            uplink: RecordingUplink::default(),
            header_len: Features(features).header_len(),
        }
    }

    fn feed(&self, seed: usize, len: usize) {
        let header = vec![0; self.header_len];
        self.uplink.feed([header, frame(seed, len)].concat());
    }

    fn fill(&mut self) -> RxEndReason {
        self.device
            .receive(&self.uplink, 1024, 1 << 24)
            .unwrap()
            .end
    }

    /// The base of a ring in which `chains` chains of `segments` descriptors were used.
    fn base(&self, chains: u16, segments: usize) -> u32 {
        match self.driver.queue.ring {
            DriverVirtqueue::Split(_) => u32::from(chains),
            DriverVirtqueue::Packed(ref ring) => {
                let descriptors = chains * u16::try_from(segments).unwrap();
                let word = u32::from(RingPosition::nth(descriptors, ring.size()).word());
                word | word << 16
            }
        }
    }

    /// The frames that the driver received: (buffers, num_buffers, bytes) of each.
    fn received(&mut self) -> Vec<(usize, u16, Vec<u8>)> {
        let mut frames = Vec::new();
        let count = self.driver.receive(usize::MAX, |frame| {
            let bytes = frame.to_frame().bytes;
            frames.push((frame.buffers(), frame.header.num_buffers, bytes));
        });
        assert_eq!(count.unwrap(), frames.len());
        frames
    }
}

/// Ring size, features, and the descriptors of each buffer.
const LAYOUTS: &[(u16, u64, &[u32])] = &[
    (256, FULL, &[1526]),
    (256, FULL, &[4096]),
    (256, FULL, &[65_569]),
    (1024, FULL, &[12]),
    (1024, FULL, &[13]),
    (1024, FULL, &[64]),
    (1024, FULL, &[147]),
    (256, FULL, &[12, 1500]),
    (256, FULL, &[1, 10, 1, 700]),
    (1024, DIRECT, &[1, 10, 1, 700]),
    (1024, DIRECT, &[5, 1, 4, 1, 3, 500, 1]),
    (256, MERGEABLE, &[1526]),
    (256, UNMERGED, &[65_569]),
    (256, UNMERGED, &[12, 65_557]),
    (256, UNMERGED, &[7, 5, 10_000, 55_557]),
    (1024, DIRECT & !MERGEABLE, &[11, 1, 1, 65_556]),
    (256, LEGACY, &[1524]),
    (256, LEGACY, &[10, 1514]),
    (256, LEGACY, &[65_569]),
    (256, PACKED, &[1526]),
    (100, PACKED, &[1526]),
    (1023, PACKED, &[147]),
    (1025, PACKED, &[12]),
    (200, PACKED, &[1, 10, 1, 700]),
    (1022, PACKED_DIRECT, &[1, 10, 1, 700]),
    (1024, PACKED_DIRECT, &[5, 1, 4, 1, 3, 500, 1]),
    (7, PACKED_UNMERGED, &[65_569]),
    (5, PACKED_UNMERGED, &[7, 5, 10_000, 55_557]),
    (1021, PACKED_DIRECT & !MERGEABLE, &[11, 1, 1, 65_556]),
];

const LENGTHS: &[usize] = &[
    14, 15, 52, 60, 134, 135, 136, 1500, 1501, 1514, 1515, 3040, 4084, 5000, 9014, 30_000, 65_556,
    65_557,
];

/// The longest frame for one buffer or, if they are mergeable, for buffers of 500 descriptors.
fn largest(features: u64, segments: &[u32], buffer: usize) -> usize {
    let header = Features(features).header_len();
    match Features(features).has_mergeable_buffers() {
        true => buffer * (500 / segments.len()) - header,
        false => buffer - header,
    }
}

#[test]
fn frames_are_received_in_buffers_of_every_shape() {
    for &(size, features, segments) in LAYOUTS {
        let mut fixture = RxFixture::new(size, features, segments);
        let buffer = usize::try_from(segments.iter().sum::<u32>()).unwrap();
        let largest = largest(features, segments, buffer);
        // Two rounds, so that frames of one length follow frames of another in the same buffers.
        for (seed, len) in LENGTHS.iter().chain(LENGTHS).copied().enumerate() {
            if len > largest {
                continue;
            }
            let name = format!("{len} bytes in {segments:?}, {features:#x}");
            fixture.driver.fill().unwrap();
            fixture.feed(seed, len);
            assert_eq!(fixture.fill(), RxEndReason::UplinkEmpty, "{name}");
            let (buffers, num_buffers, bytes) = fixture.received().pop().expect(&name);
            assert_eq!(bytes, frame(seed, len), "{name}");
            let want = (len + fixture.header_len).div_ceil(buffer);
            assert_eq!(buffers, want, "{name}");
            if fixture.header_len == 12 {
                assert_eq!(usize::from(num_buffers), want, "{name}");
            }
        }
        assert_eq!(fixture.stats.dropped_too_long.get(), 0);
        assert_eq!(fixture.stats.dropped_no_buffer.get(), 0);
    }
}

#[test]
fn frames_of_one_call_become_visible_together() {
    for features in [FULL, PACKED] {
        frames_become_visible_together(RxFixture::new(256, features, &[1526]));
    }
}

fn frames_become_visible_together(mut fixture: RxFixture) {
    fixture.driver.fill().unwrap();
    for len in [60, 5000, 14, 9014] {
        fixture.feed(len, len);
    }
    let before = fixture.driver.queue.ring.base();
    let used = fixture.driver.queue.ring.addresses().device;
    fixture.uplink.used = Some(fixture.ram.area(used, 4).unwrap());
    let received = fixture.device.receive(&fixture.uplink, 3, 1 << 20).unwrap();
    assert_eq!(*fixture.uplink.used_indices.lock().unwrap(), [0, 0, 0]);
    assert_eq!((received.frames, received.bytes), (3, 5074));
    assert_eq!(received.end, RxEndReason::Budget);
    let moved = fixture.driver.queue.ring.base() - before;
    assert_eq!(moved & 0xffff, 1 + 4 + 1);
    let lens: Vec<_> = fixture.received().iter().map(|f| f.2.len()).collect();
    assert_eq!(lens, [60, 5000, 14]);
    let received = fixture.device.receive(&fixture.uplink, 3, 1 << 20).unwrap();
    assert_eq!(
        (received.frames, received.end),
        (1, RxEndReason::UplinkEmpty)
    );
    assert_eq!(fixture.received()[0].2, frame(9014, 9014));
    assert_eq!(fixture.stats.frames.get(), 4);
    assert_eq!(fixture.stats.bytes.get(), 60 + 5000 + 14 + 9014);
}

#[test]
fn call_ends_at_its_byte_limit() {
    let mut fixture = RxFixture::new(256, FULL, &[1526]);
    fixture.driver.fill().unwrap();
    for seed in 0..10 {
        fixture.feed(seed, 1514);
    }
    let received = fixture.device.receive(&fixture.uplink, 100, 4000).unwrap();
    assert_eq!((received.frames, received.end), (3, RxEndReason::Budget));
    assert_eq!(fixture.received().len(), 3);
}

#[test]
fn reserved_buffers_are_not_used() {
    for (size, features, segments) in [
        (64, FULL, &[1526][..]),
        (64, DIRECT, &[12, 1500]),
        (64, UNMERGED, &[65_569]),
        (64, PACKED, &[1526]),
        (47, PACKED, &[1526]),
        (100, PACKED_DIRECT, &[12, 1500]),
        (3, PACKED_UNMERGED, &[65_569]),
    ] {
        let mut fixture = RxFixture::new(size, features, segments);
        fixture.driver.fill().unwrap();
        let mut used = 0;
        for (seed, len) in [60, 1514, 3000, 14, 40_000].into_iter().enumerate() {
            fixture.feed(seed, len);
            fixture.fill();
            // The reserved buffers are rewound each time, which the driver cannot notice.
            let base = fixture.device.rewind();
            let frames = fixture.received();
            assert_eq!(frames.last().unwrap().2, frame(seed, len));
            used += u16::try_from(frames[0].0).unwrap();
            assert_eq!(base, fixture.base(used, segments.len()));
            assert_eq!(fixture.driver.queue.ring.base(), base);
        }
    }
}

#[test]
fn frame_too_long_for_a_small_ring_is_dropped_and_counted() {
    for (size, features) in [(16, FULL), (16, PACKED), (13, PACKED)] {
        let mut fixture = RxFixture::new(size, features, &[1526]);
        fixture.driver.fill().unwrap();
        for len in [60, 40_000, 1514] {
            fixture.feed(len, len);
        }
        fixture.fill();
        let lens: Vec<_> = fixture.received().iter().map(|f| f.2.len()).collect();
        assert_eq!(lens, [60, 1514]);
        assert_eq!(fixture.stats.dropped_no_buffer.get(), 1);
    }
}

#[test]
fn ring_continues_in_another_snapshot_of_memory() {
    for (size, features) in [(256, FULL), (256, PACKED), (99, PACKED)] {
        continues_in_another_snapshot(RxFixture::new(size, features, &[1000]));
    }
}

fn continues_in_another_snapshot(mut fixture: RxFixture) {
    fixture.driver.fill().unwrap();
    for round in 0..20 {
        for seed in 0..5 {
            fixture.feed(seed, 700 * (seed + 1) + round);
        }
        // Frames wait and buffers are reserved when the memory table changes.
        fixture.device.receive(&fixture.uplink, 2, 1 << 20).unwrap();
        let memory = Arc::new(fixture.ram.guest_memory().unwrap());
        fixture.device.rebind(&memory).unwrap();
        drop(memory);
        fixture.fill();
        for (seed, (_, _, bytes)) in fixture.received().iter().enumerate() {
            assert_eq!(*bytes, frame(seed, 700 * (seed + 1) + round));
        }
    }
    assert_eq!(fixture.stats.frames.get(), 100);
    assert_eq!(fixture.device.rewind(), fixture.driver.queue.ring.base());
}

#[test]
fn snapshot_without_the_ring_is_refused_and_the_base_is_kept() {
    for features in [FULL, PACKED] {
        let mut fixture = RxFixture::new(64, features, &[1526]);
        fixture.driver.fill().unwrap();
        fixture.feed(1, 3000);
        fixture.fill();
        let nothing = Arc::new(GuestMemory::default());
        assert!(fixture.device.rebind(&nothing).is_err());
        let base = fixture.base(2, 1);
        assert_eq!(fixture.device.rewind(), base);
        assert_eq!(fixture.driver.queue.ring.base(), base);
        assert_eq!(fixture.received()[0].2, frame(1, 3000));
    }
}

/// The driver runs on a thread of its own and refills while frames arrive. It fails where it sees
/// some of a frame's buffers and not all.
#[test]
fn concurrent_driver_never_sees_part_of_a_frame() {
    for (size, features) in [(256, FULL), (256, PACKED), (251, PACKED)] {
        never_sees_part_of_a_frame(RxFixture::new(size, features, &[300]));
    }
}

fn never_sees_part_of_a_frame(fixture: RxFixture) {
    let RxFixture {
        ram: _ram,
        mut driver,
        mut device,
        uplink,
        ..
    } = fixture;
    driver.fill().unwrap();
    let length = |seed: usize| 14 + seed * 977 % 18_000;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut seed = 0;
            loop {
                let last = done.load(Ordering::Acquire);
                let count = driver.receive(8, |got| {
                    assert_eq!(got.to_frame().bytes, frame(seed, length(seed)));
                    seed += 1;
                });
                if count.unwrap() == 0 && last {
                    return seed;
                }
            }
        });
        let finish = SetOnDrop(&done);
        let end = Instant::now() + Duration::from_millis(300);
        let mut queued = 0;
        let mut given = 0;
        // Enough frames must have passed for a meaningful test, even on a slow machine.
        while !receiver.is_finished() && (Instant::now() < end || queued < 64 || given < queued) {
            if given == queued {
                for _ in 0..16 {
                    uplink.feed([vec![0; 12], frame(queued, length(queued))].concat());
                    queued += 1;
                }
            }
            given += device.receive(&uplink, 5, 1 << 20).unwrap().frames;
        }
        drop(finish);
        assert_eq!(receiver.join().unwrap(), queued);
    });
}

/// The kernel fills a limited number of segments and puts the rest of the frame elsewhere.
#[test]
fn frame_beyond_the_segments_that_the_uplink_fills_is_dropped_and_not_shown() {
    const SEGMENTS: [u32; 1000] = [10; 1000];
    let mut fixture = RxFixture::new(64, FULL, &SEGMENTS);
    fixture.driver.fill().unwrap();
    // The first frame goes through the bounce buffer and makes the next ones direct.
    for len in [5000, 9000, 15_000, 600] {
        fixture.feed(len, len);
    }
    // Such chains use up the budget of descriptors several times.
    let ends: Vec<RxEndReason> = (0..20).map(|_| fixture.fill()).collect();
    assert_eq!(ends.last(), Some(&RxEndReason::UplinkEmpty), "{ends:?}");
    let lengths: Vec<usize> = fixture
        .received()
        .iter()
        .map(|(_, _, bytes)| bytes.len())
        .collect();
    assert_eq!(lengths, [5000, 9000, 600]);
    let dropped = fixture.stats.dropped_no_buffer.get() + fixture.stats.dropped_too_long.get();
    assert_eq!(dropped, 1);
}
