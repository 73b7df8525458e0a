//! A packed ring made of fuzzer's bytes: descriptors with any flags, in order or anywhere, tables,
//! and wrap counters that turn when they should not, between the turns of a TX or an RX queue.
//!
//! What must hold: no panic; every slice that an uplink is handed lies in guest memory; every frame
//! has passed its checks; a turn's work is bounded; and for as long as the driver keeps to the
//! rules, it sees each of its chains used, in order, with its buffer id, up to the base.
//!
//! Input: [`Setup`] (6 bytes), then operations, each an [`Op`] byte and its operands.

use std::collections::VecDeque;

use virtionet_virtio_net::{RxQueue, TxQueue};
use virtionet_guest::driver::DriverVirtqueueConfig;
use virtionet_guest::net::PACKED;
use virtionet_guest::packed::{VIRTQ_DESC_F_AVAIL, PackedDescriptor, PackedDriverVirtqueue, RingPosition, VIRTQ_DESC_F_USED};
use virtionet_guest::split::VRING_DESC_F_NEXT;

use crate::chains::{DeviceUnderTest, DescriptorFields, FuzzSetup, TABLE, Turn, fields, layout, ram};
use crate::input::Input;

/// An operation's first byte, modulo their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// A descriptor (see [`fields`]) at the next place, made available.
    Put,
    /// Index (1 byte), a descriptor, and the upper byte of its flags (1 byte).
    Descriptor,
    /// Place in the table (1 byte), then a descriptor.
    Table,
    /// The driver's wrap counter turns.
    Wrap,
    /// The driver's event suppression: off_wrap (2 bytes) and flags (1 byte).
    Event,
    /// See [`Device::feed`].
    Feed,
    /// A turn.
    Turn,
    /// See [`Device::poke`].
    WriteMemory,
    /// See [`Device::rewind`].
    Rewind,
    /// See [`Device::rebind`].
    Rebind,
    /// See [`Device::kicks`].
    Kicks,
    /// See [`Device::push`].
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

/// One input from start to end.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let setup = FuzzSetup::read(&mut input);
    match setup.is_rx() {
        true => ChainFuzzer::<RxQueue>::run(setup, input),
        false => ChainFuzzer::<TxQueue>::run(setup, input),
    }
}

/// A chain that was put and not seen used.
#[derive(Default)]
struct Chain {
    descriptors: u16,
    /// Of its last descriptor, which is what counts (virtio 1.3 §2.8.6).
    id: u16,
}

struct ChainFuzzer<Q> {
    driver: PackedDriverVirtqueue,
    device: DeviceUnderTest<Q>,
    /// The next descriptor to write.
    at: RingPosition,
    /// The first descriptor that was not seen used.
    next_used: RingPosition,
    chains: VecDeque<Chain>,
    /// The chain at hand.
    open: Chain,
    /// The driver has kept to the rules, and nobody else wrote to the ring.
    is_valid: bool,
}

impl<Q: Turn> ChainFuzzer<Q> {
    fn run(setup: FuzzSetup, mut input: Input<'_>) {
        let Some(mut bench) = Self::new(setup) else {
            return;
        };
        while !input.is_empty() {
            bench.step(&mut input);
        }
        bench.turn();
        bench.rewind();
    }

    /// `None` when the device refuses the ring.
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
                self.close();
                self.device.push(input);
            }
        }
    }

    /// Makes a descriptor available at the next place.
    fn put(&mut self, fields: &DescriptorFields) {
        // Where rules have been broken nothing is counted any more.
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

    /// Descriptors that are neither the device's nor used and unseen.
    fn free_descriptors(&mut self) -> u16 {
        self.collect_used();
        let taken = self.chains.iter().map(|chain| chain.descriptors);
        self.driver.size() - self.open.descriptors - taken.sum::<u16>()
    }

    /// A chain without its end must not be seen by the device.
    fn close(&mut self) {
        self.is_valid &= self.open.descriptors == 0;
    }

    fn turn(&mut self) {
        self.close();
        self.device.turn();
        self.collect_used();
    }

    /// Takes note of what the device has used.
    fn collect_used(&mut self) {
        if !self.is_valid {
            return;
        }
        while let Some(chain) = self.chains.front() {
            let found = self.driver.descriptor(self.next_used.index);
            if found.flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) != self.next_used.used() {
                break;
            }
            assert_eq!(found.id, chain.id, "another chain's id");
            self.next_used = self.next_used.after(chain.descriptors, self.driver.size());
            self.chains.pop_front();
        }
    }

    fn rewind(&mut self) {
        self.close();
        let told = self.device.rewind();
        self.collect_used();
        if self.is_valid {
            assert_eq!(told, base(self.next_used));
        }
    }
}

fn descriptor(fields: &DescriptorFields, flags: u16) -> PackedDescriptor {
    PackedDescriptor::new(fields.addr, fields.len, fields.next, flags)
}

fn base(position: RingPosition) -> u32 {
    u32::from(position.word()) | u32::from(position.word()) << 16
}
