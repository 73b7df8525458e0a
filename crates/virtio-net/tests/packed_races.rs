//! A guest that rewrites the descriptors of a packed ring, including the wrap counters, while the
//! device reads them. Whatever the device reads, the result is a fault or valid frames, and no byte
//! is written outside of the buffers.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::packed::PackedRingFixture;
use common::{DATA, END, FULL, SetOnDrop, TABLE, frame, good};
use virtionet_guest::memory::Area;
use virtionet_guest::packed::{PackedDescriptor, VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED};
use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::{MAX_FRAME, MIN_FRAME};
use virtionet_virtio_net::{DeviceQueue, RxQueue, TxQueue};

const SIZE: u16 = 13;
/// The shortest duration of a race.
const LEAST: Duration = Duration::from_millis(300);
/// The longest duration of a race, in which all outcomes must occur.
const MOST: Duration = Duration::from_secs(20);

/// A pseudo-random number, the same in every run.
fn mix(round: usize) -> usize {
    let n = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ n >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 16
}

/// A value that a descriptor may have at any moment. `flag` is the direction of the ring.
fn variant(index: u16, flag: u16, n: usize) -> PackedDescriptor {
    let addr = DATA + 0x1000 * u64::from(index);
    let whose = [
        VIRTQ_DESC_F_AVAIL,
        VIRTQ_DESC_F_USED,
        VIRTQ_DESC_F_AVAIL,
        VIRTQ_DESC_F_USED,
        VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED,
        0,
    ][n % 6];
    let (addr, len, flags) = match n / 6 % 12 {
        0 => (END - 10, 72, flag),
        1 => (addr, 72, flag ^ VRING_DESC_F_WRITE),
        2 => (TABLE, 32, VRING_DESC_F_INDIRECT),
        3 => (TABLE, 32, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT),
        4..8 => (addr, 72, flag | VRING_DESC_F_NEXT),
        _ => (addr, 72, flag),
    };
    PackedDescriptor::new(addr, len, index, flags | whose)
}

/// Rewrites the ring on a thread of its own while `step` runs here, until all three outcomes that
/// `step` reports have occurred: frames, invalid chains, and a fault of the ring.
fn race(ring: &Area, flag: u16, mut step: impl FnMut() -> [bool; 3]) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let rounds = (0..).take_while(|_| !done.load(Ordering::Relaxed));
            for round in rounds {
                // In some rounds no chain ends; in the others most do.
                let endless = if round >> 12 & 7 == 7 {
                    VRING_DESC_F_NEXT
                } else {
                    0
                };
                let index = u16::try_from(round % usize::from(SIZE)).unwrap();
                let mut next = variant(index, flag, mix(round));
                next.flags |= endless;
                next.store(ring, 16 * usize::from(index));
            }
        });
        let _done = SetOnDrop(&done);
        let begin = Instant::now();
        let mut seen = [false; 3];
        while begin.elapsed() < LEAST || seen.contains(&false) && begin.elapsed() < MOST {
            for (all, now) in seen.iter_mut().zip(step()) {
                *all |= now;
            }
        }
        assert_eq!(seen, [true; 3], "frames, refused chains, faults");
    });
}

/// A view of the ring that another thread may write through.
fn descriptors(fixture: &PackedRingFixture) -> Area {
    let at = fixture.ring.addresses().descriptors;
    fixture.ram.area(at, 16 * u64::from(SIZE)).unwrap()
}

/// Checks that both halves of a base are positions in the ring.
fn in_the_ring(base: u32) {
    assert_eq!(base & 0xffff, base >> 16, "{base:#x}");
    assert!(base & 0x7fff < u32::from(SIZE), "{base:#x}");
}

#[test]
fn tx_descriptors_and_wrap_counters_that_change_while_they_are_read() {
    let mut fixture = PackedRingFixture::new(0, SIZE, FULL);
    let mut tx: TxQueue = fixture.device();
    for index in 0..SIZE {
        let addr = DATA + 0x1000 * u64::from(index);
        fixture.ram.write(addr, &good()).unwrap();
    }
    fixture.table(&[(DATA, 12, 0), (DATA + 12, 60, 0)]);
    let ring = descriptors(&fixture);
    race(&ring, 0, || {
        let sent = tx.send(Some(&fixture.uplink));
        let carried = fixture.uplink.sent();
        for frame in &carried {
            assert_eq!(frame.bytes.len(), frame.len);
            assert!((MIN_FRAME..=MAX_FRAME).contains(&frame.len));
            assert_eq!(frame.header.check(frame.len, Features(FULL)), Ok(()));
        }
        let refused: u64 = fixture.counted().iter().map(|(_, n)| n).sum();
        in_the_ring(tx.rewind());
        let Ok(sent) = sent else {
            tx = fixture.device();
            return [false, false, true];
        };
        let passed = u64::try_from(carried.len()).unwrap();
        assert_eq!(passed + refused, u64::try_from(sent.chains).unwrap());
        assert!(sent.chains <= usize::from(SIZE));
        [passed > 0, refused > 0, false]
    });
}

#[test]
fn rx_descriptors_and_wrap_counters_that_change_while_buffers_are_filled() {
    let mut fixture = PackedRingFixture::new(0, SIZE, FULL);
    let mut rx: RxQueue = fixture.device();
    fixture.table(&[(DATA, 72, VRING_DESC_F_WRITE); 2]);
    let pages = || (DATA..).step_by(0x1000).take(usize::from(SIZE));
    // Canaries follow every buffer, and there is one at the end of memory.
    let canary = [0xa5; 0x800];
    for page in pages() {
        fixture.ram.write(page + 72, &canary).unwrap();
    }
    fixture.ram.write(END - 0x800, &canary).unwrap();
    let ring = descriptors(&fixture);
    race(&ring, VRING_DESC_F_WRITE, || {
        while fixture.uplink.waiting().len() < 32 {
            fixture.uplink.feed([vec![0; 12], frame(1, 48)].concat());
        }
        let received = rx.receive(&fixture.uplink, 16, 1 << 20);
        let refused = !fixture.counted().is_empty();
        let base = rx.rewind();
        let Ok(received) = received else {
            rx = fixture.device();
            return [false, refused, true];
        };
        in_the_ring(base);
        [received.frames > 0, refused, false]
    });
    let mut back = canary;
    for at in pages().map(|page| page + 72).chain([END - 0x800]) {
        fixture.ram.read(at, &mut back).unwrap();
        assert_eq!(back, canary);
    }
}
