//! Packed virtqueues of hostile drivers, which write descriptors with the raw access of the guest
//! crate.
#![allow(clippy::unwrap_used)]

mod common;

use common::{DATA, Guest, RAM, Setup};
use virtionet_guest::packed::{
    PackedDescriptor, PackedDriverVirtqueue, RingPosition, VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};
use virtionet_guest::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtionet_virtqueue::{
    Burst, ChainFault, Direction, MAX_CHAIN_SEGMENTS, Virtqueue, VirtqueueConfig, VirtqueueError,
    VirtqueueFault,
};

const TABLE: u64 = 0x10_0000;

struct Fixture {
    guest: Guest,
    ring: Virtqueue,
    burst: Burst,
    /// The position of the next descriptor to write.
    at: RingPosition,
}

impl Fixture {
    fn new(size: u16) -> Self {
        Self::with_start(size, 0, true)
    }

    fn with_start(size: u16, start: u16, event_idx: bool) -> Self {
        let guest = Guest::new(Setup {
            size,
            packed: true,
            event_idx,
            start,
            direction: Direction::Readable,
        });
        let (ring, burst) = guest.device(guest.ring.base());
        Self {
            guest,
            ring,
            burst,
            at: RingPosition::nth(start, size),
        }
    }

    fn packed(&mut self) -> &mut PackedDriverVirtqueue {
        self.guest.ring.as_packed().unwrap()
    }

    /// Writes an available descriptor at the next position.
    fn put(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let at = self.at;
        self.at = at.after(1, self.ring.size());
        let flags = flags | at.available();
        let descriptor = PackedDescriptor::new(addr, len, id, flags);
        self.packed().set_descriptor(at.index, descriptor);
    }

    fn dequeue(&mut self) -> Result<usize, VirtqueueFault> {
        self.ring.dequeue(&mut self.burst, usize::MAX)
    }

    /// Completes and publishes all dequeued chains. Returns whether the driver wants a call.
    fn finish(&mut self) -> bool {
        for chain in self.burst.chains() {
            self.ring.complete(chain, 0);
        }
        self.burst.clear();
        self.ring.publish()
    }

    /// The id of the used descriptor at `position`; `None` when it is not used.
    fn used(&mut self, position: RingPosition) -> Option<u16> {
        let found = self.packed().descriptor(position.index);
        (found.flags == position.used()).then_some(found.id)
    }
}

/// A driver that rewrites the flags of dequeued descriptors does not make them available again.
#[test]
fn dequeued_descriptors_with_rewritten_flags_are_not_dequeued_again() {
    for size in [1, 2, 3, 8, 100] {
        let mut fixture = Fixture::new(size);
        for id in 0..size {
            fixture.put(DATA, 10, id, 0);
        }
        let mut taken = 0;
        while taken < size {
            taken += u16::try_from(fixture.dequeue().unwrap()).unwrap();
        }
        let base = fixture.ring.base();
        // The flags say that all are available once more, in the next lap.
        for id in 0..size {
            fixture.put(DATA, 10, id, VRING_DESC_F_NEXT);
        }
        assert_eq!(fixture.dequeue(), Ok(0));
        assert!(!fixture.ring.has_more());
        assert!(!fixture.ring.enable_kicks());
        assert_eq!(fixture.ring.base(), base);
        fixture.ring.rewind(&mut fixture.burst);
        assert_eq!(fixture.ring.base(), 0x8000_8000);
        assert!(
            !fixture.ring.has_more(),
            "the driver has overwritten the flags"
        );
    }
}

#[test]
fn chain_that_continues_into_dequeued_descriptors_is_a_fault() {
    let mut fixture = Fixture::new(8);
    for id in 0..3 {
        fixture.put(DATA, 10, id, 0);
    }
    assert_eq!(fixture.dequeue(), Ok(3));
    for id in 3..8 {
        fixture.put(DATA, 10, id, VRING_DESC_F_NEXT);
    }
    let want = Err(VirtqueueFault::ChainWithoutEnd { size: 8 });
    assert_eq!((fixture.dequeue(), fixture.dequeue()), (want, want));
    assert_eq!(
        fixture.burst.chains().len(),
        3,
        "the dequeued chains stay valid"
    );
    fixture.finish();
    assert_eq!(fixture.ring.base(), 0x8003_8003);
    for index in 0..3 {
        let position = RingPosition { index, wrap: true };
        assert_eq!(fixture.used(position), Some(index));
    }
}

