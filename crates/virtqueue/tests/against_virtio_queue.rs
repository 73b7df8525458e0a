//! The split virtqueue compared with that of the virtio-queue crate: two guests do the same, one
//! with our device and one with the reference device, and everything that the guests can see must
//! be equal.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtionet_guest::driver::{Buf, DriverVirtqueue, DriverVirtqueueConfig};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::split::{SplitDriverVirtqueue, VRING_AVAIL_F_NO_INTERRUPT};
use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueConfig, VirtqueueLayout};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// The guest address of the buffers. Their initial content differs from byte to byte.
const BUFFERS: u64 = 0x18_0000;
const BUFFER_BYTES: usize = 0x1_0000;
const RAM: u64 = 0x20_0000;

/// The next step of a guest or its device.
#[derive(Debug, Clone)]
enum Op {
    /// Adds a chain of buffers of these lengths.
    Add { lens: Vec<u16>, indirect: bool },
    /// The guest publishes the added chains.
    Publish,
    /// The device dequeues up to this many chains.
    Dequeue(usize),
    /// The device completes up to this many chains and publishes them.
    Finish(usize),
    /// The device rewinds the chains that it has not completed.
    Rewind,
    /// The device enables or disables kicks.
    Kicks(bool),
    /// The guest enables or disables calls.
    Calls(bool),
    /// The guest writes `used_event` at this distance from the used index.
    UsedEvent(i16),
}

fn ops() -> impl Strategy<Value = Op> {
    let lens = prop::collection::vec(prop_oneof![1 => Just(0u16), 9 => 1u16..400], 1..8);
    prop_oneof![
        8 => (lens, any::<bool>()).prop_map(|(lens, indirect)| Op::Add { lens, indirect }),
        4 => Just(Op::Publish),
        4 => (0usize..70).prop_map(Op::Dequeue),
        4 => (0usize..70).prop_map(Op::Finish),
        1 => Just(Op::Rewind),
        1 => any::<bool>().prop_map(Op::Kicks),
        1 => any::<bool>().prop_map(Op::Calls),
        1 => (-3i16..40).prop_map(Op::UsedEvent),
    ]
}

/// How both virtqueues are made.
#[derive(Debug, Clone)]
struct Setup {
    size: u16,
    start: u16,
    event_idx: bool,
    direction: Direction,
}

fn setups() -> impl Strategy<Value = Setup> {
    let starts = prop_oneof![Just(0), 65_500u16.., any::<u16>()];
    (1u32..=15, starts, any::<bool>(), any::<bool>()).prop_map(|(log, start, event_idx, tx)| {
        Setup {
            size: 1 << log,
            start,
            event_idx,
            direction: match tx {
                true => Direction::Readable,
                false => Direction::Writable,
            },
        }
    })
}

/// A guest with its driver.
struct Guest {
    ram: GuestRam,
    ring: DriverVirtqueue,
}

impl Guest {
    fn new(setup: &Setup) -> Self {
        let ram = GuestRam::new(RAM).unwrap();
        let bytes: Vec<u8> = (0..BUFFER_BYTES)
            .map(|at| u8::try_from(at * at / 7 % 251).unwrap())
            .collect();
        ram.write(BUFFERS, &bytes).unwrap();
        let config = DriverVirtqueueConfig {
            size: setup.size,
            event_idx: setup.event_idx,
            packed: false,
            start: setup.start,
        };
        let ring = DriverVirtqueue::new(&ram, config).unwrap();
        Self { ram, ring }
    }

    fn split(&mut self) -> &mut SplitDriverVirtqueue {
        self.ring.as_split().unwrap()
    }

    fn buffers(&self) -> Vec<u8> {
        let mut bytes = vec![0; BUFFER_BYTES];
        self.ram.read(BUFFERS, &mut bytes).unwrap();
        bytes
    }

