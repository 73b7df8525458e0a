//! The work of one burst is limited: what costs more is left in the ring, and nothing is lost.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{FULL, RecordingUplink};
use virtionet_guest::frame::{Checksum, Frame, FrameSpec, Transport};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{DriverQueueConfig, PACKED};
use virtionet_guest::tx::DriverTxQueue;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::{BURST_WORK, DeviceQueue, QueueConfig, TxQueue};
use virtionet_virtqueue::VirtqueueLayout;

/// Number of frames, all of which the ring has space for.
const FRAMES: usize = 40;

struct Fixture {
    // The driver's memory.
    _ram: GuestRam,
    driver: DriverTxQueue,
    device: TxQueue,
    stats: Arc<VringStats>,
}

impl Fixture {
    fn new(features: u64) -> Self {
        let config = DriverQueueConfig {
            tx_slot: 0x1_0100,
            ..DriverQueueConfig::new(256, features)
        };
        let ram = GuestRam::new((config.memory() + 0x1_0000).next_multiple_of(4096)).unwrap();
        let driver = DriverTxQueue::new(&ram, &config).unwrap();
        let ring = driver.queue.setup().unwrap();
        let user = |addr| ram.user_addr(addr).unwrap();
        let stats = Arc::<VringStats>::default();
        let config = QueueConfig {
            layout: VirtqueueLayout {
                size: ring.size,
                desc: user(ring.addresses.descriptors),
                avail: user(ring.addresses.driver),
                used: user(ring.addresses.device),
            },
            base: ring.base,
            features: Features(features),
            memory: Arc::new(ram.guest_memory().unwrap()),
            stats: Arc::clone(&stats),
            record: None,
        };
        Self {
            device: TxQueue::new(config).unwrap(),
            _ram: ram,
            driver,
            stats,
        }
    }

    /// Sends `frames` and returns how many chains each burst completed. The driver gets back each
    /// chain once, and the uplink every frame that `is_valid`, in order.
    fn bursts(&mut self, frames: &[Frame], is_valid: impl Fn(usize) -> bool) -> Vec<usize> {
        for frame in frames {
            assert!(self.driver.queue(&frame.header, &frame.bytes).unwrap());
        }
        self.driver.flush().unwrap();
        let uplink = RecordingUplink::default();
        let mut bursts = Vec::new();
        while self.device.has_more() {
            bursts.push(self.device.send(Some(&uplink)).unwrap().chains);
        }
        assert_eq!(bursts.iter().sum::<usize>(), frames.len());
        assert_eq!(usize::from(self.driver.reclaim().unwrap()), frames.len());
        let arrived: Vec<_> = uplink.sent().into_iter().map(|sent| sent.bytes).collect();
        let valid = frames.iter().enumerate().filter(|(n, _)| is_valid(*n));
        let expected: Vec<_> = valid.map(|(_, frame)| frame.bytes.clone()).collect();
        assert!(arrived == expected, "frames are lost or out of order");
        bursts
    }
}

/// A TCP frame with `len` bytes of payload that is to be cut into segments of `gso_size`.
fn tcp_frame(sequence: u32, len: usize, gso_size: Option<u16>) -> Frame {
    let spec = FrameSpec {
        sequence,
        checksum: Checksum::Partial,
        gso_size,
        ..FrameSpec::v4(Transport::Tcp)
    };
    spec.build(&vec![7; len]).unwrap()
}

fn tcp_frames(len: usize, gso_size: Option<u16>) -> Vec<Frame> {
    let sequences = 0..u32::try_from(FRAMES).unwrap();
    let frames = sequences.map(|sequence| tcp_frame(sequence, len, gso_size));
    frames.collect()
}

#[test]
fn large_frames_pass_in_bursts_of_limited_work() {
    for features in [FULL, FULL | PACKED] {
        let mut fixture = Fixture::new(features);
        let frames = tcp_frames(60_000, Some(60_000));
        let bursts = fixture.bursts(&frames, |_| true);
        let most = BURST_WORK / 60_000;
        assert!(bursts.iter().all(|&chains| chains <= most), "{bursts:?}");
        // Few more bursts than are needed: the size of the next one follows from the last.
        assert!(bursts.len() <= 2 * FRAMES.div_ceil(most), "{bursts:?}");
    }
}

#[test]
fn frames_of_many_segments_count_for_their_segments() {
    let mut fixture = Fixture::new(FULL);
    let bursts = fixture.bursts(&tcp_frames(30_000, Some(28)), |_| true);
    assert_eq!(bursts, [1; FRAMES]);
}

#[test]
fn small_frames_after_large_ones_pass_in_full_bursts_again() {
    let mut fixture = Fixture::new(FULL);
    fixture.bursts(&tcp_frames(60_000, Some(60_000)), |_| true);
    for _ in 0..4 {
        fixture.bursts(&tcp_frames(100, None), |_| true);
    }
    assert_eq!(fixture.bursts(&tcp_frames(100, None), |_| true), [FRAMES]);
}

#[test]
fn invalid_frames_in_an_expensive_burst_are_counted_once() {
    for features in [FULL, FULL | PACKED] {
        let mut fixture = Fixture::new(features);
        let mut frames = tcp_frames(60_000, Some(60_000));
        for frame in frames.iter_mut().step_by(3) {
            frame.header.gso_type = 0x7f;
        }
        fixture.bursts(&frames, |n| !n.is_multiple_of(3));
        let invalid = u64::try_from(FRAMES.div_ceil(3)).unwrap();
        assert_eq!(fixture.stats.gso_unknown.get(), invalid);
    }
}
