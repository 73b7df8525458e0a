//! A hostile driver of a packed virtqueue. Between the turns of a TX or RX queue, it writes
//! descriptors with any flags at the next or at any position, writes tables, and inverts its wrap
//! counter.
//!
//! Invariants: there is no panic; every slice that the uplink gets lies in guest memory; every
//! frame has passed the checks; the work of a turn is bounded; and while the driver follows the
//! rules, it sees each of its chains used, in order, with its buffer id, up to the base.
//!
//! Input: [`FuzzSetup`] (6 bytes), then operations, each an [`Op`] byte and its operands.

use std::collections::VecDeque;

use virtionet_guest::driver::DriverVirtqueueConfig;
use virtionet_guest::net::PACKED;
use virtionet_guest::packed::{
    PackedDescriptor, PackedDriverVirtqueue, RingPosition, VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED,
};
use virtionet_guest::split::VRING_DESC_F_NEXT;
use virtionet_virtio_net::{RxQueue, TxQueue};

use crate::chains::{
    DescriptorFields, DeviceUnderTest, FuzzSetup, TABLE, Turn, fields, layout, ram,
};
use crate::input::Input;

/// The first byte of an operation, modulo their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// A descriptor (see [`fields`]) at the next position, made available.
    Put,
    /// Index (1 byte), a descriptor, and the upper byte of its flags (1 byte).
    Descriptor,
    /// Index in the table (1 byte), then a descriptor.
    Table,
    /// Inverts the driver's wrap counter.
    Wrap,
    /// The driver's event suppression area: `off_wrap` (2 bytes) and flags (1 byte).
    Event,
    /// See [`DeviceUnderTest::feed`].
    Feed,
    /// See [`DeviceUnderTest::turn`].
    Turn,
    /// See [`DeviceUnderTest::write_memory`].
    WriteMemory,
    /// See [`DeviceUnderTest::rewind`].
    Rewind,
    /// See [`DeviceUnderTest::rebind`].
    Rebind,
    /// See [`DeviceUnderTest::kicks`].
    Kicks,
    /// See [`DeviceUnderTest::push`].
    Push,
}

const OPS: [Op; 12] = [
    Op::Put,
    Op::Descriptor,
    Op::Table,
    Op::Wrap,
    Op::Event,
    Op::Feed,
    Op::Turn,
    Op::WriteMemory,
    Op::Rewind,
    Op::Rebind,
    Op::Kicks,
    Op::Push,
];

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let setup = FuzzSetup::read(&mut input);
    match setup.is_rx() {
        true => ChainFuzzer::<RxQueue>::run(setup, input),
        false => ChainFuzzer::<TxQueue>::run(setup, input),
    }
}

/// A chain that is available and not seen used.
#[derive(Default)]
struct Chain {
    /// Number of descriptors.
    descriptors: u16,
    /// The id of the last descriptor, which is that of the chain (virtio 1.3 §2.8.6).
    id: u16,
}

struct ChainFuzzer<Q> {
    driver: PackedDriverVirtqueue,
    device: DeviceUnderTest<Q>,
    /// The next descriptor to write.
    at: RingPosition,
    /// The first descriptor that is not seen used.
    next_used: RingPosition,
    /// Complete chains that are not seen used.
    chains: VecDeque<Chain>,
    /// The chain whose last descriptor is not written yet.
    open: Chain,
    /// Whether the driver has followed the rules and only driver and device wrote to the virtqueue.
    is_valid: bool,
}

impl<Q: Turn> ChainFuzzer<Q> {
    fn run(setup: FuzzSetup, mut input: Input<'_>) {
        let Some(mut fuzzer) = Self::new(setup) else {
            return;
        };
        while !input.is_empty() {
            fuzzer.step(&mut input);
        }
        fuzzer.turn();
        fuzzer.rewind();
    }

