//! Frames that another thread pushes to a receiveq: content, order, and frames that do not fit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{DATA, FULL, PLAIN, Receiveq, SplitRingFixture, frame};
use proptest::prelude::*;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtionet_guest::net;
use virtionet_guest::split::VRING_DESC_F_WRITE;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::uplink::TxFrame;
use virtionet_virtio_net::{DeviceQueue, PushOutcome, RxQueue};
use virtionet_virtqueue::VirtqueueFault;
use virtionet_virtqueue::memory::GuestSlice;

const UNMERGED: u64 = FULL & !(1 << VIRTIO_NET_F_MRG_RXBUF);
const MERGEABLE: u64 = PLAIN | 1 << VIRTIO_NET_F_MRG_RXBUF;
const PACKED: u64 = FULL | net::PACKED;

/// Pushes frames, each in segments of `cut` bytes.
fn push(rx: &mut RxQueue, frames: &[Vec<u8>], cut: usize) -> Result<PushOutcome, VirtqueueFault> {
    let mut bytes = frames.to_vec();
    let slices: Vec<Vec<GuestSlice<'_>>> = bytes
        .iter_mut()
        .map(|frame| {
            frame
                .chunks_mut(cut)
                .map(GuestSlice::from_private)
                .collect()
        })
        .collect();
    let frames: Vec<TxFrame<'_>> = slices
        .iter()
        .zip(frames)
        .map(|(payload, frame)| TxFrame {
            header: VnetHeader::default(),
            payload,
            len: frame.len(),
        })
        .collect();
    rx.push(&frames)
}

/// Ring size, features, and the descriptors of each buffer.
const LAYOUTS: &[(u16, u64, &[u32])] = &[
    (256, FULL, &[1526]),
    (1024, FULL, &[147]),
    (256, FULL, &[1, 10, 1, 700]),
    (256, UNMERGED, &[65_569]),
    (256, UNMERGED, &[7, 5, 10_000, 55_557]),
    (256, 0, &[65_569]),
    (256, PACKED, &[1526]),
    (1023, PACKED, &[147]),
    (200, PACKED, &[1, 10, 1, 700]),
    (7, PACKED & !(1 << VIRTIO_NET_F_MRG_RXBUF), &[65_569]),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the buffers, the segments and the order of pushes: each frame that was not dropped
    /// arrives unchanged and in order, with its number of buffers.
    #[test]
    fn frames_arrive_whole_and_in_order(
        layout in 0..LAYOUTS.len(),
        cut in prop_oneof![Just(usize::MAX), 1..200_usize],
        bursts in prop::collection::vec(prop::collection::vec(
            prop_oneof![14..200_usize, 1000..3000_usize, 60_000..65_558_usize], 1..6), 1..12),
    ) {
        let (size, features, buffers) = LAYOUTS[layout];
        let Receiveq { mut driver, mut device, ram: _ram, .. } = Receiveq::new(size, features, buffers);
        driver.fill().unwrap();
        let mut seed = 0;
        for lens in bursts {
            let frames: Vec<_> = lens.iter().map(|len| { seed += 1; frame(seed, *len) }).collect();
            let pushed = push(&mut device, &frames, cut).unwrap();
            let mut got = Vec::new();
            driver.receive(usize::MAX, |frame| {
                assert_eq!(usize::from(frame.header.num_buffers.max(1)), frame.buffers());
                got.push(frame.to_frame().bytes);
            }).unwrap();
            prop_assert_eq!(pushed.frames, got.len());
            // Too many long frames may not fit; those that arrive are in order, and all arrive that
            // fit.
            let mut wanted = frames.iter();
            for bytes in &got {
                prop_assert!(wanted.any(|frame| frame == bytes));
            }
            let need: usize = frames.iter().map(|frame| frame.len() + 12).sum();
            let each: usize = buffers.iter().map(|len| usize::try_from(*len).unwrap()).sum();
            if need + each * frames.len() <= each * usize::from(size) / buffers.len() {
                prop_assert_eq!(got.len(), frames.len());
            }
        }
        prop_assert_eq!(driver.queue.ring.in_flight() > 0, true);
    }
}

