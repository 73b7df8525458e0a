//! The driver of a packed virtqueue with a minimal device that follows the text of the
//! specification: it reads and writes one descriptor after the other with the raw access of the
//! virtqueue.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::VecDeque;

use virtionet_guest::driver::{
    Buf, DeviceFault, DriverVirtqueue, DriverVirtqueueConfig, DriverVirtqueueError,
};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::packed::{
    PackedDescriptor, PackedDriverVirtqueue, RingPosition, VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};
use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

struct Fixture {
    ram: GuestRam,
    ring: DriverVirtqueue,
    avail: RingPosition,
    used: RingPosition,
}

/// A chain as the device sees it: its id, its number of descriptors in the ring, and its buffers.
type Chain = (u16, u16, Vec<Buf>);

fn fixture(size: u16, event_idx: bool, start: u16) -> Fixture {
    let ram = GuestRam::new(8 << 20).unwrap();
    let config = DriverVirtqueueConfig {
        size,
        event_idx,
        packed: true,
        start,
    };
    let ring = DriverVirtqueue::new(&ram, config).unwrap();
    let position = RingPosition::nth(start, size);
    assert_eq!(ring.base() & 0xffff, u32::from(position.word()));
    Fixture {
        ram,
        ring,
        avail: position,
        used: position,
    }
}

impl Fixture {
    fn packed(&mut self) -> &mut PackedDriverVirtqueue {
        self.ring.as_packed().unwrap()
    }

    /// Dequeues the next chain.
    fn pop(&mut self) -> Option<Chain> {
        let size = self.ring.size();
        let mut bufs = Vec::new();
        for count in 1.. {
            let at = self.avail;
            let found = self.packed().descriptor(at.index);
            if found.flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) != at.available() {
                assert!(bufs.is_empty(), "a chain has no end");
                return None;
            }
            self.avail = at.after(1, size);
            if found.flags & VRING_DESC_F_INDIRECT != 0 {
                bufs.append(&mut self.table(found.addr, found.len));
            } else {
                bufs.push(buf(found));
            }
            if found.flags & VRING_DESC_F_NEXT == 0 {
                return Some((found.id, count, bufs));
            }
        }
        None
    }

    fn table(&self, addr: u64, len: u32) -> Vec<Buf> {
        let area = self.ram.area(addr, len.into()).unwrap();
        let entries = (0..area.len()).step_by(16);
        entries
            .map(|at| {
                let entry = PackedDescriptor::load(&area, at);
                assert_eq!(entry.flags & !VRING_DESC_F_WRITE, 0);
                buf(entry)
            })
            .collect()
    }

    fn complete(&mut self, id: u16, count: u16, len: u32) {
        let position = self.used;
        let used = PackedDescriptor::new(0, len, id, position.used());
        self.packed().set_descriptor(position.index, used);
        self.used = position.after(count, self.ring.size());
    }

    fn collected(&mut self) -> Vec<(u64, u32)> {
        let mut all = Vec::new();
        self.ring
            .collect(|token, len| all.push((token, len)))
            .unwrap();
        all
    }
}

fn buf(found: PackedDescriptor) -> Buf {
    Buf {
        addr: found.addr,
        len: found.len,
        writable: found.flags & VRING_DESC_F_WRITE != 0,
    }
}

/// A chain of `n` buffers that differ from those of every other `token`.
fn chain(token: u64, n: u64) -> Vec<Buf> {
    (0..n)
        .map(|i| Buf {
            addr: 0x10_0000 + token * 0x100 + i * 16,
            len: u32::try_from(16 + i).unwrap(),
            writable: token.is_multiple_of(3) && i > 0,
        })
        .collect()
}