    /// Everything that the device wrote into the virtqueue.
    fn device_writes(&mut self) -> (u16, u16, u16, Vec<(u32, u32)>) {
        let ring = self.split();
        let elements = (0..ring.size()).map(|at| ring.used_element(at)).collect();
        (
            ring.used_index(),
            ring.used_flags(),
            ring.avail_event(),
            elements,
        )
    }
}

/// The device under test.
struct OurDevice {
    ring: Virtqueue,
    burst: Burst,
}

impl OurDevice {
    fn new(guest: &Guest, setup: &Setup) -> Self {
        let at = guest.ring.addresses();
        let user = |addr| guest.ram.user_addr(addr).unwrap();
        let memory = Arc::new(guest.ram.guest_memory().unwrap());
        let config = VirtqueueConfig {
            layout: VirtqueueLayout {
                size: setup.size,
                desc: user(at.descriptors),
                avail: user(at.driver),
                used: user(at.device),
            },
            base: setup.start.into(),
            direction: setup.direction,
            packed: false,
            event_idx: setup.event_idx,
            indirect: true,
            min_len: 0,
        };
        Self {
            ring: Virtqueue::new(config, &memory).unwrap(),
            burst: Burst::new(memory),
        }
    }

    /// Dequeues up to `most` chains. Returns the content of each.
    fn dequeue(&mut self, most: usize) -> Vec<Vec<u8>> {
        let before = self.burst.chains().len();
        let mut taken = 0;
        while taken < most {
            match self.ring.dequeue(&mut self.burst, most - taken).unwrap() {
                0 => break,
                n => taken += n,
            }
        }
        assert_eq!(self.burst.chains().len(), before + taken);
        let new = &self.burst.chains()[before..];
        new.iter().map(|chain| self.content(chain)).collect()
    }

    fn content(&self, chain: &virtionet_virtqueue::Chain) -> Vec<u8> {
        assert_eq!(chain.fault(), None);
        let mut bytes = Vec::new();
        for slice in self.burst.slices(chain) {
            let at = bytes.len();
            bytes.resize(at + slice.len(), 0);
            assert_eq!(slice.copy_to(&mut bytes[at..]), slice.len());
        }
        assert_eq!(bytes.len(), chain.len());
        bytes
    }

    /// Completes the first chain. The device fills it with `byte` if it is writable.
    fn finish(&mut self, byte: u8, writable: bool) {
        let chain = self.burst.chains()[0];
        if writable {
            for slice in self.burst.slices(&chain) {
                slice.copy_from(&vec![byte; slice.len()]);
            }
        }
        let len = u32::try_from(chain.len()).unwrap();
        self.ring.complete(&chain, len);
        self.burst.retire(1);
    }
}

/// The reference device. It keeps dequeued chains as (head, descriptors).
struct ReferenceDevice {
    queue: Queue,
    memory: GuestMemoryMmap,
    taken: VecDeque<(u16, Vec<(u64, u32)>)>,
}

impl ReferenceDevice {
    fn new(guest: &Guest, setup: &Setup) -> Self {
        let region = guest.ram.regions()[0];
        let file = FileOffset::new(guest.ram.file().try_clone().unwrap(), 0);
        let ranges = [(
            GuestAddress(region.guest_addr),
            usize::try_from(region.size).unwrap(),
            Some(file),
        )];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let mut queue = Queue::new(setup.size).unwrap();
        let at = guest.ring.addresses();
        let part = GuestAddress;
        queue
            .try_set_desc_table_address(part(at.descriptors))
            .unwrap();
        queue.try_set_avail_ring_address(part(at.driver)).unwrap();
        queue.try_set_used_ring_address(part(at.device)).unwrap();
        queue.set_event_idx(setup.event_idx);
        queue.set_next_avail(setup.start);
        queue.set_next_used(setup.start);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        Self {
            queue,
            memory,
            taken: VecDeque::new(),
        }
    }

