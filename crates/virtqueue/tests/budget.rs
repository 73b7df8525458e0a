//! The work that a guest can cause in one call of [`Virtqueue::dequeue`] is bounded.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use virtionet_guest::driver::DriverVirtqueueConfig;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::split::{
    SplitDescriptor, SplitDriverVirtqueue, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
};
use virtionet_virtqueue::{
    Burst, ChainFault, Direction, MAX_CHAIN_SEGMENTS, Virtqueue, VirtqueueConfig, VirtqueueLayout,
};

const TABLE: u64 = 0x10_0000;
const DATA: u64 = 0x40_0000;
const RAM: u64 = 0x50_0000;
const SIZE: u16 = 1024;
/// The number of descriptors after which a call starts no further chain.
const DESCRIPTOR_LIMIT: usize = 4 * MAX_CHAIN_SEGMENTS;

struct Fixture {
    ram: GuestRam,
    driver: SplitDriverVirtqueue,
    ring: Virtqueue,
    burst: Burst,
}

impl Fixture {
    /// A split virtqueue whose heads are all available.
    fn full(indirect: bool) -> Self {
        let ram = GuestRam::new(RAM).unwrap();
        let driver = SplitDriverVirtqueue::new(&ram, DriverVirtqueueConfig::new(SIZE, 0)).unwrap();
        let at = driver.addresses();
        let user = |addr| ram.user_addr(addr).unwrap();
        let memory = Arc::new(ram.guest_memory().unwrap());
        let config = VirtqueueConfig {
            layout: VirtqueueLayout {
                size: SIZE,
                desc: user(at.descriptors),
                avail: user(at.driver),
                used: user(at.device),
            },
            base: 0,
            direction: Direction::Readable,
            packed: false,
            event_idx: false,
            indirect,
            min_len: 12,
        };
        for head in 0..SIZE {
            driver.set_avail_entry(head, head);
        }
        driver.set_avail_index(SIZE);
        Self {
            ring: Virtqueue::new(config, &memory).unwrap(),
            burst: Burst::new(memory),
            driver,
            ram,
        }
    }

    /// Writes the descriptor of each head.
    fn set_heads(&self, descriptor: impl Fn(u16) -> SplitDescriptor) {
        for head in 0..SIZE {
            self.driver.set_descriptor(head, descriptor(head));
        }
    }

    /// Writes a table at `TABLE` of `entries` linked descriptors of one byte each.
    fn set_table(&self, entries: u16) {
        let area = self.ram.area(TABLE, 16 * u64::from(entries)).unwrap();
        for at in 0..entries {
            let offset = 16 * usize::from(at);
            SplitDescriptor::new(DATA, 1, VRING_DESC_F_NEXT, at + 1).store(&area, offset);
        }
    }

    /// Dequeues all chains. Returns for each call the number of chains and of descriptors read.
    fn dequeue_all(&mut self) -> Vec<(usize, usize)> {
        let mut calls = Vec::new();
        loop {
            self.burst.clear();
            self.burst.reset_descriptors_read();
            match self.ring.dequeue(&mut self.burst, usize::MAX).unwrap() {
                0 => return calls,
                n => calls.push((n, self.burst.descriptors_read())),
            }
        }
    }

    /// The same, and checks that the first chain has `fault`.
    fn dequeue_all_with_fault(&mut self, fault: ChainFault) -> Vec<(usize, usize)> {
        assert_eq!(self.ring.dequeue(&mut self.burst, 1), Ok(1));
        assert_eq!(self.burst.chains()[0].fault(), Some(fault));
        self.ring.rewind(&mut self.burst);
        let calls = self.dequeue_all();
        let chains: usize = calls.iter().map(|call| call.0).sum();
        assert_eq!(chains, usize::from(SIZE));
        calls
    }
}