/// Passes chains of several lengths, direct and indirect, through driver and device for many laps.
/// The device completes them in order, or out of order if `shuffled`.
fn run_through(size: u16, start: u16, shuffled: bool) {
    let mut b = fixture(size, true, start);
    let mut token = 0;
    let mut pending = VecDeque::new();
    for round in 0..40 {
        for length in (1..=4).cycle().skip(round) {
            let bufs = chain(token, length);
            match b.ring.add(&bufs, round % 3 == 2, token) {
                Ok(_) => pending.push_back((token, bufs)),
                Err(DriverVirtqueueError::Full { .. }) => break,
                Err(error) => panic!("{error}"),
            };
            token += 1;
        }
        assert!(b.pop().is_none(), "a chain is visible before publish");
        b.ring.publish();
        let mut taken = Vec::new();
        while let Some((id, count, bufs)) = b.pop() {
            let (token, made) = pending.pop_front().unwrap();
            assert_eq!(bufs, made);
            taken.push((id, count, token));
        }
        assert!(pending.is_empty(), "the device does not see every chain");
        if shuffled {
            let mid = taken.len() / 2;
            taken.rotate_left(mid);
        }
        let mut want = Vec::new();
        for (id, count, token) in taken {
            let len = u32::try_from(token).unwrap();
            b.complete(id, count, len);
            want.push((token, len));
        }
        let base = u32::from(b.used.word());
        assert_eq!(b.ring.base(), base | base << 16);
        assert_eq!(b.collected(), want);
        assert_eq!((b.ring.free(), b.ring.in_flight()), (size, 0));
        assert_eq!(b.used, b.avail);
    }
}

#[test]
fn chains_completed_in_any_order_are_collected_lap_after_lap() {
    for size in [1, 2, 3, 4, 5, 7, 8, 100, 256] {
        for start in [0, size - 1, size, 65_500] {
            run_through(size, start, false);
            run_through(size, start, true);
        }
    }
}

#[test]
fn virtqueue_of_the_largest_size_can_be_full() {
    let mut b = fixture(32_768, false, 40_000);
    let one = [Buf::readable(0x1000, 1)];
    for token in 0..32_768 {
        b.ring.add(&one, false, token).unwrap();
    }
    assert!(matches!(
        b.ring.add(&one, true, 0),
        Err(DriverVirtqueueError::Full { needed: 1, free: 0 })
    ));
    b.ring.publish();
    while let Some((id, count, _)) = b.pop() {
        b.complete(id, count, 0);
    }
    assert_eq!(b.collected().len(), 32_768);
}

#[test]
fn indirect_chain_longer_than_the_ring_takes_one_descriptor() {
    let mut b = fixture(2, false, 0);
    let long = chain(1, 9);
    assert!(b.ring.add(&long, false, 7).is_err());
    assert!(matches!(
        b.ring.add(&[], true, 7),
        Err(DriverVirtqueueError::Empty)
    ));
    b.ring.add(&long, true, 7).unwrap();
    assert_eq!(b.ring.free(), 1);
    b.ring.publish();
    let (id, count, bufs) = b.pop().unwrap();
    assert_eq!((count, bufs), (1, long));
    b.complete(id, count, 0);
    assert_eq!(b.collected(), [(7, 0)]);
}

#[test]
fn kick_is_needed_when_the_devices_event_area_asks_for_it() {
    // Each row: `off_wrap` and flags of the device's event area, and whether a chain of two
    // descriptors at 5 of 8 causes a kick.
    for (off_wrap, flags, wanted) in [
        (0, VRING_PACKED_EVENT_FLAG_ENABLE, true),
        (0x8005, VRING_PACKED_EVENT_FLAG_DISABLE, false),
        (0x8004, VRING_PACKED_EVENT_FLAG_DESC, false),
        (0x8005, VRING_PACKED_EVENT_FLAG_DESC, true),
        (0x8006, VRING_PACKED_EVENT_FLAG_DESC, true),
        (0x8007, VRING_PACKED_EVENT_FLAG_DESC, false),
        (0x0005, VRING_PACKED_EVENT_FLAG_DESC, false),
        (0xffff, VRING_PACKED_EVENT_FLAG_DESC, false),
        (0x8004, 3, true),
    ] {
        let mut b = fixture(8, true, 5);
        b.packed().set_device_event(off_wrap, flags);
        assert!(!b.ring.is_kick_needed(), "nothing was published");
        b.ring.add(&chain(1, 2), false, 1).unwrap();
        b.ring.publish();
        assert_eq!(b.ring.is_kick_needed(), wanted, "{off_wrap:#x} {flags}");
        assert!(!b.ring.is_kick_needed(), "one kick suffices");
    }
    let mut b = fixture(8, false, 5);
    b.packed()
        .set_device_event(0x8001, VRING_PACKED_EVENT_FLAG_DESC);
    b.ring.add(&chain(1, 2), false, 1).unwrap();
    b.ring.publish();
    assert!(
        b.ring.is_kick_needed(),
        "VIRTIO_F_EVENT_IDX is not negotiated"
    );
}

