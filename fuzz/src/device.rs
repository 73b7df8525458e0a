//! Two hostile guests on one switch: the first transmits, the second receives. So one input runs
//! through the header's checks, the switch, the software offloads and the delivery to the second
//! guest's buffers. Each guest has a split or a packed virtqueue in a memory of its own. Most
//! chains are valid, and some have one of the [`Flaw`]s.
//!
//! Invariants: there is no panic; the device writes only where a guest's descriptors name memory as
//! writable, and to its own part of the virtqueue; each chain is used once, in order; every chain
//! that was dequeued and every frame that was pushed is counted once, as carried or as lost; the
//! lengths of used buffers are those of the frames; and a frame requests only offloads that the
//! receiver has negotiated.
//!
//! Input: properties of the guests (8 bytes, see [`guest_config`]), then operations, each an [`Op`]
//! byte and its operands.

mod chain;
mod guest;

use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring as ring;
use virtionet_uplink::switch::{Switch, SwitchPort};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::offload::can_pass_unmodified;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{MAX_BURST, RxSink, TxFrame, Uplink, UplinkQueue, null_rx_sink};
use virtionet_virtio_net::{DeviceQueue, RxQueue, TxQueue};
use virtionet_virtqueue::memory::GuestSlice;

use self::chain::{Flaw, Layout, Segment, packet};
use self::guest::{Guest, GuestConfig, MAX_SIZE, Used};
use crate::input::Input;

/// `VRING_DESC_F_WRITE`.
const WRITE: u16 = 2;
/// Counters of a vring that count neither frames nor chains.
const OTHER_COUNTERS: [&str; 15] = [
    "bytes",
    "bursts",
    "kicks",
    "calls",
    "calls_failed",
    "calls_cut_off",
    "rx_starved",
    "head_out_of_range",
    "avail_index_jump",
    "chain_without_end",
    "base_corrected",
    "base_implausible",
    "memory_lost",
    "panics",
    "quarantines",
];

/// The first byte of an operation, modulo their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// The first guest makes a packet available: see [`packet`] and [`Layout::read`].
    Packet,
    /// The second guest makes buffers available: their number (1 byte), the length of each (2
    /// bytes), and see [`Layout::read`].
    Buffers,
    /// The device serves the transmitq.
    Turn,
    /// The same while the transmitq is disabled.
    DisabledTurn,
    /// A guest writes any descriptor: the guest (1 byte) and see [`DeviceFuzzer::descriptor`].
    Descriptor,
    /// A guest makes a head available: the guest (1 byte) and the head (2 bytes). Split only.
    Head,
    /// The available index (split) or the wrap counter (packed): the guest (1 byte) and the index
    /// (2 bytes).
    Disorder,
    /// When a guest wants interrupts: the guest (1 byte), the index (2 bytes), flags (1 byte).
    Event,
    /// Enables or disables kicks: the guest (1 byte, bit 1 to enable).
    Kicks,
    /// Rewinds and rebinds the queue of a guest (1 byte).
    Rebind,
    /// Attaches (odd) or detaches the receiver: 1 byte.
    Attach,
    /// The receiver accepts other offloads from now on: see [`accepted`] (1 byte).
    Format,
}

const OPS: [Op; 12] = [
    Op::Packet,
    Op::Buffers,
    Op::Turn,
    Op::DisabledTurn,
    Op::Descriptor,
    Op::Head,
    Op::Disorder,
    Op::Event,
    Op::Kicks,
    Op::Rebind,
    Op::Attach,
    Op::Format,
];

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let sender = guest_config(&mut input, false);
    let receiver = guest_config(&mut input, true);
    let Some(mut fuzzer) = DeviceFuzzer::new(sender, receiver) else {
        return;
    };
    while !input.is_empty() {
        fuzzer.step(&mut input);
    }
    fuzzer.turn(true);
    fuzzer.check_counters();
}

