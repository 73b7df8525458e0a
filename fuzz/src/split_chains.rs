//! A split ring made of fuzzer's bytes: descriptors, tables, indices and heads of any kind, in any
//! order, between the turns of a TX or an RX queue.
//!
//! What must hold: no panic; every slice that an uplink is handed lies in guest memory; every frame
//! has passed its checks; a turn's work is bounded; and the base is what the driver saw used, as
//! long as no fault has ended the ring.
//!
//! Input: [`Setup`] (6 bytes), then operations, each an [`Op`] byte and its operands.

use std::sync::Arc;

use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring as ring;
use virtionet_device::features::Features;
use virtionet_device::port::MAX_BURST;
use virtionet_device::stats::RingStats;
use virtionet_device::{DeviceQueue, QueueConfig, RxQueue, TxQueue};
use virtionet_guest::driver::RingConfig;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::split::{Descriptor, SplitRing};
use virtionet_ring::{RingFault, RingLayout};

use crate::input::Input;
use crate::uplink::{Checker, Mapped};

/// Guest memory: two regions that touch, the second large enough for chains of 4 GiB, a hole, and a
/// third.
const LAYOUT: [(u64, u64); 3] = [(0, SEAM), (SEAM, HOLE - SEAM), (HOLE + 0x8000, 0x1000)];
/// Where the second region begins.
const SEAM: u64 = 0x4_0000;
/// Where it ends.
const HOLE: u64 = 0x80_0000;
/// Where buffers lie.
pub const DATA: u64 = 0x2_0000;
/// Where indirect tables lie; the first 256 of their descriptors can be written.
pub const TABLE: u64 = 0x1_0000;
/// Most frames for one turn of an RX queue.
const TURN: usize = 16;

/// An operation's first byte, modulo their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Index (1 byte), then a descriptor: see [`descriptor`].
    Descriptor,
    /// Place in the table (1 byte), then a descriptor.
    Table,
    /// Head (2 bytes) for the next available entry, shown at once.
    Offer,
    /// Place (1 byte) and head (2 bytes) of an available entry.
    AvailEntry,
    /// The available index (2 bytes).
    AvailIndex,
    /// A frame of so many bytes (2 bytes) waits.
    Feed,
    /// A turn.
    Turn,
    /// Address (2 bytes, times 4) and 8 bytes for it.
    Poke,
    /// Unused chains go back.
    Rewind,
    /// Another snapshot of memory.
    Rebind,
    /// Kicks wanted (1 byte: odd) or not.
    Kicks,
    /// used_event (2 bytes).
    UsedEvent,
}

const OPS: [Op; 12] = [
    Op::Descriptor,
    Op::Table,
    Op::Offer,
    Op::AvailEntry,
    Op::AvailIndex,
    Op::Feed,
    Op::Turn,
    Op::Poke,
    Op::Rewind,
    Op::Rebind,
    Op::Kicks,
    Op::UsedEvent,
];

/// What the first bytes say.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Bits: RX, EVENT_IDX, INDIRECT_DESC, MRG_RXBUF, offloads, VERSION_1.
    pub options: u8,
    /// Binary logarithm of the ring's size, modulo 9.
    pub log: u8,
    /// Where the indices begin.
    pub start: u16,
    /// Where the device finds the ring: 0 where it is; else areas over one another or outside.
    pub layout: u8,
    /// Added to the base that the device is told.
    pub skew: u8,
}

impl Setup {
    fn read(input: &mut Input<'_>) -> Self {
        Self {
            options: input.u8(),
            log: input.u8() % 9,
            start: input.u16(),
            layout: input.u8(),
            skew: input.u8(),
        }
    }

    fn features(self) -> Features {
        let offloads = 1 << net::VIRTIO_NET_F_CSUM
            | 1 << net::VIRTIO_NET_F_HOST_TSO4
            | 1 << net::VIRTIO_NET_F_HOST_ECN;
        let bits = [
            1 << ring::VIRTIO_RING_F_EVENT_IDX,
            1 << ring::VIRTIO_RING_F_INDIRECT_DESC,
            1 << net::VIRTIO_NET_F_MRG_RXBUF,
            offloads,
            1 << 32,
        ];
        let chosen = (1..).zip(bits).filter(|(n, _)| self.options >> n & 1 == 1);
        Features(chosen.fold(0, |all, (_, bits)| all | bits))
    }

    fn is_rx(self) -> bool {
        self.options & 1 == 1
    }
}

/// One input from start to end.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let setup = Setup::read(&mut input);
    match setup.is_rx() {
        true => Bench::<RxQueue>::run(setup, input),
        false => Bench::<TxQueue>::run(setup, input),
    }
}

/// A queue's turn.
trait Turn: DeviceQueue {
    fn turn(&mut self, uplink: &Checker) -> Result<(), RingFault>;
}

impl Turn for TxQueue {
    fn turn(&mut self, uplink: &Checker) -> Result<(), RingFault> {
        let sent = self.send(Some(uplink))?;
        assert!(sent.chains <= MAX_BURST);
        Ok(())
    }
}

impl Turn for RxQueue {
    fn turn(&mut self, uplink: &Checker) -> Result<(), RingFault> {
        let filled = self.fill(uplink, TURN, 1 << 20)?;
        assert!(filled.frames <= TURN);
        Ok(())
    }
}

