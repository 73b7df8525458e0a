//! A device that is killed between any two of its stores, and one that continues after it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use virtionet_guest::driver::{Buf, DriverVirtqueue, DriverVirtqueueConfig};
use virtionet_guest::memory::GuestRam;

use super::*;
use crate::burst::Burst;
use crate::config::{Direction, VirtqueueConfig};
use crate::testing::{killed_after, memfd};
use crate::virtqueue::Virtqueue;

const RAM: u64 = 1 << 20;
const BUFFERS: u64 = 0x8_0000;

/// The numbers of descriptors of the chains that the driver makes available, turn by turn. With
/// rings of 5 and 8 descriptors, they begin at every place of the ring.
const TURNS: [&[u16]; 8] = [
    &[1, 2, 1],
    &[3],
    &[1, 1, 1, 1, 1],
    &[2, 2],
    &[],
    &[1],
    &[4, 1],
    &[1, 3, 1],
];

/// A driver, its memory, and the file of the record.
struct Guest {
    ram: GuestRam,
    driver: DriverVirtqueue,
    config: VirtqueueConfig,
    file: File,
    added: u64,
    /// By token: how often a device processed the chain.
    processed: Vec<u32>,
    /// The tokens and lengths that the driver has collected.
    collected: Vec<(u64, u32)>,
    /// How many chains were given back when a device was started.
    given_back: u32,
}

impl Guest {
    fn new(size: u16, start: u16, event_idx: bool) -> Self {
        let ram = GuestRam::new(RAM).unwrap();
        let driver = DriverVirtqueueConfig {
            size,
            event_idx,
            packed: true,
            start,
        };
        let driver = DriverVirtqueue::new(&ram, driver).unwrap();
        let at = driver.addresses();
        let user = |addr| ram.user_addr(addr).unwrap();
        let config = VirtqueueConfig {
            layout: VirtqueueLayout {
                size,
                desc: user(at.descriptors),
                avail: user(at.driver),
                used: user(at.device),
            },
            base: driver.base(),
            direction: Direction::Writable,
            packed: true,
            event_idx,
            indirect: true,
            min_len: 0,
        };
        Self {
            ram,
            driver,
            config,
            file: memfd(CrashRecord::bytes(size)),
            added: 0,
            processed: Vec::new(),
            collected: Vec::new(),
            given_back: 0,
        }
    }

    /// The guest's memory as a new process maps it.
    fn memory(&self) -> Arc<GuestMemory> {
        memory_in(&self.ram, self.ram.file().try_clone().unwrap())
    }

    fn record(&self, first_base: u32) -> CrashRecord {
        let file = self.file.try_clone().unwrap();
        CrashRecord::map(file, 0, self.config.layout.size, first_base).unwrap()
    }

    fn add(&mut self, descriptors: &[u16]) {
        for count in descriptors {
            let addr = BUFFERS + 64 * self.added;
            self.ram.write(addr, &self.added.to_le_bytes()).unwrap();
            let chain = vec![Buf::writable(addr, 64); usize::from(*count)];
            self.driver.add(&chain, false, self.added).unwrap();
            self.added += 1;
            self.processed.push(0);
        }
        self.driver.publish();
    }

    fn collect(&mut self) {
        let collected = &mut self.collected;
        self.driver
            .collect(|token, written| collected.push((token, written)))
            .unwrap();
    }

    /// What a device writes to the chain of this token.
    fn length(token: u64) -> u32 {
        u32::try_from(token).unwrap() % 60 + 1
    }

    fn check_all_collected(&self, case: &str) {
        let expected: Vec<_> = (0..self.added)
            .map(|token| (token, Self::length(token)))
            .collect();
        assert_eq!(self.collected, expected, "{case}");
    }
}

/// The memory `ram`, whose content is in `file`.
fn memory_in(ram: &GuestRam, file: File) -> Arc<GuestMemory> {
    // The guest crate uses this crate in a build of its own, whose types are others.
    let there = ram.regions()[0];
    let spec = RegionSpec {
        guest_addr: there.guest_addr,
        size: there.size,
        user_addr: there.user_addr,
        file_offset: there.file_offset,
    };
    let region = MappedRegion::map(spec, file).unwrap();
    Arc::new(GuestMemory::new(vec![Arc::new(region)]).unwrap())
}

/// A device, which processes chains in bursts of at most three.
struct Device {
    virtqueue: Virtqueue,
    burst: Burst,
}

impl Device {
    /// A device that the front-end starts with the base of the first start, as after a crash.
    fn start(guest: &Guest, memory: &Arc<GuestMemory>) -> Self {
        let mut virtqueue = Virtqueue::new(guest.config, memory)
            .unwrap()
            .with_record(guest.record(guest.config.base), memory);
        virtqueue.disable_kicks();
        let burst = Burst::new(Arc::clone(memory));
        Self { virtqueue, burst }
    }