    fn dequeue(&mut self, most: usize) -> Vec<Vec<u8>> {
        let mut contents = Vec::new();
        while contents.len() < most {
            let Some(chain) = self.queue.iter(&self.memory).unwrap().next() else {
                break;
            };
            let head = chain.head_index();
            let segments: Vec<_> = chain.map(|d| (d.addr().0, d.len())).collect();
            contents.push(self.content(&segments));
            self.taken.push_back((head, segments));
        }
        contents
    }

    fn content(&self, segments: &[(u64, u32)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(addr, len) in segments {
            let at = bytes.len();
            bytes.resize(at + usize::try_from(len).unwrap(), 0);
            let to = &mut bytes[at..];
            self.memory.read_slice(to, GuestAddress(addr)).unwrap();
        }
        bytes
    }

    fn finish(&mut self, byte: u8, writable: bool) {
        let (head, segments) = self.taken.pop_front().unwrap();
        if writable {
            for &(addr, len) in &segments {
                let data = vec![byte; usize::try_from(len).unwrap()];
                self.memory.write_slice(&data, GuestAddress(addr)).unwrap();
            }
        }
        let len = segments.iter().map(|segment| segment.1).sum();
        self.queue.add_used(&self.memory, head, len).unwrap();
    }

    fn rewind(&mut self) {
        let taken = u16::try_from(self.taken.len()).unwrap();
        let back = self.queue.next_avail().wrapping_sub(taken);
        self.queue.set_next_avail(back);
        self.taken.clear();
    }
}

/// Both guests and both devices.
struct DevicePair {
    setup: Setup,
    guests: [Guest; 2],
    ours: OurDevice,
    reference: ReferenceDevice,
    /// The offset of the next buffer.
    at: usize,
    /// The number of chains added, which is the next token.
    added: u64,
    /// The number of chains completed, which is the next fill byte.
    finished: u8,
}

impl DevicePair {
    fn new(setup: Setup) -> Self {
        let guests = [Guest::new(&setup), Guest::new(&setup)];
        Self {
            ours: OurDevice::new(&guests[0], &setup),
            reference: ReferenceDevice::new(&guests[1], &setup),
            guests,
            setup,
            at: 0,
            added: 0,
            finished: 0,
        }
    }

    fn writable(&self) -> bool {
        self.setup.direction == Direction::Writable
    }

    /// Does the same with both guests and checks that the results are equal.
    fn both<R: PartialEq + std::fmt::Debug>(&mut self, act: impl Fn(&mut Guest) -> R) -> R {
        let [ours, reference] = &mut self.guests;
        let (a, b) = (act(ours), act(reference));
        assert_eq!(a, b);
        a
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Add { lens, indirect } => self.add(lens, *indirect),
            Op::Publish => {
                self.both(|guest| guest.ring.publish());
                self.both(|guest| guest.ring.is_kick_needed());
            }
            Op::Dequeue(most) => {
                assert_eq!(self.ours.dequeue(*most), self.reference.dequeue(*most))
            }
            Op::Finish(most) => self.finish(*most),
            Op::Rewind => {
                self.ours.ring.rewind(&mut self.ours.burst);
                self.reference.rewind();
            }
            Op::Kicks(true) => {
                let memory = &self.reference.memory;
                let more = self.reference.queue.enable_notification(memory).unwrap();
                assert_eq!(self.ours.ring.enable_kicks(), more);
            }
            Op::Kicks(false) => {
                self.ours.ring.disable_kicks();
                let memory = &self.reference.memory;
                self.reference.queue.disable_notification(memory).unwrap();
            }
            Op::Calls(true) => {
                self.both(|guest| guest.ring.enable_calls());
            }
            Op::Calls(false) => self.both(|guest| guest.ring.disable_calls()),
            Op::UsedEvent(offset) => self.both(|guest| {
                let ring = guest.split();
                let event = ring.used_index().wrapping_add_signed(*offset);
                ring.set_used_event(event);
            }),
        }
        self.compare();
    }