/// Reads the properties of a guest: format and features (1 byte), the size (1 byte), and where it
/// starts (2 bytes).
fn guest_config(input: &mut Input<'_>, receives: bool) -> GuestConfig {
    let options = input.u8();
    let size = input.u8();
    let start = input.u16();
    let is_set = |n: u8| options >> n & 1 == 1;
    let packed = is_set(0);
    let mut features = match is_set(4) {
        true => 1 << VIRTIO_F_VERSION_1,
        false => 0,
    };
    let chosen = [
        (is_set(0), VIRTIO_F_RING_PACKED),
        (is_set(1), ring::VIRTIO_RING_F_EVENT_IDX),
        (is_set(2), ring::VIRTIO_RING_F_INDIRECT_DESC),
        (is_set(3), net::VIRTIO_NET_F_MRG_RXBUF),
    ];
    for (_, bit) in chosen.iter().filter(|(is_chosen, _)| *is_chosen) {
        features |= 1 << bit;
    }
    features |= match receives {
        true => accepted(options >> 5 | options << 3),
        false => offered(),
    };
    GuestConfig {
        packed,
        event_idx: is_set(1),
        size: match packed {
            false => 2 << (size % 8),
            true => u16::from(size) % MAX_SIZE + 1,
        },
        start,
        features: Features(features),
    }
}

/// The offloads of the sender.
fn offered() -> u64 {
    1 << net::VIRTIO_NET_F_CSUM
        | 1 << net::VIRTIO_NET_F_HOST_TSO4
        | 1 << net::VIRTIO_NET_F_HOST_TSO6
        | 1 << net::VIRTIO_NET_F_HOST_ECN
        | 1 << net::VIRTIO_NET_F_HOST_UFO
}

/// The offloads that the receiver accepts: csum, tso4, tso6, ecn and ufo.
fn accepted(bits: u8) -> u64 {
    let offloads = [
        net::VIRTIO_NET_F_GUEST_CSUM,
        net::VIRTIO_NET_F_GUEST_TSO4,
        net::VIRTIO_NET_F_GUEST_TSO6,
        net::VIRTIO_NET_F_GUEST_ECN,
        net::VIRTIO_NET_F_GUEST_UFO,
    ];
    (0..)
        .zip(offloads)
        .filter(|(n, _)| bits >> n & 1 == 1)
        .fold(0, |all, (_, bit)| all | 1 << bit)
}

/// The receiveq of the second guest, behind the switch.
#[derive(Debug)]
struct Receiver(Mutex<ReceiverState>);

#[derive(Debug)]
struct ReceiverState {
    queue: RxQueue,
    features: Features,
    /// Frames that the switch has pushed while the vring was not quarantined.
    pushed: u64,
    is_quarantined: bool,
}