#[test]
fn frames_that_do_not_fit_are_counted_and_later_ones_arrive() {
    let mut fixture = SplitRingFixture::new(8, MERGEABLE);
    let mut rx: RxQueue = fixture.device();
    assert_eq!(push(&mut rx, &[frame(0, 60)], 60).unwrap().frames, 0);
    assert_eq!(fixture.counted(), [("dropped_no_buffer", 1)]);
    fixture.desc(0, DATA, 100, VRING_DESC_F_WRITE, 0);
    fixture.desc(1, DATA + 0x1000, 100, VRING_DESC_F_WRITE, 0);
    fixture.offer(&[0, 1]);
    // The first frame is too long for both buffers, so they are free for the second.
    let pushed = push(&mut rx, &[frame(1, 500), frame(2, 60)], 500).unwrap();
    assert_eq!(pushed.frames, 1);
    assert_eq!(fixture.counted(), [("dropped_no_buffer", 1)]);
    assert_eq!(fixture.used(), [(0, 72)]);
    let mut bytes = vec![0; 60];
    fixture.ram.read(DATA + 12, &mut bytes).unwrap();
    assert_eq!(bytes, frame(2, 60));
    // The other buffer is unused and is rewound.
    assert_eq!(rx.rewind(), 1);
}

#[test]
fn frame_longer_than_an_unmergeable_buffer_is_too_long() {
    let mut fixture = SplitRingFixture::new(8, UNMERGED);
    let mut rx: RxQueue = fixture.device();
    fixture.desc(0, DATA, 100, VRING_DESC_F_WRITE, 0);
    fixture.offer(&[0]);
    let pushed = push(&mut rx, &[frame(1, 89), frame(2, 88)], 100).unwrap();
    assert_eq!(pushed.frames, 1);
    assert_eq!(fixture.counted(), [("dropped_too_long", 1)]);
    assert_eq!(fixture.used(), [(0, 100)]);
}

#[test]
fn invalid_buffer_is_completed_empty_and_the_frame_uses_the_next() {
    for features in [FULL, UNMERGED] {
        let mut fixture = SplitRingFixture::new(8, features);
        let mut rx: RxQueue = fixture.device();
        fixture.desc(0, DATA, 11, VRING_DESC_F_WRITE, 0);
        fixture.desc(1, DATA, 1526, 0, 0);
        fixture.desc(2, DATA, 1526, VRING_DESC_F_WRITE, 0);
        fixture.offer(&[0, 1, 2, 2]);
        let frames = [frame(1, 60), frame(2, 61)];
        assert_eq!(push(&mut rx, &frames, 7).unwrap().frames, 2);
        assert_eq!(fixture.used(), [(0, 0), (1, 0), (2, 72), (2, 73)]);
        let counted = fixture.counted();
        assert_eq!(
            counted,
            [("rx_buffer_too_small", 1), ("direction_wrong", 1)]
        );
    }
}

#[test]
fn frames_before_a_bad_head_are_published_before_the_fault() {
    let mut fixture = SplitRingFixture::new(8, FULL);
    let mut rx: RxQueue = fixture.device();
    fixture.desc(2, DATA, 1526, VRING_DESC_F_WRITE, 0);
    fixture.offer(&[2, 77]);
    let frames = [frame(1, 60), frame(2, 60)];
    assert_eq!(push(&mut rx, &frames, 60).unwrap().frames, 1);
    assert_eq!(fixture.used(), [(2, 72)]);
    assert_eq!(fixture.counted(), [("dropped_no_buffer", 1)]);
    let fault = push(&mut rx, &frames, 60).unwrap_err();
    assert_eq!(fault, VirtqueueFault::HeadOutOfRange { head: 77, size: 8 });
    assert_eq!(fixture.counted(), [("dropped_no_buffer", 2)]);
}

/// Of a driver that makes the same invalid buffers available again and again, no more are dequeued
/// than the ring has, so that the memory for them is bounded.
#[test]
fn buffers_that_are_made_available_again_and_again_take_bounded_memory() {
    let mut fixture = SplitRingFixture::new(8, MERGEABLE);
    let mut rx: RxQueue = fixture.device();
    fixture.desc(0, DATA, 12, VRING_DESC_F_WRITE, 0);
    fixture.desc(1, DATA, 1526, 0, 0);
    fixture.offer(&[0]);
    let mut dropped = 0;
    for _ in 0..100 {
        fixture.offer(&[1; 7]);
        let pushed = push(&mut rx, &[frame(1, 60), frame(2, 60), frame(3, 1000)], 60);
        assert_eq!(pushed.unwrap().frames, 0);
        for (name, count) in fixture.counted() {
            match name {
                "dropped_no_buffer" => dropped += count,
                "direction_wrong" => assert!(count <= 7),
                other => panic!("{other}: {count}"),
            }
        }
    }
    assert_eq!(dropped, 300);
    assert_eq!(fixture.stats.direction_wrong.get(), 7);
    assert_eq!(rx.rewind(), 0);
}
