//! The common parts of the targets for chains of both formats: guest memory, the device side, and
//! the encoding of a descriptor in an input.

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring as ring;
use virtionet_guest::driver::VirtqueueAddresses;
use virtionet_guest::memory::GuestRam;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{MAX_BURST, TxFrame};
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue, TxQueue};
use virtionet_virtqueue::memory::GuestSlice;
use virtionet_virtqueue::{VirtqueueFault, VirtqueueLayout};

use crate::input::Input;
use crate::uplink::{CheckingUplink, Mapped};

/// Guest memory: two adjacent regions, of which the second is large enough for chains of 4 GiB, a
/// hole, and a third region.
const LAYOUT: [(u64, u64); 3] = [
    (0, REGION_BOUNDARY),
    (REGION_BOUNDARY, GAP_START - REGION_BOUNDARY),
    (GAP_START + 0x8000, 0x1000),
];
/// Start of the second region.
const REGION_BOUNDARY: u64 = 0x4_0000;
/// End of the second region.
const GAP_START: u64 = 0x80_0000;
/// Guest address of buffers.
pub const DATA: u64 = 0x2_0000;
/// Guest address of indirect tables. Inputs can write the first 256 descriptors.
pub const TABLE: u64 = 0x1_0000;
/// The largest number of frames that an RX queue receives in one turn.
const MAX_FRAMES_PER_CALL: usize = 16;

/// The first bytes of an input.
#[derive(Debug, Clone, Copy)]
pub struct FuzzSetup {
    /// Bits: RX, EVENT_IDX, INDIRECT_DESC, MRG_RXBUF, offloads, VERSION_1.
    pub options: u8,
    /// Split: the binary logarithm of the size, modulo 9. Packed: the size minus 1.
    pub size: u8,
    /// The position at which the driver begins.
    pub start: u16,
    /// Which areas the device gets: 0 the correct ones; otherwise areas that overlap or are
    /// outside.
    pub layout: u8,
    /// Added to the correct base.
    pub base_offset: u8,
}

impl FuzzSetup {
    /// Reads the first 6 bytes.
    pub fn read(input: &mut Input<'_>) -> Self {
        Self {
            options: input.u8(),
            size: input.u8(),
            start: input.u16(),
            layout: input.u8(),
            base_offset: input.u8(),
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
            1 << VIRTIO_F_VERSION_1,
        ];
        let chosen = (1..).zip(bits).filter(|(n, _)| self.options >> n & 1 == 1);
        Features(chosen.fold(0, |all, (_, bits)| all | bits))
    }

    /// Whether it is a receiveq.
    pub fn is_rx(self) -> bool {
        self.options & 1 == 1
    }

    /// Whether VIRTIO_F_EVENT_IDX is negotiated.
    pub fn event_idx(self) -> bool {
        self.options >> 1 & 1 == 1
    }

    /// Whether the device gets the correct layout and base.
    pub fn is_consistent(self) -> bool {
        self.layout == 0 && self.base_offset == 0
    }
}

/// New guest memory.
pub fn ram() -> GuestRam {
    GuestRam::with_layout(&LAYOUT).unwrap()
}

/// A queue that a fuzz target serves. One call of `turn` is a turn.
pub trait Turn: DeviceQueue {
    /// Serves the queue once.
    fn turn(&mut self, uplink: &CheckingUplink) -> Result<(), VirtqueueFault>;

    /// Delivers `count` frames of `len` bytes each, as another device's thread does.
    fn push(&mut self, count: usize, len: usize);
}

impl Turn for TxQueue {
    fn turn(&mut self, uplink: &CheckingUplink) -> Result<(), VirtqueueFault> {
        let sent = self.send(Some(uplink))?;
        assert!(sent.chains <= MAX_BURST);
        Ok(())
    }

    fn push(&mut self, _count: usize, _len: usize) {}
}

impl Turn for RxQueue {
    fn turn(&mut self, uplink: &CheckingUplink) -> Result<(), VirtqueueFault> {
        let received = self.receive(uplink, MAX_FRAMES_PER_CALL, 1 << 20)?;
        assert!(received.frames <= MAX_FRAMES_PER_CALL);
        Ok(())
    }

    fn push(&mut self, count: usize, len: usize) {
        let mut bytes = vec![0xa5; len];
        let payload = [GuestSlice::from_private(&mut bytes)];
        let frame = TxFrame {
            header: VnetHeader::default(),
            payload: &payload,
            len,
        };
        if let Ok(pushed) = RxQueue::push(self, &vec![frame; count]) {
            assert!(pushed.frames <= count);
        }
    }
}

/// The device side of a virtqueue.
pub struct DeviceUnderTest<Q> {
    pub ram: GuestRam,
    uplink: CheckingUplink,
    queue: Q,
}