impl Receiver {
    fn state(&self) -> std::sync::MutexGuard<'_, ReceiverState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RxSink for Receiver {
    fn push(&self, frames: &[TxFrame<'_>]) -> usize {
        let mut state = self.state();
        assert!((1..=MAX_BURST).contains(&frames.len()));
        for frame in frames {
            let total: usize = frame.payload.iter().map(GuestSlice::len).sum();
            assert_eq!(total, frame.len);
            let format = state.features.format();
            assert!(
                can_pass_unmodified(&frame.header, &format),
                "a frame requests an offload that its receiver does not accept"
            );
        }
        if state.is_quarantined {
            return 0;
        }
        state.pushed += u64::try_from(frames.len()).unwrap();
        match state.queue.push(frames) {
            Ok(pushed) => {
                assert!(pushed.frames <= frames.len());
                pushed.descriptors_read
            }
            Err(_) => {
                state.is_quarantined = true;
                0
            }
        }
    }
}

struct DeviceFuzzer {
    sender: Guest,
    receiver: Guest,
    tx: TxQueue,
    rx: Arc<Receiver>,
    tx_stats: Arc<VringStats>,
    rx_stats: Arc<VringStats>,
    /// Chains that the device has dequeued and completed.
    dequeued: usize,
    sent: Used,
    received: Used,
    is_quarantined: bool,
    ports: [SwitchPort; 2],
    uplink: Arc<dyn UplinkQueue>,
    rx_uplink: Arc<dyn UplinkQueue>,
}

impl DeviceFuzzer {
    /// `None` when the device refuses a virtqueue.
    fn new(sender: GuestConfig, receiver: GuestConfig) -> Option<Self> {
        let (sender, receiver) = (Guest::new(sender), Guest::new(receiver));
        let [tx_stats, rx_stats] = [(); 2].map(|()| Arc::new(VringStats::default()));
        let tx = TxQueue::new(sender.queue_config(&tx_stats)).ok()?;
        let rx = RxQueue::new(receiver.queue_config(&rx_stats)).ok()?;
        let rx = Arc::new(Receiver(Mutex::new(ReceiverState {
            queue: rx,
            features: receiver.features(),
            pushed: 0,
            is_quarantined: false,
        })));
        let switch = Switch::new("fuzz");
        let ports = ["sender", "receiver"].map(|name| switch.add_device_port(name).unwrap());
        let sink = Arc::downgrade(&rx);
        let uplink = ports[0].open_queue(0, null_rx_sink()).unwrap();
        let rx_uplink = ports[1].open_queue(0, sink).unwrap();
        ports[0].set_format(sender.features().format()).unwrap();
        ports[1].set_format(receiver.features().format()).unwrap();
        for queue in [&uplink, &rx_uplink] {
            queue.set_attached(true).unwrap();
        }
        Some(Self {
            sender,
            receiver,
            tx,
            rx,
            tx_stats,
            rx_stats,
            dequeued: 0,
            sent: Used::default(),
            received: Used::default(),
            is_quarantined: false,
            ports,
            uplink,
            rx_uplink,
        })
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match OPS[usize::from(input.u8()) % OPS.len()] {
            Op::Packet => self.offer_packet(input),
            Op::Buffers => self.offer_buffers(input),
            Op::Turn => self.turn(true),
            Op::DisabledTurn => self.turn(false),
            Op::Descriptor => self.descriptor(input),
            Op::Head => {
                let guest = self.guest(input);
                guest.offer_head(input.u16());
            }
            Op::Disorder => {
                let guest = self.guest(input);
                guest.disorder(input.u16());
            }
            Op::Event => {
                let guest = self.guest(input);
                guest.set_event(input.u16(), input.u8());
            }
            Op::Kicks => self.kicks(input.u8()),
            Op::Rebind => self.rebind(input.u8()),
            Op::Attach => self.rx_uplink.set_attached(input.u8() & 1 == 1).unwrap(),
            Op::Format => self.set_format(input.u8()),
        }
    }

    fn guest(&mut self, input: &mut Input<'_>) -> &mut Guest {
        match input.u8() & 1 {
            0 => &mut self.sender,
            _ => &mut self.receiver,
        }
    }

    fn offer_packet(&mut self, input: &mut Input<'_>) {
        let packet = packet(input);
        let layout = Layout::read(input);
        let header_len = self.sender.features().header_len();
        let bytes = [&packet.header.0[..header_len], &packet.bytes].concat();
        let len = u32::try_from(bytes.len()).unwrap();
        let addr = self.sender.place(len);
        self.sender.write(addr, &bytes);
        let segments = layout.cut(addr, len, 0);
        self.sender.offer(&segments, layout.indirect, layout.flaw);
    }

    fn offer_buffers(&mut self, input: &mut Input<'_>) {
        let count = input.u8() % 64;
        let len = u32::from(input.u16());
        let layout = Layout::read(input);
        for n in 0..=count {
            let addr = self.receiver.place(len);
            let segments = layout.cut(addr, len, WRITE);
            // At most one of them has a flaw.
            let flaw = match n == count / 2 {
                true => layout.flaw,
                false => Flaw::None,
            };
            self.receiver.offer(&segments, layout.indirect, flaw);
        }
    }