    /// Processes all that is available.
    fn serve(&mut self, processed: &mut [u32]) {
        while self.virtqueue.dequeue(&mut self.burst, 3).unwrap() > 0 {
            let chains = self.burst.chains().to_vec();
            for chain in &chains {
                let mut token = [0; 8];
                self.burst.slices(chain)[0].copy_to(&mut token);
                let token = u64::from_le_bytes(token);
                processed[usize::try_from(token).unwrap()] += 1;
                self.virtqueue.complete(chain, Guest::length(token));
            }
            self.burst.clear();
            let _ = self.virtqueue.publish();
            let _ = self.virtqueue.enable_kicks();
            self.virtqueue.disable_kicks();
        }
    }
}

/// What the front-end does while it has no back-end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FrontEnd {
    /// It waits.
    Waits,
    /// It uses the chains that seem available at the base that it knows, without processing them.
    /// The next device starts behind them.
    UsesChains,
}

impl FrontEnd {
    fn take_its_chains(self, guest: &mut Guest, memory: &Arc<GuestMemory>) {
        if self == Self::Waits {
            return;
        }
        let mut virtqueue = Virtqueue::new(guest.config, memory).unwrap();
        let mut burst = Burst::new(Arc::clone(memory));
        while virtqueue.dequeue(&mut burst, 64).unwrap() > 0 {
            for chain in burst.chains().to_vec() {
                virtqueue.complete(&chain, 0);
            }
            burst.clear();
            let _ = virtqueue.publish();
        }
        guest.config.base = virtqueue.base();
    }
}

/// Lets a device serve the guest for all `turns`, and kills it before store `kill`, then the next one
/// before its store `second_kill`. Returns how often it was killed.
fn run(
    guest: &mut Guest,
    turns: &[&[u16]],
    front_end: FrontEnd,
    kill: u32,
    second_kill: Option<u32>,
) -> u32 {
    let memory = guest.memory();
    let mut kills = 0;
    let mut stores = Some(kill);
    let mut device = None;
    for turn in turns {
        guest.add(turn);
        loop {
            let mut processed = std::mem::take(&mut guest.processed);
            let mut given_back = 0;
            let limit = stores.unwrap_or(u32::MAX);
            let before = crate::testing::stores_made();
            let served = killed_after(limit, || {
                let device = device.get_or_insert_with(|| {
                    let device = Device::start(guest, &memory);
                    given_back = device.virtqueue.given_back_at_start();
                    device
                });
                device.serve(&mut processed);
            });
            guest.processed = processed;
            guest.given_back += u32::from(given_back);
            if served.is_some() {
                stores = stores.map(|left| left - (crate::testing::stores_made() - before));
                break;
            }
            kills += 1;
            device = None;
            front_end.take_its_chains(guest, &memory);
            stores = second_kill.filter(|_| kills == 1);
        }
        guest.collect();
    }
    kills
}

/// Calls `check` with a guest for each size, start and form of notification.
fn for_each_guest(mut check: impl FnMut(&dyn Fn() -> Guest, &str)) {
    for size in [5, 8] {
        for start in [0, 3, size + 4] {
            for event_idx in [false, true] {
                let case = format!("size {size}, start {start}, event_idx {event_idx}");
                check(&|| Guest::new(size, start, event_idx), &case);
            }
        }
    }
}

#[test]
fn driver_sees_each_chain_once_wherever_the_device_was_killed() {
    for_each_guest(|guest, case| {
        for kill in 0.. {
            let mut guest = guest();
            let case = format!("{case}, killed before store {kill}");
            let kills = run(&mut guest, &TURNS, FrontEnd::Waits, kill, None);
            guest.check_all_collected(&case);
            let repeated = guest.processed.iter().filter(|n| **n > 1).count();
            assert!(repeated <= 3, "{case}: {repeated} chains repeated");
            assert!(
                guest.processed.iter().all(|n| (1..=2).contains(n)),
                "{case}"
            );
            if kills == 0 {
                assert!(kill > 50, "{case}: the device makes few stores");
                break;
            }
        }
    });
}

#[test]
fn driver_sees_each_chain_once_if_the_next_device_is_killed_while_it_recovers() {
    for_each_guest(|guest, case| {
        for kill in 0.. {
            let mut kills = 0;
            for second in 0..12 {
                let mut guest = guest();
                kills = run(&mut guest, &TURNS, FrontEnd::Waits, kill, Some(second));
                guest.check_all_collected(&format!("{case}, killed at {kill} and {second}"));
            }
            if kills == 0 {
                break;
            }
        }
    });
}

/// Turns of chains of one descriptor each, which is what a driver with indirect descriptors adds. Of
/// other chains the front-end may take one that only seems available.
const SINGLE_TURNS: [&[u16]; 9] = [
    &[1, 1, 1],
    &[1],
    &[1, 1, 1, 1, 1],
    &[1, 1],
    &[1, 1, 1, 1],
    &[],
    &[1, 1, 1, 1, 1],
    &[1],
    &[1, 1, 1],
];