impl<Q: Turn> DeviceUnderTest<Q> {
    /// Starts the device with `extra_features`; `None` when it refuses the virtqueue.
    pub fn new(
        setup: FuzzSetup,
        ram: GuestRam,
        layout: VirtqueueLayout,
        base: u32,
        extra_features: u64,
    ) -> Option<Self> {
        let memory = Arc::new(ram.guest_memory().unwrap());
        let features = Features(setup.features().0 | extra_features);
        let uplink = CheckingUplink::new(features, &memory);
        let queue = Q::new(QueueConfig {
            layout,
            base,
            features,
            memory,
            stats: Arc::new(VringStats::default()),
            record: None,
        });
        Some(Self {
            queue: queue.ok()?,
            uplink,
            ram,
        })
    }

    /// Makes a frame available at the uplink. Operand: its length (2 bytes).
    pub fn feed(&self, input: &mut Input<'_>) {
        let len = self.uplink.features.header_len() + usize::from(input.u16());
        self.uplink.pending.lock().unwrap().push_back(len);
    }

    /// Pushes frames. Operands: their number (1 byte) and their length (2 bytes).
    pub fn push(&mut self, input: &mut Input<'_>) {
        let count = usize::from(input.u8()) % (MAX_BURST + 1);
        self.queue.push(count, usize::from(input.u16()).max(14));
    }

    /// Serves the queue once. A fault ends the turn; later turns must be safe, too.
    pub fn turn(&mut self) {
        let _fault = self.queue.turn(&self.uplink);
    }

    /// Rewinds the queue, so that unused chains are available again. Returns the base.
    pub fn rewind(&mut self) -> u32 {
        self.queue.rewind()
    }

    /// Rebinds the queue to another snapshot of guest memory.
    pub fn rebind(&mut self) {
        let memory = Arc::new(self.ram.guest_memory().unwrap());
        self.queue.rebind(&memory).unwrap();
        *self.uplink.mapped.lock().unwrap() = Mapped::new(&memory);
    }

    /// Enables or disables kicks. Operand: 1 byte, odd to enable.
    pub fn kicks(&mut self, input: &mut Input<'_>) {
        if input.u8() & 1 == 1 {
            let _more = self.queue.enable_kicks();
        } else {
            self.queue.disable_kicks();
        }
    }

    /// Writes guest memory. Operands: the address divided by 4 (2 bytes) and the content (8 bytes).
    /// The write may hit the virtqueue, so the used chains are unknown afterwards.
    pub fn write_memory(&self, input: &mut Input<'_>) {
        let addr = 4 * u64::from(input.u16());
        self.ram.write(addr, &input.array::<8>()).unwrap();
    }
}

/// The fields of a descriptor.
pub struct DescriptorFields {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
    /// Whether the buffer certainly does not overlap the virtqueue.
    pub is_outside_ring: bool,
}

/// Reads a descriptor of 7 bytes: the kind (1) and offset (2) of its address, its length (2; from
/// 0x8000 on in units of 128 KiB), its flags (1), and its next or id (1).
pub fn fields(input: &mut Input<'_>) -> DescriptorFields {
    let kind = input.u8();
    let offset = u64::from(input.u16());
    let addr = match kind % 8 {
        0..=2 => DATA + offset,
        3 => TABLE + offset,
        // The virtqueue.
        4 => 0x1000 + offset % 0x2000,
        // Around the boundary of two regions, and around the start of the hole.
        5 => REGION_BOUNDARY - 0x8000 + offset,
        6 => GAP_START - 0x8000 + offset,
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
    DescriptorFields {
        addr,
        len,
        flags,
        next,
        is_outside_ring: !matches!(kind % 8, 4 | 7),
    }
}

/// The layout that the device gets for a virtqueue of `size` descriptors at `at`.
pub fn layout(
    setup: FuzzSetup,
    ram: &GuestRam,
    at: VirtqueueAddresses,
    size: u16,
) -> VirtqueueLayout {
    let user = |addr| ram.user_addr(addr).unwrap();
    let good = VirtqueueLayout {
        size,
        desc: user(at.descriptors),
        avail: user(at.driver),
        used: user(at.device),
    };
    match setup.layout % 8 {
        0 => good,
        1 => VirtqueueLayout {
            used: good.desc,
            ..good
        },
        2 => VirtqueueLayout {
            avail: good.used,
            ..good
        },
        3 => VirtqueueLayout {
            used: good.avail & !3,
            ..good
        },
        4 => VirtqueueLayout {
            desc: good.desc + 8,
            ..good
        },
        5 => VirtqueueLayout {
            used: user(0x3_fff0),
            ..good
        },
        6 => VirtqueueLayout {
            avail: u64::MAX - 1,
            ..good
        },
        _ => VirtqueueLayout { size: 3, ..good },
    }
}
