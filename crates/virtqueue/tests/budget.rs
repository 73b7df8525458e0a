//! What a guest can make one call of [`Ring::take`] do, whatever it wrote.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use virtionet_guest::driver::RingConfig as DriverConfig;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::split::{Descriptor, INDIRECT, NEXT, SplitRing};
use virtionet_virtqueue::{Burst, ChainFault, Direction, MAX_CHAIN, Ring, RingConfig, RingLayout};

const TABLE: u64 = 0x10_0000;
const DATA: u64 = 0x40_0000;
const RAM: u64 = 0x50_0000;
const SIZE: u16 = 1024;
/// Descriptors after which a call takes no further chain.
const ENOUGH: usize = 4 * MAX_CHAIN;

struct Bench {
    ram: GuestRam,
    driver: SplitRing,
    ring: Ring,
    burst: Burst,
}

impl Bench {
    /// A ring with all its heads available.
    fn full(indirect: bool) -> Self {
        let ram = GuestRam::new(RAM).unwrap();
        let driver = SplitRing::new(&ram, DriverConfig::new(SIZE, 0)).unwrap();
        let at = driver.addresses();
        let user = |addr| ram.user_addr(addr).unwrap();
        let memory = Arc::new(ram.guest_memory().unwrap());
        let config = RingConfig {
            layout: RingLayout {
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
            ring: Ring::new(config, &memory).unwrap(),
            burst: Burst::new(memory),
            driver,
            ram,
        }
    }

    fn heads(&self, descriptor: impl Fn(u16) -> Descriptor) {
        for head in 0..SIZE {
            self.driver.set_descriptor(head, descriptor(head));
        }
    }

    /// A table at `TABLE` of `entries` descriptors of one byte, one after the other.
    fn table(&self, entries: u16) {
        let area = self.ram.area(TABLE, 16 * u64::from(entries)).unwrap();
        for at in 0..entries {
            let offset = 16 * usize::from(at);
            Descriptor::new(DATA, 1, NEXT, at + 1).store(&area, offset);
        }
    }

    /// Takes all chains; what each call took and the work it made of it.
    fn calls(&mut self) -> Vec<(usize, usize)> {
        let mut calls = Vec::new();
        loop {
            self.burst.clear();
            self.burst.reset_work();
            match self.ring.take(&mut self.burst, usize::MAX).unwrap() {
                0 => return calls,
                n => calls.push((n, self.burst.work())),
            }
        }
    }

    fn all_end_as(&mut self, fault: ChainFault) -> Vec<(usize, usize)> {
        let mut again = self.ring.take(&mut self.burst, 1).unwrap();
        assert_eq!(self.burst.chains()[0].fault(), Some(fault));
        self.ring.untake(&mut self.burst);
        let calls = self.calls();
        again = calls.iter().map(|call| call.0).sum::<usize>() - again;
        assert_eq!(again, usize::from(SIZE) - 1);
        calls
    }
}

#[test]
fn long_chains_end_a_call_early() {
    type Write = fn(&Bench);
    let rows: [(&str, ChainFault, Write); 3] = [
        ("a loop", ChainFault::Loop, |bench| {
            bench.heads(|head| Descriptor::new(DATA, 1, NEXT, head));
        }),
        ("65,535 entries shared", ChainFault::TooLong, |bench| {
            bench.table(u16::MAX);
            bench.heads(|_| Descriptor::new(TABLE, 16 * 65_535, INDIRECT, 0));
        }),
        ("a table's loop", ChainFault::Loop, |bench| {
            bench.table(1000);
            let area = bench.ram.area(TABLE, 16_000).unwrap();
            Descriptor::new(DATA, 1, NEXT, 0).store(&area, 16 * 999);
            bench.heads(|_| Descriptor::new(TABLE, 16_000, INDIRECT, 0));
        }),
    ];
    for (name, fault, write) in rows {
        let mut bench = Bench::full(true);
        write(&bench);
        for (chains, work) in bench.all_end_as(fault) {
            assert!(chains <= 5, "{name}: {chains} chains at once");
            assert!(work <= ENOUGH + MAX_CHAIN + 2, "{name}: {work}");
            assert!(work >= 1000 * chains, "{name}: {work} for {chains}");
        }
    }
}

/// Good chains are bounded as well, and are all taken in the end.
#[test]
fn long_good_chains_end_a_call_early() {
    let mut bench = Bench::full(true);
    bench.table(1000);
    let area = bench.ram.area(TABLE, 16_000).unwrap();
    Descriptor::new(DATA, 1, 0, 0).store(&area, 16 * 999);
    bench.heads(|_| Descriptor::new(TABLE, 16_000, INDIRECT, 0));
    let calls = bench.calls();
    assert_eq!(calls.iter().map(|call| call.0).sum::<usize>(), 1024);
    assert!(calls.iter().all(|call| call.0 <= 5), "{calls:?}");
}

/// A chain that is refused at its first descriptor was read all the same.
#[test]
fn every_chain_is_work() {
    let outer = |_| Descriptor::new(TABLE, 16, INDIRECT, 0);
    type Row = (ChainFault, bool, fn(u16) -> Descriptor);
    let rows: [Row; 6] = [
        (ChainFault::IndirectNotNegotiated, false, outer),
        (ChainFault::IndirectNested, true, outer),
        (ChainFault::IndirectBadLength, true, |_| {
            Descriptor::new(TABLE, 0, INDIRECT, 0)
        }),
        (ChainFault::IndirectUnmapped, true, |_| {
            Descriptor::new(RAM, 16, INDIRECT, 0)
        }),
        (ChainFault::IndirectWithNext, true, |head| {
            Descriptor::new(TABLE, 16, INDIRECT | NEXT, head)
        }),
        (ChainFault::TooShort, true, |_| {
            Descriptor::new(DATA, 0, 0, 0)
        }),
    ];
    for (fault, indirect, descriptor) in rows {
        let mut bench = Bench::full(indirect);
        let area = bench.ram.area(TABLE, 16).unwrap();
        Descriptor::new(TABLE, 16, INDIRECT, 0).store(&area, 0);
        bench.heads(descriptor);
        for (chains, work) in bench.all_end_as(fault) {
            assert!(work >= chains, "{fault:?}: {work} for {chains} chains");
        }
    }
}
