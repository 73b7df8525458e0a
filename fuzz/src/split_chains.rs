//! A hostile driver of a split virtqueue. Between the turns of a TX or RX queue, it writes any
//! descriptors, tables, indices and heads in any order.
//!
//! Invariants: there is no panic; every slice that the uplink gets lies in guest memory; every
//! frame has passed the checks; the work of a turn is bounded; and the base equals the used index
//! that the driver sees, unless the virtqueue is invalid.
//!
//! Input: [`FuzzSetup`] (6 bytes), then operations, each an [`Op`] byte and its operands.

use virtionet_guest::driver::DriverVirtqueueConfig;
use virtionet_guest::split::{SplitDescriptor, SplitDriverVirtqueue};
use virtionet_virtio_net::{RxQueue, TxQueue};

use crate::chains::{DeviceUnderTest, FuzzSetup, TABLE, Turn, fields, layout, ram};
use crate::input::Input;

/// The first byte of an operation, modulo their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Index (1 byte), then a descriptor: see [`fields`].
    Descriptor,
    /// Index in the table (1 byte), then a descriptor.
    Table,
    /// Head (2 bytes) for the next available entry, published at once.
    Offer,
    /// Index (1 byte) and head (2 bytes) of an available entry.
    AvailEntry,
    /// The available index (2 bytes).
    AvailIndex,
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
    /// `used_event` (2 bytes).
    UsedEvent,
    /// See [`DeviceUnderTest::push`].
    Push,
}

const OPS: [Op; 13] = [
    Op::Descriptor,
    Op::Table,
    Op::Offer,
    Op::AvailEntry,
    Op::AvailIndex,
    Op::Feed,
    Op::Turn,
    Op::WriteMemory,
    Op::Rewind,
    Op::Rebind,
    Op::Kicks,
    Op::UsedEvent,
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

struct ChainFuzzer<Q> {
    driver: SplitDriverVirtqueue,
    device: DeviceUnderTest<Q>,
    next: u16,
    /// Whether the areas do not overlap anything and only the device wrote the used ring.
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
        fuzzer.device.turn();
        fuzzer.rewind();
    }

    /// `None` when the device refuses the virtqueue.
    fn new(setup: FuzzSetup) -> Option<Self> {
        let ram = ram();
        let log = setup.size % 9;
        let driver = DriverVirtqueueConfig {
            size: (1u16 << log).max(2),
            event_idx: setup.event_idx(),
            packed: false,
            start: setup.start,
        };
        let driver = SplitDriverVirtqueue::new(&ram, driver).unwrap();
        let layout = layout(setup, &ram, driver.addresses(), 1 << log);
        let base = u32::from(setup.start.wrapping_add(setup.base_offset.into()));
        Some(Self {
            device: DeviceUnderTest::new(setup, ram, layout, base, 0)?,
            driver,
            next: setup.start,
            is_valid: setup.is_consistent() && log != 0,
        })
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let op = OPS[usize::from(input.u8()) % OPS.len()];
        match op {
            Op::Descriptor => {
                let index = u16::from(input.u8()) % self.driver.size();
                let descriptor = self.descriptor(input);
                self.driver.set_descriptor(index, descriptor);
            }
            Op::Table => {
                let offset = 16 * usize::from(input.u8());
                let table = self.device.ram.area(TABLE, 16 * 256).unwrap();
                self.descriptor(input).store(&table, offset);
            }
            Op::Offer => {
                self.driver.set_avail_entry(self.next, input.u16());
                self.next = self.next.wrapping_add(1);
                self.driver.set_avail_index(self.next);
            }
            Op::AvailEntry => {
                let at = u16::from(input.u8());
                self.driver.set_avail_entry(at, input.u16());
            }
            Op::AvailIndex => {
                self.next = input.u16();
                self.driver.set_avail_index(self.next);
            }
            Op::Feed => self.device.feed(input),
            Op::Turn => self.device.turn(),
            Op::WriteMemory => {
                self.device.write_memory(input);
                self.is_valid = false;
            }
            Op::Rewind => self.rewind(),
            Op::Rebind => self.device.rebind(),
            Op::Kicks => self.device.kicks(input),
            Op::UsedEvent => self.driver.set_used_event(input.u16()),
            Op::Push => self.device.push(input),
        }
    }

    fn rewind(&mut self) {
        let base = self.device.rewind();
        if self.is_valid {
            assert_eq!(base, u32::from(self.driver.used_index()));
        }
    }

    /// Reads a descriptor. Its buffer may overlap the virtqueue, so that the device may write to
    /// the virtqueue.
    fn descriptor(&mut self, input: &mut Input<'_>) -> SplitDescriptor {
        let fields = fields(input);
        self.is_valid &= fields.is_outside_ring;
        SplitDescriptor::new(fields.addr, fields.len, fields.flags, fields.next)
    }
}
