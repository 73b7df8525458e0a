//! The driver of a split virtqueue with the device side of the virtio-queue crate.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use virtionet_guest::driver::{
    Buf, DeviceFault, DriverVirtqueue, DriverVirtqueueConfig, DriverVirtqueueError,
};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::split::{
    SplitDescriptor, SplitDriverVirtqueue, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// The device's memory: the same file, mapped once more by vm-memory.
fn mapped(ram: &GuestRam) -> GuestMemoryMmap {
    let ranges = ram.regions().into_iter().map(|r| {
        let file = ram.file().try_clone().unwrap();
        (
            GuestAddress(r.guest_addr),
            usize::try_from(r.size).unwrap(),
            Some(FileOffset::new(file, r.file_offset)),
        )
    });
    GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
}

struct Fixture {
    ram: GuestRam,
    ring: DriverVirtqueue,
    memory: GuestMemoryMmap,
    device: Queue,
}

fn fixture(size: u16, event_idx: bool, start: u16) -> Fixture {
    let ram = GuestRam::new(8 << 20).unwrap();
    let config = DriverVirtqueueConfig {
        size,
        event_idx,
        packed: false,
        start,
    };
    let ring = DriverVirtqueue::new(&ram, config).unwrap();
    let mut device = Queue::new(size).unwrap();
    let at = ring.addresses();
    device.try_set_size(size).unwrap();
    device
        .try_set_desc_table_address(GuestAddress(at.descriptors))
        .unwrap();
    device
        .try_set_avail_ring_address(GuestAddress(at.driver))
        .unwrap();
    device
        .try_set_used_ring_address(GuestAddress(at.device))
        .unwrap();
    device.set_event_idx(event_idx);
    device.set_next_avail(start);
    device.set_next_used(start);
    device.set_ready(true);
    Fixture {
        memory: mapped(&ram),
        ram,
        ring,
        device,
    }
}

type Chain = (u16, Vec<(u64, u32, bool)>);

impl Fixture {
    fn split(&mut self) -> &mut SplitDriverVirtqueue {
        self.ring.as_split().unwrap()
    }

    /// Dequeues the next chain as the device sees it.
    fn pop(&mut self) -> Option<Chain> {
        let chain = self.device.pop_descriptor_chain(&self.memory)?;
        let head = chain.head_index();
        let bufs = chain
            .map(|d| (d.addr().0, d.len(), d.is_write_only()))
            .collect();
        Some((head, bufs))
    }

    fn complete(&mut self, head: u16, len: u32) {
        self.device.add_used(&self.memory, head, len).unwrap();
    }

    fn collected(&mut self) -> Vec<(u64, u32)> {
        let mut all = Vec::new();
        self.ring
            .collect(|token, len| all.push((token, len)))
            .unwrap();
        all
    }
}

fn as_seen(chain: &[Buf]) -> Vec<(u64, u32, bool)> {
    chain.iter().map(|b| (b.addr, b.len, b.writable)).collect()
}

/// A chain of `n` buffers that differ from those of every other `token`.
fn chain(token: u64, n: u32) -> Vec<Buf> {
    let writable = token.is_multiple_of(3);
    (0..n)
        .map(|i| Buf {
            addr: 0x10_0000 + token * 0x100 + u64::from(i) * 16,
            len: 16 + i,
            writable: writable && i > 0,
        })
        .collect()
}

/// Passes chains of several lengths, direct and indirect, through driver and device across the wrap
/// of the index. The device completes them in order, or out of order if `shuffled`.
fn run_through(size: u16, event_idx: bool, shuffled: bool) {
    let mut b = fixture(size, event_idx, u16::MAX - 2 * size);
    let (mut token, mut done) = (0u64, 0u64);
    let mut pending = HashMap::new();
    for round in 0..40u32 {
        for length in (1..=4).cycle().skip(usize::try_from(round).unwrap()) {
            let bufs = chain(token, length.min(size).into());
            let indirect = round % 2 == 1;
            match b.ring.add(&bufs, indirect, token) {
                Ok(_) => pending.insert(token, as_seen(&bufs)),
                Err(DriverVirtqueueError::Full { .. }) => break,
                Err(error) => panic!("{error}"),
            };
            token += 1;
        }
        assert!(b.pop().is_none(), "a chain is visible before publish");
        b.ring.publish();
        let mut taken = Vec::new();
        while let Some((head, bufs)) = b.pop() {
            taken.push((head, bufs, done));
            done += 1;
        }
        assert_eq!(done, token, "the device does not see every chain");
        if shuffled {
            let mid = taken.len() / 2;
            taken.rotate_left(mid);
        }
        for (head, bufs, nth) in &taken {
            assert_eq!(pending[nth], *bufs);
            b.complete(*head, u32::try_from(*nth).unwrap());
        }
        let order: Vec<u64> = taken.iter().map(|t| t.2).collect();
        let collected = b.collected();
        let tokens: Vec<u64> = collected.iter().map(|c| c.0).collect();
        assert_eq!(tokens, order);
        assert!(collected.iter().all(|&(t, len)| t == u64::from(len)));
        assert_eq!(b.ring.free(), size);
        assert_eq!(b.ring.in_flight(), 0);
    }
    let at = b.split().avail_index();
    assert!(at < u16::MAX - 2 * size, "{at}: the index never wrapped");
}

#[test]
fn chains_completed_in_order_are_collected_across_the_wrap() {
    for size in [2, 8, 256] {
        for event_idx in [false, true] {
            run_through(size, event_idx, false);
        }
    }
}

#[test]
fn chains_completed_out_of_order_are_collected() {
    for size in [4, 64] {
        run_through(size, false, true);
    }
}

#[test]
fn virtqueue_of_the_largest_size_can_be_full() {
    let mut b = fixture(32_768, false, 40_000);
    for token in 0..32_768 {
        b.ring
            .add(&[Buf::readable(0x1000, 1)], false, token)
            .unwrap();
    }
    assert!(matches!(
        b.ring.add(&[Buf::readable(0x1000, 1)], true, 0),
        Err(DriverVirtqueueError::Full { needed: 1, free: 0 })
    ));
    b.ring.publish();
    while let Some((head, _)) = b.pop() {
        b.complete(head, 0);
    }
    assert_eq!(b.collected().len(), 32_768);
}

#[test]
fn indirect_chain_longer_than_the_ring_takes_one_descriptor() {
    let mut b = fixture(2, false, 0);
    let long = chain(1, 9);
    assert!(b.ring.add(&long, false, 7).is_err());
    b.ring.add(&long, true, 7).unwrap();
    assert_eq!(b.ring.free(), 1);
    b.ring.publish();
    let (head, bufs) = b.pop().unwrap();
    assert_eq!(bufs, as_seen(&long));
    b.complete(head, 0);
    assert_eq!(b.collected(), [(7, 0)]);
    // A longer table for the same head replaces the first one, which is freed.
    let before = b.ram.available();
    for _ in 0..10 {
        let longer = chain(1, 40);
        b.ring.add(&longer, true, 8).unwrap();
        b.ring.publish();
        let (head, bufs) = b.pop().unwrap();
        assert_eq!(bufs, as_seen(&longer));
        b.complete(head, 0);
        b.collected();
    }
    assert!(before - b.ram.available() <= 64 * 16 * 2);
}

#[test]
fn kicks_and_calls_without_event_idx_follow_the_flags() {
    let mut b = fixture(8, false, 0);
    assert!(!b.ring.is_kick_needed(), "nothing was published");
    let one = [Buf::writable(0x1000, 16)];
    let send = |b: &mut Fixture| {
        b.ring.add(&one, false, 1).unwrap();
        b.ring.publish();
        b.ring.is_kick_needed()
    };
    assert!(send(&mut b));
    b.device.disable_notification(&b.memory).unwrap();
    assert!(!send(&mut b));
    b.device.enable_notification(&b.memory).unwrap();
    assert!(send(&mut b));
    assert!(!b.ring.is_kick_needed(), "one kick suffices");

    b.ring.disable_calls();
    let flags: u16 = b
        .memory
        .read_obj(GuestAddress(b.ring.addresses().driver))
        .unwrap();
    assert_eq!(flags, VRING_AVAIL_F_NO_INTERRUPT);
    assert!(!b.ring.enable_calls());
    let (head, _) = b.pop().unwrap();
    b.complete(head, 16);
    assert!(b.ring.enable_calls(), "a used chain is pending");
    assert_eq!(b.collected(), [(1, 16)]);
    assert!(!b.ring.enable_calls());
}

#[test]
fn kicks_and_calls_with_event_idx_follow_the_event_indices() {
    let mut b = fixture(8, true, 65_530);
    let one = [Buf::writable(0x1000, 16)];
    // `avail_event` is 0 until the device writes it, which is far from 65,530.
    b.ring.add(&one, false, 0).unwrap();
    b.ring.publish();
    assert!(!b.ring.is_kick_needed());
    for round in 0..20u64 {
        while b.pop().is_some_and(|(head, _)| {
            b.complete(head, 16);
            true
        }) {}
        // The device waits: it wants a kick for the next chain and for no other.
        assert!(!b.device.enable_notification(&b.memory).unwrap());
        b.collected();
        assert!(!b.ring.enable_calls());
        for nth in 0..3 {
            b.ring.add(&one, false, round).unwrap();
            b.ring.publish();
            assert_eq!(b.ring.is_kick_needed(), nth == 0, "round {round}");
        }
        // The driver waits: it wants a call for the next used chain and for no other.
        for nth in 0..3 {
            let (head, _) = b.pop().unwrap();
            b.complete(head, 16);
            let call = b.device.needs_notification(&b.memory).unwrap();
            assert_eq!(call, nth == 0, "round {round}");
        }
        assert!(b.ring.enable_calls());
        assert_eq!(b.collected().len(), 3);
    }
    // Several chains that are published together cause one kick.
    b.device.enable_notification(&b.memory).unwrap();
    for _ in 0..5 {
        b.ring.add(&one, false, 0).unwrap();
    }
    b.ring.publish();
    assert!(b.ring.is_kick_needed());
    let used = b.device.used_idx(&b.memory, Ordering::Acquire).unwrap();
    assert_eq!(b.ring.base(), u32::from(used.0));
}

#[test]
fn virtqueue_after_reset_works_like_a_new_one() {
    let mut b = fixture(4, true, 9);
    b.ring.add(&chain(0, 3), false, 1).unwrap();
    b.ring.publish();
    b.ring.reset();
    assert_eq!((b.ring.free(), b.ring.in_flight()), (4, 0));
    assert_eq!(b.ring.base(), 0);
    assert_eq!(b.split().avail_index(), 0);
    assert_eq!(b.split().descriptor(0), SplitDescriptor::default());
}

#[test]
fn invalid_used_index_or_id_is_a_device_fault() {
    let one = [Buf::writable(0x1000, 16)];
    let fresh = || {
        let mut b = fixture(4, false, 65_534);
        for token in 0..3 {
            b.ring.add(&one, false, token).unwrap();
        }
        b.ring.publish();
        b
    };
    let mut ahead = fresh();
    ahead.split().set_used_index(2);
    let fault = ahead.ring.collect(|_, _| {}).unwrap_err();
    let want = DeviceFault::UsedIndex {
        from: 65_534,
        to: 2,
        in_flight: 3,
    };
    assert_eq!(fault, want);

    let mut back = fresh();
    back.split().set_used_index(65_533);
    assert!(back.ring.refresh().is_err());

    for id in [3, 4, 70_000] {
        let mut b = fresh();
        b.split().set_used_element(65_534, id, 0);
        b.split().set_used_index(65_535);
        let fault = b.ring.collect(|_, _| {}).unwrap_err();
        assert_eq!(fault, DeviceFault::UsedId(id));
    }

    let mut twice = fresh();
    twice.split().set_used_element(65_534, 1, 0);
    twice.split().set_used_element(65_535, 1, 0);
    twice.split().set_used_index(0);
    let fault = twice.ring.collect(|_, _| {}).unwrap_err();
    assert_eq!(fault, DeviceFault::UsedId(1));
}

#[test]
fn raw_writes_are_visible_to_the_device_and_not_to_the_driver() {
    let mut b = fixture(8, false, 0);
    let ring = b.split();
    ring.set_descriptor(3, SplitDescriptor::new(0x2000, 7, VRING_DESC_F_NEXT, 5));
    ring.set_descriptor(5, SplitDescriptor::new(0x3000, 9, VRING_DESC_F_WRITE, 0));
    ring.set_avail_entry(0, 3);
    ring.set_avail_index(1);
    assert_eq!(ring.descriptor(3).next, 5);
    let want = vec![(0x2000, 7, false), (0x3000, 9, true)];
    assert_eq!(b.pop(), Some((3, want)));
    assert_eq!(b.ring.in_flight(), 0, "the driver's own state is unchanged");
}

#[test]
fn size_that_the_split_format_does_not_allow_is_refused() {
    let ram = GuestRam::new(1 << 20).unwrap();
    for size in [0, 1, 3, 100, 32_769] {
        let config = DriverVirtqueueConfig::new(size, 0);
        assert!(matches!(
            DriverVirtqueue::new(&ram, config),
            Err(DriverVirtqueueError::Size(_))
        ));
    }
}