    /// `None` when the device refuses the virtqueue.
    fn new(setup: FuzzSetup) -> Option<Self> {
        let ram = ram();
        let size = u16::from(setup.size) + 1;
        let driver = DriverVirtqueueConfig {
            size,
            event_idx: setup.event_idx(),
            packed: true,
            start: setup.start,
        };
        let driver = PackedDriverVirtqueue::new(&ram, driver).unwrap();
        let at = RingPosition::nth(setup.start, size);
        let layout = layout(setup, &ram, driver.addresses(), size);
        let base = base(at).wrapping_add(setup.base_offset.into());
        Some(Self {
            device: DeviceUnderTest::new(setup, ram, layout, base, PACKED)?,
            driver,
            at,
            next_used: at,
            chains: VecDeque::new(),
            open: Chain::default(),
            is_valid: setup.is_consistent(),
        })
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let op = OPS[usize::from(input.u8()) % OPS.len()];
        match op {
            Op::Put => self.put(&fields(input)),
            Op::Descriptor => {
                let index = u16::from(input.u8()) % self.driver.size();
                let fields = fields(input);
                let flags = fields.flags | u16::from(input.u8()) << 8;
                self.driver
                    .set_descriptor(index, descriptor(&fields, flags));
                self.is_valid = false;
            }
            Op::Table => {
                let offset = 16 * usize::from(input.u8());
                let table = self.device.ram.area(TABLE, 16 * 256).unwrap();
                let fields = fields(input);
                self.is_valid &= fields.is_outside_ring;
                descriptor(&fields, fields.flags).store(&table, offset);
            }
            Op::Wrap => {
                self.at.wrap = !self.at.wrap;
                self.is_valid = false;
            }
            Op::Event => {
                let off_wrap = input.u16();
                self.driver.set_driver_event(off_wrap, input.u8().into());
            }
            Op::Feed => self.device.feed(input),
            Op::Turn => self.turn(),
            Op::WriteMemory => {
                self.device.write_memory(input);
                self.is_valid = false;
            }
            Op::Rewind => self.rewind(),
            Op::Rebind => self.device.rebind(),
            Op::Kicks => self.device.kicks(input),
            Op::Push => {
                self.check_chain_is_complete();
                self.device.push(input);
            }
        }
    }

    /// Makes a descriptor available at the next position.
    fn put(&mut self, fields: &DescriptorFields) {
        // After a violation, the chains are not tracked any more.
        self.is_valid = self.is_valid && fields.is_outside_ring && self.free_descriptors() > 0;
        let flags = fields.flags & !(VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) | self.at.available();
        let descriptor = descriptor(fields, flags);
        self.driver.set_descriptor(self.at.index, descriptor);
        self.at = self.at.after(1, self.driver.size());
        if self.is_valid {
            self.open.descriptors += 1;
            self.open.id = fields.next;
            if flags & VRING_DESC_F_NEXT == 0 {
                self.chains.push_back(std::mem::take(&mut self.open));
            }
        }
    }

    /// Number of descriptors that the driver may write.
    fn free_descriptors(&mut self) -> u16 {
        self.collect_used();
        let taken = self.chains.iter().map(|chain| chain.descriptors);
        self.driver.size() - self.open.descriptors - taken.sum::<u16>()
    }

    /// Marks the virtqueue as invalid if the device could see a chain without an end.
    fn check_chain_is_complete(&mut self) {
        self.is_valid &= self.open.descriptors == 0;
    }

    fn turn(&mut self) {
        self.check_chain_is_complete();
        self.device.turn();
        self.collect_used();
    }

    /// Removes the chains that the device has used, and checks their ids.
    fn collect_used(&mut self) {
        if !self.is_valid {
            return;
        }
        while let Some(chain) = self.chains.front() {
            let found = self.driver.descriptor(self.next_used.index);
            if found.flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) != self.next_used.used() {
                break;
            }
            assert_eq!(
                found.id, chain.id,
                "a used descriptor has the id of another chain"
            );
            self.next_used = self.next_used.after(chain.descriptors, self.driver.size());
            self.chains.pop_front();
        }
    }

    fn rewind(&mut self) {
        self.check_chain_is_complete();
        let base_of_device = self.device.rewind();
        self.collect_used();
        if self.is_valid {
            assert_eq!(base_of_device, base(self.next_used));
        }
    }
}

fn descriptor(fields: &DescriptorFields, flags: u16) -> PackedDescriptor {
    PackedDescriptor::new(fields.addr, fields.len, fields.next, flags)
}

/// The base of a device whose positions both are `position`.
fn base(position: RingPosition) -> u32 {
    u32::from(position.word()) | u32::from(position.word()) << 16
}