#[test]
fn chain_through_the_whole_ring_is_a_fault() {
    for size in [1, 2, 7, 256, 32_768] {
        for start in [0, size - 1, size, size + size / 2] {
            let mut fixture = Fixture::with_start(size, start, false);
            for id in 0..size {
                fixture.put(DATA, 1, id, VRING_DESC_F_NEXT);
            }
            let want = Err(VirtqueueFault::ChainWithoutEnd { size });
            let base = fixture.ring.base();
            assert_eq!((fixture.dequeue(), fixture.dequeue()), (want, want));
            assert!(fixture.burst.chains().is_empty());
            assert_eq!(fixture.ring.base(), base);
        }
    }
}

#[test]
fn valid_chains_in_front_of_a_fault_are_dequeued_first() {
    let mut fixture = Fixture::new(8);
    fixture.put(DATA, 10, 5, 0);
    for id in 0..7 {
        fixture.put(DATA, 10, id, VRING_DESC_F_NEXT);
    }
    assert_eq!(fixture.dequeue(), Ok(1));
    assert_eq!(fixture.burst.chains()[0].len(), 10);
    assert_eq!(fixture.burst.slices(&fixture.burst.chains()[0]).len(), 1);
    fixture.finish();
    // The same holds behind used descriptors.
    fixture.put(DATA, 10, 7, VRING_DESC_F_NEXT);
    assert!(fixture.dequeue().is_err());
    assert_eq!(fixture.ring.base(), 0x8001_8001);
}

#[test]
fn chain_as_long_as_the_ring_is_valid() {
    for size in [1, 3, 256, 1024] {
        let mut fixture = Fixture::with_start(size, size / 2, true);
        for round in 0..5 {
            let first = fixture.at;
            for _ in 1..size {
                fixture.put(DATA, 2, 77, VRING_DESC_F_NEXT);
            }
            fixture.put(DATA, 2, round, 0);
            assert_eq!(fixture.dequeue(), Ok(1));
            let chain = fixture.burst.chains()[0];
            assert_eq!(chain.fault(), None);
            assert_eq!(chain.len(), 2 * usize::from(size));
            fixture.finish();
            // The id is that of the chain's last descriptor (virtio 1.3 §2.8.6).
            assert_eq!(fixture.used(first), Some(round));
            assert_eq!(fixture.dequeue(), Ok(0));
        }
    }
}

/// Writes a chain to the virtqueue.
type WriteChain = fn(&mut Fixture);

/// A chain for each fault, and the number of its descriptors in the ring.
const FAULTY_CHAINS: &[(ChainFault, u16, WriteChain)] = &[
    (ChainFault::AddressInvalid, 3, |fixture| {
        fixture.put(DATA, 10, 1, VRING_DESC_F_NEXT);
        fixture.put(RAM, 10, 1, VRING_DESC_F_NEXT);
        fixture.put(DATA, 10, 1, 0);
    }),
    (ChainFault::DirectionWrong, 2, |fixture| {
        fixture.put(DATA, 10, 1, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE);
        fixture.put(DATA, 10, 1, 0);
    }),
    (ChainFault::IndirectWithNext, 2, |fixture| {
        fixture.put(TABLE, 16, 1, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT);
        fixture.put(DATA, 10, 1, 0);
    }),
    (ChainFault::IndirectBadLength, 1, |fixture| {
        fixture.put(TABLE, 8, 1, VRING_DESC_F_INDIRECT);
    }),
    (ChainFault::IndirectUnmapped, 1, |fixture| {
        fixture.put(RAM - 16, 32, 1, VRING_DESC_F_INDIRECT);
    }),
    (ChainFault::IndirectNested, 2, |fixture| {
        let area = fixture.guest.ram.area(TABLE, 16).unwrap();
        PackedDescriptor::new(TABLE, 16, 0, VRING_DESC_F_INDIRECT).store(&area, 0);
        fixture.put(DATA, 10, 1, VRING_DESC_F_NEXT);
        fixture.put(TABLE, 16, 1, VRING_DESC_F_INDIRECT);
    }),
    (ChainFault::TooLong, 1500, |fixture| {
        for _ in 1..1500 {
            fixture.put(DATA, 1, 1, VRING_DESC_F_NEXT);
        }
        fixture.put(DATA, 1, 1, 0);
    }),
    (ChainFault::TooBig, 1024, |fixture| {
        for _ in 1..1024 {
            fixture.put(DATA, 0x40_0000, 1, VRING_DESC_F_NEXT);
        }
        fixture.put(DATA, 0x40_0000, 1, 0);
    }),
];

