//! The fast path for chains of one buffer gives the same results as the general path: the same frames
//! are carried in both, one buffer each or header and frame in buffers of their own.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{FULL, Receiveq, RecordingUplink, SentFrame, frame};
use proptest::prelude::*;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{self, PACKED, TxLayout};
use virtionet_guest::tx;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::TxFrame;
use virtionet_virtio_net::{DeviceQueue, QueueConfig, TxQueue};
use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::GuestSlice;

/// A header and the length of a frame.
type RawFrame = ([u8; 12], usize);
/// The names and values of counters.
type Counts = Vec<(&'static str, u64)>;

/// Mostly frames as guests send them, and headers and lengths at the limits of what is valid.
fn raw_frames() -> impl Strategy<Value = Vec<RawFrame>> {
    let flags = prop_oneof![6 => Just(0u8), 2 => Just(1), 1 => Just(2), 1 => 3..6u8];
    let gso = prop_oneof![12 => Just(0u8), 1 => prop::sample::select(vec![1, 3, 4, 0x81, 7])];
    let rest = prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>()], 10);
    let len = prop_oneof![
        10 => 14..200_usize,
        3 => 1000..1600_usize,
        1 => 0..20_usize,
        1 => 2020..2050_usize,
        1 => 3000..9000_usize,
    ];
    let raw = (flags, gso, rest, len).prop_map(|(flags, gso, rest, len)| {
        let mut header = [0; 12];
        header[0] = flags;
        header[1] = gso;
        header[2..].copy_from_slice(&rest);
        (header, len)
    });
    prop::collection::vec(raw, 1..150)
}

/// The counters without `bursts`: the paths may cut bursts differently.
fn counts(stats: &VringStats) -> Counts {
    let names = VringStats::NAMES.iter().map(|(name, _)| *name);
    names
        .zip(stats.values())
        .filter(|(name, _)| *name != "bursts")
        .collect()
}

fn transmit(
    frames: &[RawFrame],
    size: u16,
    features: u64,
    layout: TxLayout,
) -> (Vec<SentFrame>, Counts) {
    let config = net::DriverQueueConfig {
        tx_layout: layout,
        tx_slot: 10_240,
        ..net::DriverQueueConfig::new(size, features)
    };
    let ram = GuestRam::new((config.memory() + 0x2_0000).next_multiple_of(4096)).unwrap();
    let mut driver = tx::DriverTxQueue::new(&ram, &config).unwrap();
    let setup = driver.queue.setup().unwrap();
    let user = |addr| ram.user_addr(addr).unwrap();
    let stats = Arc::new(VringStats::default());
    let mut device = TxQueue::new(QueueConfig {
        layout: VirtqueueLayout {
            size: setup.size,
            desc: user(setup.addresses.descriptors),
            avail: user(setup.addresses.driver),
            used: user(setup.addresses.device),
        },
        base: setup.base,
        features: Features(features),
        memory: Arc::new(ram.guest_memory().unwrap()),
        stats: Arc::clone(&stats),
        record: None,
    })
    .unwrap();
    let uplink = RecordingUplink::default();
    let mut rest = frames;
    while !rest.is_empty() {
        let mut queued = 0;
        for (n, (header, len)) in rest.iter().enumerate() {
            if !driver.queue_raw(header, &frame(n, *len)).unwrap() {
                break;
            }
            queued += 1;
        }
        driver.flush().unwrap();
        let mut chains = 0;
        while chains < queued {
            chains += device.send(Some(&uplink)).unwrap().chains;
        }
        assert_eq!(device.send(Some(&uplink)).unwrap().chains, 0);
        assert_eq!(usize::from(driver.reclaim().unwrap()), queued);
        assert_eq!(device.rewind(), driver.queue.ring.base());
        rest = &rest[queued..];
    }
    (uplink.sent(), counts(&stats))
}

fn push(
    bursts: &[Vec<RawFrame>],
    size: u16,
    features: u64,
    buffers: &[u32],
) -> (Vec<(Vec<u8>, u16)>, Counts) {
    let Receiveq {
        mut driver,
        mut device,
        stats,
        ram: _ram,
    } = Receiveq::new(size, features, buffers);
    let mut received = Vec::new();
    for burst in bursts {
        driver.fill().unwrap();
        let mut bytes: Vec<_> = burst.iter().map(|(_, len)| frame(*len, *len)).collect();
        let slices: Vec<_> = bytes
            .iter_mut()
            .map(|bytes| [GuestSlice::from_private(bytes)])
            .collect();
        let frames: Vec<_> = burst
            .iter()
            .zip(&slices)
            .map(|((header, len), payload)| TxFrame {
                header: VnetHeader(*header),
                payload,
                len: *len,
            })
            .collect();
        for frames in frames.chunks(64) {
            let pushed = device.push(frames).unwrap();
            let mut count = 0;
            driver
                .receive(usize::MAX, |frame| {
                    count += 1;
                    let mut bytes = frame.header.to_bytes()[..10].to_vec();
                    bytes.extend(frame.to_frame().bytes);
                    received.push((bytes, frame.header.num_buffers));
                })
                .unwrap();
            assert_eq!(pushed.frames, count);
        }
    }
    (received, counts(&stats))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn transmitted_frames_and_counters_are_those_of_the_general_path(
        frames in raw_frames(),
        (packed, size) in prop::sample::select(vec![(0, 64), (0, 256), (PACKED, 256), (PACKED, 100)]),
    ) {
        let features = FULL | packed;
        let fast = transmit(&frames, size, features, TxLayout::Single);
        let general = transmit(&frames, size, features, TxLayout::SeparateHeader);
        prop_assert_eq!(fast, general);
    }

    #[test]
    fn pushed_frames_and_counters_are_those_of_the_general_path(
        bursts in prop::collection::vec(raw_frames(), 1..4),
        packed in prop::sample::select(vec![0, PACKED]),
    ) {
        let is_valid = |frame: &RawFrame| frame.1 >= 14;
        let bursts: Vec<Vec<_>> = bursts
            .into_iter()
            .map(|burst| burst.into_iter().filter(is_valid).collect())
            .collect();
        let features = FULL | packed;
        let fast = push(&bursts, 256, features, &[2060]);
        let general = push(&bursts, 512, features, &[12, 2048]);
        prop_assert_eq!(fast, general);
    }
}