#[test]
fn dequeue_of_long_faulty_chains_returns_after_few_chains() {
    type Write = fn(&Fixture);
    let rows: [(&str, ChainFault, Write); 3] = [
        ("a loop of one descriptor", ChainFault::Loop, |fixture| {
            fixture.set_heads(|head| SplitDescriptor::new(DATA, 1, VRING_DESC_F_NEXT, head));
        }),
        (
            "a table of 65,535 entries that all heads share",
            ChainFault::TooLong,
            |fixture| {
                fixture.set_table(u16::MAX);
                fixture.set_heads(|_| {
                    SplitDescriptor::new(TABLE, 16 * 65_535, VRING_DESC_F_INDIRECT, 0)
                });
            },
        ),
        ("a loop in a table", ChainFault::Loop, |fixture| {
            fixture.set_table(1000);
            let area = fixture.ram.area(TABLE, 16_000).unwrap();
            SplitDescriptor::new(DATA, 1, VRING_DESC_F_NEXT, 0).store(&area, 16 * 999);
            fixture.set_heads(|_| SplitDescriptor::new(TABLE, 16_000, VRING_DESC_F_INDIRECT, 0));
        }),
    ];
    for (name, fault, write) in rows {
        let mut fixture = Fixture::full(true);
        write(&fixture);
        for (chains, work) in fixture.dequeue_all_with_fault(fault) {
            assert!(chains <= 5, "{name}: {chains} chains in one call");
            assert!(
                work <= DESCRIPTOR_LIMIT + MAX_CHAIN_SEGMENTS + 2,
                "{name}: {work}"
            );
            assert!(work >= 1000 * chains, "{name}: {work} for {chains}");
        }
    }
}

#[test]
fn dequeue_of_long_valid_chains_returns_after_few_chains_until_all_are_dequeued() {
    let mut fixture = Fixture::full(true);
    fixture.set_table(1000);
    let area = fixture.ram.area(TABLE, 16_000).unwrap();
    SplitDescriptor::new(DATA, 1, 0, 0).store(&area, 16 * 999);
    fixture.set_heads(|_| SplitDescriptor::new(TABLE, 16_000, VRING_DESC_F_INDIRECT, 0));
    let calls = fixture.dequeue_all();
    assert_eq!(calls.iter().map(|call| call.0).sum::<usize>(), 1024);
    assert!(calls.iter().all(|call| call.0 <= 5), "{calls:?}");
}

/// Reading the first descriptor of a chain is work, even if the chain is refused there.
#[test]
fn chain_refused_at_its_first_descriptor_counts_as_work() {
    let outer = |_| SplitDescriptor::new(TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    type Row = (ChainFault, bool, fn(u16) -> SplitDescriptor);
    let rows: [Row; 6] = [
        (ChainFault::IndirectNotNegotiated, false, outer),
        (ChainFault::IndirectNested, true, outer),
        (ChainFault::IndirectBadLength, true, |_| {
            SplitDescriptor::new(TABLE, 0, VRING_DESC_F_INDIRECT, 0)
        }),
        (ChainFault::IndirectUnmapped, true, |_| {
            SplitDescriptor::new(RAM, 16, VRING_DESC_F_INDIRECT, 0)
        }),
        (ChainFault::IndirectWithNext, true, |head| {
            SplitDescriptor::new(TABLE, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, head)
        }),
        (ChainFault::TooShort, true, |_| {
            SplitDescriptor::new(DATA, 0, 0, 0)
        }),
    ];
    for (fault, indirect, descriptor) in rows {
        let mut fixture = Fixture::full(indirect);
        let area = fixture.ram.area(TABLE, 16).unwrap();
        SplitDescriptor::new(TABLE, 16, VRING_DESC_F_INDIRECT, 0).store(&area, 0);
        fixture.set_heads(descriptor);
        for (chains, work) in fixture.dequeue_all_with_fault(fault) {
            assert!(work >= chains, "{fault:?}: {work} for {chains} chains");
        }
    }
}