/// The flags of a faulty chain still say where the next chain begins.
#[test]
fn faulty_chain_leaves_its_neighbours_valid() {
    for &(fault, slots, write) in FAULTY_CHAINS {
        // Also across the end of the ring.
        for start in [0, 2046, 2047 + 2048] {
            let mut fixture = Fixture::with_start(2048, start, true);
            let positions =
                [start, start + 1, start + 1 + slots].map(|n| RingPosition::nth(n, 2048));
            fixture.put(DATA, 10, 7, 0);
            write(&mut fixture);
            fixture.put(DATA, 10, 8, 0);
            let mut taken = 0;
            while taken < 3 {
                taken += fixture.dequeue().unwrap();
            }
            let faults: Vec<_> = fixture.burst.chains().iter().map(|c| c.fault()).collect();
            assert_eq!(faults, [None, Some(fault), None]);
            let segments = fixture.burst.front_slices(3);
            assert!(segments.iter().all(|segment| segment.len() == 10));
            assert_eq!(
                segments.len(),
                2,
                "{fault:?}: a faulty chain has no segments"
            );
            fixture.finish();
            let ids = positions.map(|position| fixture.used(position));
            assert_eq!(ids, [Some(7), Some(1), Some(8)], "{fault:?}");
        }
    }
}

/// VIRTQ_DESC_F_NEXT and the id have no meaning in an indirect table (virtio 1.3 §2.8.7).
#[test]
fn indirect_table_with_any_next_flags_is_read_to_its_end() {
    let mut fixture = Fixture::new(4);
    let area = fixture.guest.ram.area(TABLE, 64).unwrap();
    let flags = [0, VRING_DESC_F_NEXT, 0x8080, 0];
    for (n, flags) in (0..4u16).zip(flags) {
        PackedDescriptor::new(DATA, 5, u16::MAX, flags).store(&area, 16 * usize::from(n));
    }
    fixture.put(TABLE, 64, 3, VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE);
    assert_eq!(fixture.dequeue(), Ok(1));
    let chain = fixture.burst.chains()[0];
    assert_eq!((chain.fault(), chain.len()), (None, 20));
    fixture.finish();
    let first = RingPosition::nth(0, 4);
    assert_eq!(fixture.used(first), Some(3));
}

#[test]
fn dequeue_of_long_tables_returns_after_few_chains() {
    let mut fixture = Fixture::new(1000);
    let entries = u16::MAX;
    let area = fixture
        .guest
        .ram
        .area(TABLE, 16 * u64::from(entries))
        .unwrap();
    for at in 0..usize::from(entries) {
        PackedDescriptor::new(DATA, 1, 0, 0).store(&area, 16 * at);
    }
    for id in 0..1000 {
        fixture.put(TABLE, 16 * u32::from(entries), id, VRING_DESC_F_INDIRECT);
    }
    let mut all = 0;
    while all < 1000 {
        fixture.burst.reset_descriptors_read();
        let taken = fixture.dequeue().unwrap();
        assert!((1..=5).contains(&taken), "{taken} in one call");
        assert!(fixture.burst.descriptors_read() <= 5 * (MAX_CHAIN_SEGMENTS + 1));
        let faults = fixture.burst.chains().iter().map(|chain| chain.fault());
        assert!(
            faults
                .into_iter()
                .all(|fault| fault == Some(ChainFault::TooLong))
        );
        fixture.finish();
        all += taken;
    }
}

