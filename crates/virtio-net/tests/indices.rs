//! Indices of a guest: an impossible one is a fault of the ring, and an unusual one has no effect
//! on the device.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{DATA, FULL, PLAIN, SplitRingFixture, frame, good};
use virtionet_guest::split::VRING_DESC_F_WRITE;
use virtionet_virtio_net::{DeviceQueue, RxEndReason, RxQueue, TxQueue};
use virtionet_virtqueue::VirtqueueFault;

/// A queue of either direction, which moves chains or frames.
trait Step: DeviceQueue {
    fn step(&mut self, fixture: &SplitRingFixture) -> Result<usize, VirtqueueFault>;
}

impl Step for TxQueue {
    fn step(&mut self, fixture: &SplitRingFixture) -> Result<usize, VirtqueueFault> {
        Ok(self.send(Some(&fixture.uplink))?.chains)
    }
}

impl Step for RxQueue {
    fn step(&mut self, fixture: &SplitRingFixture) -> Result<usize, VirtqueueFault> {
        Ok(self.receive(&fixture.uplink, 64, 1 << 20)?.frames)
    }
}

/// Pairs of the device's next index and the driver's available index.
const JUMPS: &[(u16, u16)] = &[
    (0, 17),
    (0, 0x8000),
    (100, 99),
    (0, u16::MAX),
    (65_530, 12),
    (65_535, 65_534),
];

fn jump_is_a_fault<Q: Step>() {
    for &(start, avail) in JUMPS {
        let fixture = SplitRingFixture::starting_at(start, 16, FULL);
        fixture.uplink.feed([vec![0; 12], frame(1, 60)].concat());
        let mut queue: Q = fixture.device();
        fixture.ring.set_avail_index(avail);
        let want = VirtqueueFault::AvailIndexJump {
            avail,
            next: start,
            size: 16,
        };
        // The fault persists, and nothing is written to the ring.
        for _ in 0..3 {
            assert_eq!(queue.step(&fixture), Err(want));
        }
        assert_eq!(queue.rewind(), u32::from(start));
        assert_eq!(fixture.ring.used_index(), start);
        assert!(fixture.uplink.sent().is_empty());
    }
}

#[test]
fn available_index_too_far_ahead_or_behind_is_a_fault() {
    jump_is_a_fault::<TxQueue>();
    jump_is_a_fault::<RxQueue>();
}

#[test]
fn chains_before_a_head_outside_the_ring_are_completed_first() {
    for head in [16, 17, 0x8000, u16::MAX] {
        let mut fixture = SplitRingFixture::new(16, FULL);
        let mut tx: TxQueue = fixture.device();
        fixture.readable(2, &good());
        fixture.offer(&[2, 2, head, 2]);
        assert_eq!(tx.step(&fixture), Ok(2));
        assert_eq!(fixture.used(), [(2, 0), (2, 0)]);
        let want = Err(VirtqueueFault::HeadOutOfRange { head, size: 16 });
        assert_eq!((tx.step(&fixture), tx.step(&fixture)), (want, want));
        assert_eq!(fixture.used(), []);
        assert_eq!(fixture.uplink.sent().len(), 2);

        // A ring that is configured again after the bad head was replaced works.
        fixture.ring.set_avail_entry(2, 2);
        let mut tx = TxQueue::new(fixture.config(2)).unwrap();
        assert_eq!(tx.step(&fixture), Ok(2));
        assert_eq!(fixture.used(), [(2, 0), (2, 0)]);
    }
}

#[test]
fn ring_with_only_bad_heads_is_a_fault_at_once() {
    for features in [FULL, PLAIN] {
        let mut fixture = SplitRingFixture::new(16, features);
        fixture.offer(&[99; 16]);
        let want = Err(VirtqueueFault::HeadOutOfRange { head: 99, size: 16 });
        let mut tx: TxQueue = fixture.device();
        assert_eq!(tx.step(&fixture), want);
        let mut rx: RxQueue = fixture.device();
        assert_eq!(rx.step(&fixture), want);
        assert_eq!(fixture.used(), []);
    }
}

/// RX dequeues buffers in advance: a bad head behind them must not affect frames in them.
#[test]
fn bad_head_behind_rx_buffers_is_a_fault_and_the_others_are_rewound() {
    let mut fixture = SplitRingFixture::new(16, FULL);
    let mut rx: RxQueue = fixture.device();
    fixture.desc(0, DATA, 1526, VRING_DESC_F_WRITE, 0);
    fixture.offer(&[0, 0, 99]);
    fixture.uplink.feed([vec![0; 12], frame(1, 60)].concat());
    let want = Err(VirtqueueFault::HeadOutOfRange { head: 99, size: 16 });
    assert_eq!(rx.step(&fixture), want);
    assert_eq!(rx.rewind(), u32::from(fixture.ring.used_index()));
    assert_eq!(fixture.uplink.waiting().len(), 1, "the frame waits");
}