#[test]
fn kick_is_needed_after_a_whole_lap_without_check() {
    for size in [1, 4, 7] {
        let mut b = fixture(size, true, 0);
        let event_position = b.avail.word();
        b.packed()
            .set_device_event(event_position, VRING_PACKED_EVENT_FLAG_DESC);
        for token in 0..u64::from(size) {
            b.ring.add(&chain(token, 1), false, token).unwrap();
            b.ring.publish();
        }
        assert!(b.ring.is_kick_needed(), "{size} descriptors");
    }
}

#[test]
fn enabled_calls_name_the_position_of_the_next_used_chain() {
    let mut b = fixture(5, true, 4);
    b.ring.disable_calls();
    assert_eq!(b.packed().driver_event().1, VRING_PACKED_EVENT_FLAG_DISABLE);
    assert!(!b.ring.enable_calls());
    assert_eq!(
        b.packed().driver_event(),
        (0x8004, VRING_PACKED_EVENT_FLAG_DESC)
    );
    b.ring.add(&chain(0, 2), false, 9).unwrap();
    b.ring.publish();
    assert!(!b.ring.enable_calls(), "nothing is used yet");
    let (id, count, _) = b.pop().unwrap();
    b.complete(id, count, 3);
    assert!(b.ring.enable_calls(), "a used chain is pending");
    assert_eq!(b.collected(), [(9, 3)]);
    assert!(!b.ring.enable_calls());
    assert_eq!(b.packed().driver_event(), (1, VRING_PACKED_EVENT_FLAG_DESC));
    let mut b = fixture(5, false, 4);
    assert!(!b.ring.enable_calls());
    assert_eq!(b.packed().driver_event().1, VRING_PACKED_EVENT_FLAG_ENABLE);
}

#[test]
fn virtqueue_after_reset_works_like_a_new_one() {
    let mut b = fixture(3, true, 7);
    b.ring.add(&chain(0, 2), false, 0).unwrap();
    b.ring.publish();
    b.ring.add(&chain(1, 1), true, 1).unwrap();
    b.ring.reset();
    assert_eq!((b.ring.free(), b.ring.in_flight()), (3, 0));
    assert_eq!(b.ring.base(), 0x8000_8000);
    (b.avail, b.used) = (RingPosition::nth(0, 3), RingPosition::nth(0, 3));
    assert!(b.pop().is_none());
    b.ring.add(&chain(2, 3), false, 2).unwrap();
    b.ring.publish();
    assert_eq!(b.pop().unwrap().2, chain(2, 3));
}

#[test]
fn used_id_of_no_chain_in_flight_is_a_device_fault() {
    let fresh = || {
        let mut b = fixture(4, false, 6);
        for token in 0..3 {
            b.ring.add(&chain(token, 1), false, token).unwrap();
        }
        b.ring.publish();
        b
    };
    for id in [3, 4, 70, u16::MAX] {
        let mut b = fresh();
        b.complete(id, 1, 0);
        let fault = b.ring.collect(|_, _| {}).unwrap_err();
        assert_eq!(fault, DeviceFault::UsedId(id.into()));
    }
    let mut twice = fresh();
    twice.complete(1, 1, 0);
    twice.complete(1, 1, 0);
    let fault = twice.ring.collect(|_, _| {}).unwrap_err();
    assert_eq!(fault, DeviceFault::UsedId(1));
    // More used descriptors than chains in flight: the driver does not read the rest.
    let mut more = fresh();
    for id in [0, 1, 2, 3] {
        more.complete(id, 1, 0);
    }
    assert_eq!(more.collected().len(), 3);
    assert_eq!(more.ring.refresh(), Ok(0));
}

#[test]
fn size_that_the_packed_format_does_not_allow_is_refused() {
    let ram = GuestRam::new(1 << 20).unwrap();
    for size in [0, 32_769] {
        let config = DriverVirtqueueConfig {
            packed: true,
            ..DriverVirtqueueConfig::new(size, 0)
        };
        let error = DriverVirtqueue::new(&ram, config).unwrap_err();
        assert!(matches!(error, DriverVirtqueueError::Size(n) if n == size));
    }
    let packed = DriverVirtqueueConfig::new(100, virtionet_guest::net::PACKED);
    assert!(
        DriverVirtqueue::new(&ram, packed)
            .unwrap()
            .as_packed()
            .is_some()
    );
}