#[test]
fn call_is_sent_when_the_drivers_event_area_asks_for_it() {
    // Each row: `off_wrap` and flags of the driver's event area, and whether using descriptor 5 of
    // 8 causes a call.
    for (off_wrap, flags, called) in [
        (0, VRING_PACKED_EVENT_FLAG_ENABLE, true),
        (0x8005, VRING_PACKED_EVENT_FLAG_DISABLE, false),
        (0x8005, VRING_PACKED_EVENT_FLAG_DESC, true),
        (0x8004, VRING_PACKED_EVENT_FLAG_DESC, false),
        (0x8006, VRING_PACKED_EVENT_FLAG_DESC, false),
        (0x0005, VRING_PACKED_EVENT_FLAG_DESC, false),
        (0x7fff, VRING_PACKED_EVENT_FLAG_DESC, false),
        (0xffff, VRING_PACKED_EVENT_FLAG_DESC, false),
        // A reserved value, and reserved bits.
        (0x8004, 3, true),
        (0x8005, VRING_PACKED_EVENT_FLAG_DISABLE | 0xfffc, false),
    ] {
        let mut fixture = Fixture::with_start(8, 5, true);
        fixture.packed().set_driver_event(off_wrap, flags);
        fixture.put(DATA, 10, 0, 0);
        fixture.dequeue().unwrap();
        assert_eq!(fixture.finish(), called, "{off_wrap:#x} {flags:#x}");
    }
    // Without VIRTIO_F_EVENT_IDX the driver cannot ask for a call at a descriptor.
    let mut fixture = Fixture::with_start(8, 5, false);
    fixture
        .packed()
        .set_driver_event(0x8004, VRING_PACKED_EVENT_FLAG_DESC);
    fixture.put(DATA, 10, 0, 0);
    fixture.dequeue().unwrap();
    assert!(fixture.finish());
}

#[test]
fn enabled_kicks_name_the_position_of_the_next_chain() {
    for (event_idx, start, want) in [
        (true, 0, (0x8000, VRING_PACKED_EVENT_FLAG_DESC)),
        (true, 6, (0x8006, VRING_PACKED_EVENT_FLAG_DESC)),
        (true, 7, (0, VRING_PACKED_EVENT_FLAG_DESC)),
        (true, 10, (3, VRING_PACKED_EVENT_FLAG_DESC)),
        (false, 3, (0, VRING_PACKED_EVENT_FLAG_ENABLE)),
    ] {
        let mut fixture = Fixture::with_start(7, start, event_idx);
        fixture.ring.disable_kicks();
        assert_eq!(
            fixture.packed().device_event().1,
            VRING_PACKED_EVENT_FLAG_DISABLE
        );
        assert!(!fixture.ring.enable_kicks());
        assert_eq!(fixture.packed().device_event(), want);
    }
}

#[test]
fn layout_that_is_not_a_packed_virtqueue_is_refused() {
    let guest = Fixture::new(8).guest;
    let memory = guest.memory();
    let new = |config| Virtqueue::new(config, &memory).map(|ring| ring.base());
    let with = |change: fn(&mut VirtqueueConfig)| {
        let mut config = guest.config;
        change(&mut config);
        config
    };
    for (base, want) in [
        (0x8007, 0x8007_8007),
        (7, 0x0007_0007),
        (0x1234_0003, 0x0003_0003),
    ] {
        let config = VirtqueueConfig {
            base,
            ..guest.config
        };
        assert_eq!(
            new(config),
            Ok(want),
            "the used half of the base equals the available half"
        );
    }
    assert_eq!(new(with(|c| c.base = 8)), Err(VirtqueueError::Base(8)));
    assert_eq!(
        new(with(|c| c.base = 0xffff)),
        Err(VirtqueueError::Base(0xffff))
    );
    assert_eq!(
        new(with(|c| c.layout.size = 0)),
        Err(VirtqueueError::Size(0))
    );
    let huge = with(|c| c.layout.size = 32_769);
    assert_eq!(new(huge), Err(VirtqueueError::Size(32_769)));
    for wrong in [
        with(|c| c.layout.desc += 4),
        with(|c| c.layout.avail += 1),
        with(|c| c.layout.used += 1),
        with(|c| c.layout.desc = 0),
        with(|c| c.layout.avail = u64::MAX - 1),
        with(|c| c.layout.size = 32_768),
    ] {
        let mut wrong = wrong;
        if wrong.layout.size == 32_768 {
            // The ring ends behind the end of memory.
            wrong.layout.desc = guest.ram.user_addr(RAM - 0x1000).unwrap();
        }
        assert!(
            matches!(new(wrong), Err(VirtqueueError::Unmapped { .. })),
            "{wrong:?}"
        );
    }
}