#[test]
fn indices_wrap_at_65_535() {
    for size in [2, 16, 32_768] {
        let mut fixture = SplitRingFixture::starting_at(65_533, size, FULL);
        let mut tx: TxQueue = fixture.device();
        fixture.readable(1, &good());
        for round in 0..8u16 {
            fixture.offer(&[1, 1]);
            assert_eq!(tx.step(&fixture), Ok(2), "round {round}");
            assert_eq!(fixture.used(), [(1, 0), (1, 0)]);
        }
        assert_eq!(tx.rewind(), 13);
        assert_eq!(fixture.uplink.sent().len(), 16);
        assert_eq!(fixture.counted(), []);
    }
}

/// `used_event` only decides about interrupts.
#[test]
fn wrong_used_event_costs_only_the_guest_its_interrupts() {
    let mut fixture = SplitRingFixture::new(16, FULL);
    let mut tx: TxQueue = fixture.device();
    fixture.readable(0, &good());
    for (round, (event, called)) in [
        (0, true),
        (u16::MAX, false),
        (0x8000, false),
        (3, true),
        (3, false),
        (7, false),
        (6, true),
    ]
    .into_iter()
    .enumerate()
    {
        fixture.ring.set_used_event(event);
        fixture.offer(&[0]);
        let sent = tx.send(Some(&fixture.uplink)).unwrap();
        assert_eq!(
            (sent.chains, sent.should_call),
            (1, called),
            "round {round}"
        );
        assert_eq!(fixture.used(), [(0, 0)]);
    }
    assert_eq!(fixture.counted(), []);
}

/// The device never reads the used ring.
#[test]
fn guest_that_overwrites_the_used_ring_does_not_affect_the_device() {
    let mut fixture = SplitRingFixture::new(16, FULL);
    let mut tx: TxQueue = fixture.device();
    fixture.readable(0, &good());
    for round in 1..=40u16 {
        for at in 0..16 {
            fixture.ring.set_used_element(at, u32::MAX, u32::MAX);
        }
        fixture.ring.set_used_index(round.wrapping_mul(7919));
        fixture.offer(&[0]);
        assert_eq!(tx.step(&fixture), Ok(1));
        assert_eq!(fixture.ring.used_index(), round);
        assert_eq!(fixture.ring.used_element(round - 1), (0, 0));
    }
    assert_eq!(tx.rewind(), 40);
    assert_eq!(fixture.uplink.sent().len(), 40);
    assert_eq!(fixture.counted(), []);
}

#[test]
fn rx_buffer_over_the_ring_itself_affects_only_that_ring() {
    let at = SplitRingFixture::new(16, FULL).ring.addresses();
    for addr in [at.descriptors, at.driver, at.device] {
        let mut fixture = SplitRingFixture::new(16, FULL);
        let mut rx: RxQueue = fixture.device();
        for index in 0..16 {
            fixture.desc(index, addr, 256, VRING_DESC_F_WRITE, 0);
        }
        fixture.offer(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        for seed in 0..20 {
            fixture
                .uplink
                .feed([vec![0xff; 12], frame(seed, 244)].concat());
        }
        // Whatever the ring contains now, the loop ends: with a fault, or when the buffers are used
        // up.
        for _ in 0..40 {
            match rx.receive(&fixture.uplink, 4, 1 << 20) {
                Ok(received) => assert!(received.frames <= 4),
                Err(_) => break,
            }
        }
        rx.rewind();
    }
}

#[test]
fn empty_ring_moves_nothing() {
    let fixture = SplitRingFixture::new(16, FULL);
    let mut tx: TxQueue = fixture.device();
    let mut rx: RxQueue = fixture.device();
    fixture.uplink.feed([vec![0; 12], frame(1, 60)].concat());
    for _ in 0..100 {
        assert_eq!(tx.step(&fixture), Ok(0));
        let received = rx.receive(&fixture.uplink, 64, 1 << 20).unwrap();
        assert_eq!((received.frames, received.end), (0, RxEndReason::Starved));
        assert!(!received.should_call);
    }
    assert_eq!(fixture.ring.used_index(), 0);
}

#[test]
fn base_other_than_the_used_index_is_corrected_if_the_available_index_allows_it() {
    let mut fixture = SplitRingFixture::new(16, FULL);
    let mut tx: TxQueue = fixture.device();
    fixture.readable(2, &good());
    fixture.offer(&[2, 2, 2]);
    assert_eq!(tx.step(&fixture), Ok(3));
    assert_eq!(fixture.used().len(), 3);
    let base = tx.rewind();
    assert_eq!(
        TxQueue::new(fixture.config(base))
            .unwrap()
            .virtqueue()
            .corrected_base(),
        None
    );

    // The front-end has forgotten the base. Nothing is sent twice.
    let mut tx = TxQueue::new(fixture.config(0)).unwrap();
    assert_eq!(tx.virtqueue().corrected_base(), Some(base));
    fixture.offer(&[2]);
    assert_eq!(tx.step(&fixture), Ok(1));
    assert_eq!(fixture.uplink.sent().len(), 4);

    // An available index that does not fit the used index either: the front-end's base holds.
    fixture
        .ring
        .set_avail_index(u16::try_from(base).unwrap().wrapping_sub(1));
    assert_eq!(
        TxQueue::new(fixture.config(0))
            .unwrap()
            .virtqueue()
            .corrected_base(),
        None
    );
}