struct Bench<Q> {
    ram: GuestRam,
    driver: SplitRing,
    uplink: Checker,
    device: Q,
    next: u16,
    /// The ring lies where nothing else does, and nobody but the device wrote to the used ring.
    sound: bool,
}

impl<Q: Turn> Bench<Q> {
    fn run(setup: Setup, mut input: Input<'_>) {
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
    fn new(setup: Setup) -> Option<Self> {
        let ram = GuestRam::with_layout(&LAYOUT).unwrap();
        let driver = RingConfig {
            size: (1u16 << setup.log).max(2),
            event_idx: setup.options >> 1 & 1 == 1,
            packed: false,
            start: setup.start,
        };
        let driver = SplitRing::new(&ram, driver).unwrap();
        let memory = Arc::new(ram.guest_memory().unwrap());
        let features = setup.features();
        let uplink = Checker::new(features, &memory);
        let device = Q::new(QueueConfig {
            layout: layout(setup, &ram, &driver),
            base: u32::from(setup.start.wrapping_add(setup.skew.into())),
            features,
            memory,
            stats: Arc::new(RingStats::default()),
        });
        Some(Self {
            device: device.ok()?,
            uplink,
            driver,
            ram,
            next: setup.start,
            sound: setup.layout == 0 && setup.skew == 0 && setup.log != 0,
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
                let table = self.ram.area(TABLE, 16 * 256).unwrap();
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
            Op::Feed => {
                let len = self.uplink.features.header_len() + usize::from(input.u16());
                self.uplink.waiting.lock().unwrap().push_back(len);
            }
            Op::Turn => self.turn(),
            Op::Poke => {
                // Into the ring as well, so nothing can be said of the used index any more.
                let addr = 4 * u64::from(input.u16());
                self.ram.write(addr, &input.array::<8>()).unwrap();
                self.sound = false;
            }
            Op::Rewind => self.rewind(),
            Op::Rebind => {
                let memory = Arc::new(self.ram.guest_memory().unwrap());
                self.device.rebind(&memory).unwrap();
                *self.uplink.mapped.lock().unwrap() = Mapped::new(&memory);
            }
            Op::Kicks if input.u8() & 1 == 1 => {
                let _more = self.device.enable_kicks();
            }
            Op::Kicks => self.device.disable_kicks(),
            Op::UsedEvent => self.driver.set_used_event(input.u16()),
        }
    }

    /// A fault ends a turn; what the guest does afterwards must do no harm either.
    fn turn(&mut self) {
        let _fault = self.device.turn(&self.uplink);
    }

    fn rewind(&mut self) {
        let base = self.device.rewind();
        if self.sound {
            assert_eq!(base, u32::from(self.driver.used_index()));
        }
    }

    /// Writes of the device may go to the ring itself where the guest asks for that.
    fn descriptor(&mut self, input: &mut Input<'_>) -> Descriptor {
        let (descriptor, apart) = descriptor(input);
        self.sound &= apart;
        descriptor
    }
}

/// A descriptor of 7 bytes: where its address lies (1: kind, 2: offset), its length (2: below
/// 0x8000 as it is, else in 128 KiB), flags (1) and next (1). Also, whether it is known to lie apart
/// from the ring.
fn descriptor(input: &mut Input<'_>) -> (Descriptor, bool) {
    let kind = input.u8();
    let offset = u64::from(input.u16());
    let addr = match kind % 8 {
        0..=2 => DATA + offset,
        3 => TABLE + offset,
        // The ring itself.
        4 => 0x1000 + offset % 0x2000,
        // Around the seam of two regions, and the hole behind them.
        5 => SEAM - 0x8000 + offset,
        6 => HOLE - 0x8000 + offset,
        _ => input.u64(),
    };
    let len = match input.u16() {
        n if n < 0x8000 => u32::from(n),
        n => u32::from(n & 0x7fff) << 17 | 0x1_ffff,
    };
    let flags = u16::from(input.u8());
    let next = match input.u8() {
        0xff => u16::MAX,
        n => u16::from(n),
    };
    let apart = !matches!(kind % 8, 4 | 7);
    (Descriptor::new(addr, len, flags, next), apart)
}

/// Where the device is told that the ring lies.
fn layout(setup: Setup, ram: &GuestRam, driver: &SplitRing) -> RingLayout {
    let at = driver.addresses();
    let user = |addr| ram.user_addr(addr).unwrap();
    let good = RingLayout {
        size: 1 << setup.log,
        desc: user(at.descriptors),
        avail: user(at.driver),
        used: user(at.device),
    };
    match setup.layout % 8 {
        0 => good,
        1 => RingLayout {
            used: good.desc,
            ..good
        },
        2 => RingLayout {
            avail: good.used,
            ..good
        },
        3 => RingLayout {
            used: good.avail & !3,
            ..good
        },
        4 => RingLayout {
            desc: good.desc + 8,
            ..good
        },
        5 => RingLayout {
            used: user(0x3_fff0),
            ..good
        },
        6 => RingLayout {
            avail: u64::MAX - 1,
            ..good
        },
        _ => RingLayout { size: 3, ..good },
    }
}