    fn add(&mut self, lens: &[u16], indirect: bool) {
        let mut chain = Vec::new();
        for &len in lens {
            if self.at + usize::from(len) > BUFFER_BYTES {
                self.at = 0;
            }
            chain.push(Buf {
                addr: BUFFERS + u64::try_from(self.at).unwrap(),
                len: len.into(),
                writable: self.writable(),
            });
            self.at += usize::from(len);
        }
        let token = self.added;
        // A full virtqueue refuses the chain in both guests.
        let added = self.both(|guest| guest.ring.add(&chain, indirect, token).ok());
        self.added += u64::from(added.is_some());
    }

    fn finish(&mut self, most: usize) {
        let count = most.min(self.reference.taken.len());
        for _ in 0..count {
            let writable = self.writable();
            self.ours.finish(self.finished, writable);
            self.reference.finish(self.finished, writable);
            self.finished = self.finished.wrapping_add(1);
        }
        if count == 0 {
            assert!(!self.ours.ring.publish(), "a call without a used chain");
            return;
        }
        let called = self.ours.ring.publish();
        let memory = &self.reference.memory;
        let expected = self.reference.queue.needs_notification(memory).unwrap();
        match self.setup.event_idx {
            true => assert_eq!(called, expected),
            // virtio-queue ignores the flag.
            false => {
                let mut flags = [0; 2];
                let addr = self.guests[0].ring.addresses().driver;
                self.guests[0].ram.read(addr, &mut flags).unwrap();
                let wanted = u16::from_le_bytes(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
                assert_eq!(called, wanted);
            }
        }
        self.both(|guest| {
            let mut back = Vec::new();
            guest
                .ring
                .collect(|token, len| back.push((token, len)))
                .unwrap();
            back
        });
    }

    fn compare(&mut self) {
        if self.setup.size <= 256 {
            self.both(Guest::device_writes);
        } else {
            self.both(|guest| {
                let ring = guest.split();
                (ring.used_index(), ring.used_flags(), ring.avail_event())
            });
        }
        let next = self.reference.queue.next_avail();
        assert_eq!(self.ours.ring.base(), u32::from(next));
        let more = self.guests[0].split().avail_index() != next;
        assert_eq!(self.ours.ring.has_more(), more);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn device_and_reference_device_do_the_same(setup in setups(), ops in prop::collection::vec(ops(), 1..200)) {
        let mut devices = DevicePair::new(setup);
        for op in &ops {
            devices.step(op);
        }
        devices.both(Guest::device_writes);
        devices.both(|guest| guest.buffers());
    }
}

#[test]
fn split_virtqueue_of_every_size_works_across_the_wrap_of_its_index() {
    for log in 1..=15 {
        for event_idx in [false, true] {
            let size = 1u16 << log;
            let mut devices = DevicePair::new(Setup {
                size,
                start: 65_530,
                event_idx,
                direction: Direction::Writable,
            });
            for round in 0..40 {
                let lens = [10 + round, 7];
                let add = |indirect| Op::Add {
                    lens: lens.into(),
                    indirect,
                };
                let steps = [
                    add(false),
                    add(true),
                    Op::Publish,
                    Op::Dequeue(9),
                    Op::Finish(9),
                ];
                steps.iter().for_each(|op| devices.step(op));
            }
            assert!(devices.ours.ring.base() < 65_530, "the index has wrapped");
            devices.both(Guest::device_writes);
            devices.both(|guest| guest.buffers());
        }
    }
}

#[test]
fn full_split_virtqueue_is_used_completely_lap_after_lap() {
    for log in [1, 4, 10, 15] {
        let size = 1u16 << log;
        let mut devices = DevicePair::new(Setup {
            size,
            start: 65_000,
            event_idx: true,
            direction: Direction::Readable,
        });
        for _ in 0..2 {
            for _ in 0..size {
                devices.add(&[60], false);
            }
            let all = usize::from(size);
            devices.step(&Op::Publish);
            devices.step(&Op::Dequeue(all));
            assert_eq!(devices.ours.burst.chains().len(), all);
            devices.step(&Op::Finish(all));
        }
        devices.both(Guest::device_writes);
    }
}