#[test]
fn driver_sees_each_chain_once_if_the_front_end_uses_chains_while_there_is_no_device() {
    let (mut unprocessed, mut given_back) = (0, 0);
    for_each_guest(|guest, case| {
        for kill in 0.. {
            let mut kills = 0;
            for second in (0..16).map(Some).chain([None]) {
                let mut guest = guest();
                let front_end = FrontEnd::UsesChains;
                kills = run(&mut guest, &SINGLE_TURNS, front_end, kill, second);
                let case = format!("{case}, killed at {kill} and {second:?}");
                let tokens: Vec<u64> = guest.collected.iter().map(|(token, _)| *token).collect();
                assert_eq!(tokens, (0..guest.added).collect::<Vec<_>>(), "{case}");
                for (token, length) in &guest.collected {
                    assert!([0, Guest::length(*token)].contains(length), "{case}");
                    unprocessed += u32::from(*length == 0);
                }
                given_back += guest.given_back;
            }
            if kills == 0 {
                break;
            }
        }
    });
    assert!(given_back > 100, "{given_back} chains were given back");
    assert!(
        unprocessed > 2 * given_back,
        "{unprocessed} chains were not processed, {given_back} of them given back"
    );
}

/// A guest whose device was killed after the first turns, with chains available.
fn guest_after_a_crash() -> Guest {
    let mut guest = Guest::new(8, 0, true);
    let memory = guest.memory();
    let mut device = Device::start(&guest, &memory);
    for turn in [TURNS[0], TURNS[1]] {
        guest.add(turn);
        device.serve(&mut guest.processed);
        guest.collect();
    }
    guest.add(&[1]);
    guest
}

fn start_position(guest: &Guest) -> Option<u32> {
    let memory = guest.memory();
    Device::start(guest, &memory).virtqueue.corrected_base()
}

#[test]
fn virtqueue_continues_at_its_record_and_only_its_own() {
    assert!(start_position(&guest_after_a_crash()).is_some());

    let mut other_base = guest_after_a_crash();
    other_base.config.base = 0x8001_8001;
    let expected = start_position(&guest_after_a_crash());
    assert_eq!(start_position(&other_base), expected, "another base");

    let mut other_size = guest_after_a_crash();
    other_size.config.layout.size = 4;
    assert_eq!(start_position(&other_size), None, "another size");

    let forgotten = guest_after_a_crash();
    forgotten.file.write_all_at(&CrashRecord::VOID, 0).unwrap();
    assert_eq!(start_position(&forgotten), None, "a void record");

    let moved = guest_after_a_crash();
    let mut bytes = vec![0; usize::try_from(RAM).unwrap()];
    moved.ram.file().read_exact_at(&mut bytes, 0).unwrap();
    let copy = memfd(RAM);
    copy.write_all_at(&bytes, 0).unwrap();
    let memory = memory_in(&moved.ram, copy);
    let device = Device::start(&moved, &memory);
    assert_eq!(device.virtqueue.corrected_base(), None, "other memory");
}

#[test]
fn virtqueue_that_its_driver_set_up_again_starts_at_its_base() {
    for event_idx in [false, true] {
        let mut guest = Guest::new(8, 0, event_idx);
        let memory = guest.memory();
        let mut device = Device::start(&guest, &memory);
        guest.add(TURNS[0]);
        device.serve(&mut guest.processed);
        guest.collect();
        guest.driver.reset();
        guest.config.base = guest.driver.base();
        assert_eq!(start_position(&guest), None, "event_idx {event_idx}");
    }
}

#[test]
fn damaged_record_leads_to_a_valid_position_or_to_none() {
    let bytes = usize::try_from(CrashRecord::bytes(8)).unwrap();
    for index in 0..bytes {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let guest = guest_after_a_crash();
            guest
                .file
                .write_all_at(&[value], u64::try_from(index).unwrap())
                .unwrap();
            let memory = guest.memory();
            let base = Device::start(&guest, &memory).virtqueue.base();
            assert!(
                base & 0x7fff < 8,
                "byte {index} is {value:#x}: base {base:#x}"
            );
        }
    }
}

#[test]
fn position_that_the_ring_contradicts_is_implausible() {
    let guest = guest_after_a_crash();
    let memory = guest.memory();
    let without_record = Virtqueue::new(guest.config, &memory).unwrap();
    assert!(without_record.is_base_implausible());
    let with_record = Device::start(&guest, &memory).virtqueue;
    assert!(!with_record.is_base_implausible());
    let fresh = Guest::new(8, 0, true);
    let virtqueue = Virtqueue::new(fresh.config, &fresh.memory()).unwrap();
    assert!(!virtqueue.is_base_implausible());
}

#[test]
fn rebound_virtqueue_keeps_its_record() {
    let mut guest = Guest::new(8, 0, true);
    let memory = guest.memory();
    let mut device = Device::start(&guest, &memory);
    guest.add(TURNS[0]);
    device.serve(&mut guest.processed);
    guest.collect();
    let memory = guest.memory();
    device.virtqueue = device.virtqueue.rebind(&memory).unwrap();
    device.burst = Burst::new(memory);
    guest.add(TURNS[1]);
    device.serve(&mut guest.processed);
    guest.collect();
    let base = device.virtqueue.base();
    drop(device);
    assert_eq!(start_position(&guest), Some(base));
}