    /// Reads a descriptor: index (1 byte), address (3 bytes; the highest one may lie outside of the
    /// memory), length (2 bytes, in units of 16 from 0x8000 on), flags (1 byte), next or id (1
    /// byte).
    fn descriptor(&mut self, input: &mut Input<'_>) {
        let guest = self.guest(input);
        let index = u16::from(input.u8());
        let [a, b, c] = input.array();
        let addr = u64::from(u32::from_le_bytes([a, b, c & 3, 0]));
        let len = match input.u16() {
            n if n < 0x8000 => u32::from(n),
            n => u32::from(n & 0x7fff) << 4,
        };
        let flags = input.u8().into();
        let segment = Segment { addr, len, flags };
        guest.set_descriptor(index, segment, input.u8().into());
    }

    /// Serves the transmitq once, as a worker does.
    fn turn(&mut self, enabled: bool) {
        if self.is_quarantined {
            return;
        }
        self.sender.before_turn();
        self.receiver.before_turn();
        let uplink = enabled.then_some(&*self.uplink);
        match self.tx.send(uplink) {
            Ok(sent) => {
                assert!(sent.chains <= MAX_BURST);
                self.dequeued += sent.chains;
            }
            Err(_) => self.is_quarantined = true,
        }
        self.collect();
    }

    /// Collects what the device has used, and compares it with what it has counted.
    fn collect(&mut self) {
        let used = self.sender.after_turn();
        self.sent.chains += used.chains;
        self.sent.bytes += used.bytes;
        if self.sender.is_order_known() {
            assert_eq!(self.sent.chains, self.dequeued);
            assert_eq!(self.sent.bytes, 0, "a transmitq's chain has a length");
        }
        let used = self.receiver.after_turn();
        self.received.chains += used.chains;
        self.received.bytes += used.bytes;
        if self.receiver.is_order_known() {
            let header_len = u64::try_from(self.receiver.features().header_len()).unwrap();
            let stats = &self.rx_stats;
            assert_eq!(
                self.received.bytes,
                stats.bytes.get() + header_len * stats.frames.get()
            );
        }
    }

    fn kicks(&mut self, which: u8) {
        let mut state = self.rx.state();
        match (which & 1, which & 2) {
            (0, 0) => self.tx.disable_kicks(),
            (0, _) => drop(self.tx.enable_kicks()),
            (_, 0) => state.queue.disable_kicks(),
            _ => drop(state.queue.enable_kicks()),
        }
    }

    fn rebind(&mut self, which: u8) {
        self.sender.before_turn();
        self.receiver.before_turn();
        if which & 1 == 0 {
            self.sender.note_rewind();
            self.tx.rewind();
            self.tx.rebind(&self.sender.memory()).unwrap();
        } else {
            self.receiver.note_rewind();
            let mut state = self.rx.state();
            state.queue.rewind();
            state.queue.rebind(&self.receiver.memory()).unwrap();
        }
        self.collect();
    }

    fn set_format(&mut self, bits: u8) {
        let mut state = self.rx.state();
        let offloads = accepted(0xff);
        state.features = Features(state.features.0 & !offloads | accepted(bits));
        self.ports[1].set_format(state.features.format()).unwrap();
    }

    /// Every chain and every frame was counted once.
    fn check_counters(&self) {
        let names = VringStats::NAMES.iter().map(|(name, _)| *name);
        let counts = names.zip(self.tx_stats.values());
        let chains: u64 = counts
            .filter(|(name, _)| !OTHER_COUNTERS.contains(name))
            .map(|(_, count)| count)
            .sum();
        assert_eq!(chains, u64::try_from(self.dequeued).unwrap());
        let stats = &self.rx_stats;
        let lost = stats.dropped_no_buffer.get() + stats.dropped_too_long.get();
        assert_eq!(stats.frames.get() + lost, self.rx.state().pushed);
    }
}
