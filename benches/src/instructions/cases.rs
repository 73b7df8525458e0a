//! The cases. In each of them, only the instructions of the device's part are counted.

use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Result, ensure};
use virtionet_guest::driver::{Buf, DriverVirtqueue, DriverVirtqueueConfig};
use virtionet_guest::frame::{Checksum, Frame, FrameSpec, Transport};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{self, MODERN, PACKED, TxLayout};
use virtionet_guest::{rx, tx};
use virtionet_uplink::null::Null;
use virtionet_uplink::switch::Switch;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{MAX_BURST, RxSink, TxFrame, Uplink, UplinkQueue, null_rx_sink};
use virtionet_virtio_net::{RxQueue, TxQueue};
use virtionet_virtqueue::memory::GuestSlice;
use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueConfig};

use super::setup::{create_device_queue, create_ram, virtqueue_layout};

/// Size of every virtqueue.
const QUEUE_SIZE: u16 = 256;
/// Packets in a burst.
const BURST: u16 = 32;
/// Packets in a burst of large frames, each of which fills dozens of buffers.
const LARGE_BURST: u16 = 4;
/// Frames that are longer than this request segmentation offload.
const LARGE: usize = 4096;
/// Bytes of a buffer in the cases of a virtqueue alone.
const BUFFER_LEN: u32 = 128;

/// The part of the data path that is counted. Lengths are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DataPath {
    /// A virtqueue alone: chains of `len` descriptors are dequeued, completed and published.
    Virtqueue { len: usize, indirect: bool },
    /// Frames of this length from the guest to the uplink `null`.
    Transmit(usize),
    /// Frames of this length that an uplink pushes to the guest.
    Push(usize),
    /// Frames from one guest to another through a switch. Each device has `pairs` queue pairs.
    Forward { len: usize, pairs: u16 },
    /// The check of a header, which may request TSO.
    HeaderCheck { has_tso: bool },
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstructionCase {
    path: DataPath,
    packed: bool,
}

/// A case that is ready to run.
pub trait CaseRunner {
    /// The driver's part before the device's part: makes a burst available.
    ///
    /// # Errors
    /// When the burst does not fit the virtqueue.
    fn offer(&mut self) -> Result<()>;

    /// Runs the device's part, which is counted. Returns the number of processed packets.
    ///
    /// # Errors
    /// When the device fails.
    fn run_device(&mut self) -> Result<usize>;

    /// The driver's part after the device's part: collects the used buffers and checks them.
    ///
    /// # Errors
    /// When the used buffers are not as expected.
    fn collect(&mut self) -> Result<()>;
}

impl InstructionCase {
    /// Returns every case.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let virtqueue = |len, indirect| DataPath::Virtqueue { len, indirect };
        let forward = |len, pairs| DataPath::Forward { len, pairs };
        let paths = [
            virtqueue(1, false),
            virtqueue(2, false),
            virtqueue(2, true),
            DataPath::Transmit(64),
            DataPath::Transmit(1514),
            DataPath::Push(64),
            DataPath::Push(1514),
            DataPath::Push(65_000),
            forward(64, 1),
            forward(1514, 1),
            forward(64, 4),
        ];
        let mut cases = Vec::new();
        for path in paths {
            cases.extend([false, true].map(|packed| Self { path, packed }));
        }
        for has_tso in [false, true] {
            cases.push(Self {
                path: DataPath::HeaderCheck { has_tso },
                packed: false,
            });
        }
        cases
    }

    /// Returns the name, which is the key of the committed figure.
    #[must_use]
    pub fn name(&self) -> String {
        let format = if self.packed { "packed" } else { "split" };
        match self.path {
            DataPath::Virtqueue { indirect: true, .. } => format!("ring, {format}: indirect"),
            DataPath::Virtqueue { len: 1, .. } => format!("ring, {format}: 1 descriptor"),
            DataPath::Virtqueue { len, .. } => format!("ring, {format}: {len} descriptors"),
            DataPath::Transmit(len) => format!("TX to null, {format}: {len} B"),
            DataPath::Push(len) => format!("RX push, {format}: {len} B"),
            DataPath::Forward { len, pairs: 1 } => format!("switch, {format}: {len} B"),
            DataPath::Forward { len, pairs } => format!("switch, {format}: {len} B, {pairs} pairs"),
            DataPath::HeaderCheck { has_tso: false } => "header check: plain".into(),
            DataPath::HeaderCheck { has_tso: true } => "header check: TSO".into(),
        }
    }

    /// Creates the guests and the device's part of this case.
    ///
    /// # Errors
    /// When guest memory or a virtqueue cannot be created.
    pub fn prepare(&self) -> Result<Box<dyn CaseRunner>> {
        let features = match self.packed {
            true => MODERN | PACKED,
            false => MODERN,
        };
        Ok(match self.path {
            DataPath::Virtqueue { len, indirect } => {
                Box::new(VirtqueueRunner::new(features, len, indirect)?)
            }
            DataPath::Transmit(len) => {
                let null = Null.open_queue(0, null_rx_sink())?;
                Box::new(TransmitRunner::new(features, &build_frame(len)?, null)?)
            }
            DataPath::Push(len) => Box::new(PushRunner::new(features, len)?),
            DataPath::Forward { len, pairs } => Box::new(ForwardRunner::new(features, len, pairs)?),
            DataPath::HeaderCheck { has_tso } => Box::new(HeaderCheckRunner::new(has_tso)?),
        })
    }
}

/// A virtqueue without a queue of a device.
struct VirtqueueRunner {
    driver: DriverVirtqueue,
    chain: Vec<Buf>,
    indirect: bool,
    virtqueue: Virtqueue,
    burst: Burst,
    _ram: GuestRam,
}

impl VirtqueueRunner {
    fn new(features: u64, descriptors: usize, indirect: bool) -> Result<Self> {
        let ram = GuestRam::new(1 << 20)?;
        let driver = DriverVirtqueue::new(&ram, DriverVirtqueueConfig::new(QUEUE_SIZE, features))?;
        let buffer = ram.alloc(4096, 4096)?;
        let memory = Arc::new(ram.guest_memory()?);
        let config = VirtqueueConfig {
            layout: virtqueue_layout(&ram, &driver)?,
            base: driver.base(),
            direction: Direction::Readable,
            packed: features & PACKED != 0,
            event_idx: true,
            indirect: true,
            min_len: 12,
        };
        Ok(Self {
            driver,
            chain: vec![Buf::readable(buffer, BUFFER_LEN); descriptors],
            indirect,
            virtqueue: Virtqueue::new(config, &memory)?,
            burst: Burst::new(memory),
            _ram: ram,
        })
    }
}

impl CaseRunner for VirtqueueRunner {
    fn offer(&mut self) -> Result<()> {
        for token in 0..BURST {
            self.driver.add(&self.chain, self.indirect, token.into())?;
        }
        self.driver.publish();
        Ok(())
    }

    fn run_device(&mut self) -> Result<usize> {
        let dequeued = self.virtqueue.dequeue(&mut self.burst, MAX_BURST)?;
        self.virtqueue.complete_all(self.burst.chains());
        self.burst.clear();
        black_box(self.virtqueue.publish());
        Ok(dequeued)
    }

    fn collect(&mut self) -> Result<()> {
        let used = self.driver.collect(|_, _| ())?;
        ensure!(used == BURST, "{used} of {BURST} chains were used");
        Ok(())
    }
}

/// A transmitq and an uplink.
struct TransmitRunner {
    driver: tx::DriverTxQueue,
    device: TxQueue,
    uplink: Arc<dyn UplinkQueue>,
    stats: Arc<VringStats>,
}

impl TransmitRunner {
    fn new(features: u64, frame: &Frame, uplink: Arc<dyn UplinkQueue>) -> Result<Self> {
        let mut config = net::DriverQueueConfig::new(QUEUE_SIZE, features);
        config.tx_layout = TxLayout::Single;
        let ram = create_ram(&config)?;
        let mut driver = tx::DriverTxQueue::new(&ram, &config)?;
        driver.prefill(frame)?;
        let stats = Arc::new(VringStats::default());
        Ok(Self {
            device: create_device_queue(&ram, &driver.queue.ring, features, &stats)?,
            driver,
            // In the daemon, the compiler does not know the type of the uplink either.
            uplink: black_box(uplink),
            stats,
        })
    }
}

impl CaseRunner for TransmitRunner {
    fn offer(&mut self) -> Result<()> {
        let queued = self.driver.queue_prefilled(BURST)?;
        ensure!(queued == BURST, "{queued} of {BURST} frames were queued");
        self.driver.queue.ring.publish();
        Ok(())
    }

    fn run_device(&mut self) -> Result<usize> {
        Ok(black_box(self.device.send(Some(&*self.uplink))?).chains)
    }

    fn collect(&mut self) -> Result<()> {
        let used = self.driver.reclaim()?;
        ensure!(used == BURST, "{used} of {BURST} frames were used");
        let sent = self.stats.frames.get();
        ensure!(
            sent.is_multiple_of(BURST.into()) && sent > 0,
            "the device dropped a frame"
        );
        Ok(())
    }
}

/// A receiveq to which a switch pushes frames.
#[derive(Debug)]
struct ReceiveqSink(Mutex<RxQueue>);

impl RxSink for ReceiveqSink {
    fn push(&self, frames: &[TxFrame<'_>]) -> usize {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // After a fault, frames are missing at the driver, which checks that.
        black_box(queue.push(frames)).map_or(0, |pushed| pushed.descriptors_read)
    }
}

/// A guest that receives.
struct Receiver {
    driver: rx::DriverRxQueue,
    sink: Arc<ReceiveqSink>,
}

impl Receiver {
    fn new(features: u64) -> Result<Self> {
        let config = net::DriverQueueConfig::new(QUEUE_SIZE, features);
        let ram = create_ram(&config)?;
        let mut driver = rx::DriverRxQueue::new(&ram, &config)?;
        driver.fill()?;
        let stats = Arc::new(VringStats::default());
        let queue = create_device_queue(&ram, &driver.queue.ring, features, &stats)?;
        Ok(Self {
            driver,
            sink: Arc::new(ReceiveqSink(Mutex::new(queue))),
        })
    }

    /// Checks that the driver receives `expected` frames of `len` bytes, and no others.
    fn receive(&mut self, expected: u16, len: usize) -> Result<()> {
        let mut matching = 0;
        let received = self.driver.receive(usize::MAX, |frame| {
            matching += u16::from(frame.len == len);
        })?;
        ensure!(
            received == usize::from(expected) && matching == expected,
            "the driver received {received} frames, of which {matching} have {len} bytes, instead of {expected}"
        );
        Ok(())
    }
}

/// Frames that are pushed to a receiveq without an uplink.
struct PushRunner {
    receiver: Receiver,
    frames: Vec<TxFrame<'static>>,
    len: usize,
}

impl PushRunner {
    fn new(features: u64, len: usize) -> Result<Self> {
        let frame = build_frame(len)?;
        let burst = if len > LARGE { LARGE_BURST } else { BURST };
        // One segment for each page, as in a guest. The segments live until this short process
        // ends.
        let bytes = Box::leak(frame.bytes.into_boxed_slice());
        let segments: Vec<_> = bytes
            .chunks_mut(4096)
            .map(GuestSlice::from_private)
            .collect();
        let tx_frame = TxFrame {
            header: VnetHeader(frame.header.to_bytes()),
            payload: Box::leak(segments.into_boxed_slice()),
            len,
        };
        Ok(Self {
            receiver: Receiver::new(features)?,
            frames: vec![tx_frame; burst.into()],
            len,
        })
    }
}

impl CaseRunner for PushRunner {
    fn offer(&mut self) -> Result<()> {
        Ok(())
    }

    fn run_device(&mut self) -> Result<usize> {
        self.receiver.sink.push(&self.frames);
        Ok(self.frames.len())
    }

    fn collect(&mut self) -> Result<()> {
        let expected = u16::try_from(self.frames.len())?;
        self.receiver.receive(expected, self.len)
    }
}

/// The transmitq of one guest, a switch, and the receiveq of another guest.
struct ForwardRunner {
    sender: TransmitRunner,
    receiver: Receiver,
    /// The receiver has its port as long as this.
    _receiver_uplink: Arc<dyn UplinkQueue>,
    len: usize,
}

impl ForwardRunner {
    /// All frames belong to one flow, which uses the first queue pair of both devices.
    fn new(features: u64, len: usize, pairs: u16) -> Result<Self> {
        let mut receiver = Receiver::new(features)?;
        let sink = Arc::clone(&receiver.sink) as Arc<dyn RxSink>;
        let switch = Switch::new("count");
        let sender_uplink = attach_port(&switch, features, pairs, &null_rx_sink())?;
        let receiver_uplink = attach_port(&switch, features, pairs, &Arc::downgrade(&sink))?;
        // A frame in the other direction, from which the switch learns the receiver's MAC address.
        let mut reply = build_frame(64)?;
        let (destination, source) = reply.bytes[..12].split_at_mut(6);
        destination.swap_with_slice(source);
        let mut reply_runner = TransmitRunner::new(features, &reply, Arc::clone(&receiver_uplink))?;
        reply_runner.offer()?;
        reply_runner.run_device()?;
        reply_runner.collect()?;
        receiver.receive(0, 64)?;
        Ok(Self {
            sender: TransmitRunner::new(features, &build_frame(len)?, sender_uplink)?,
            receiver,
            _receiver_uplink: receiver_uplink,
            len,
        })
    }
}

impl CaseRunner for ForwardRunner {
    fn offer(&mut self) -> Result<()> {
        self.sender.offer()
    }

    fn run_device(&mut self) -> Result<usize> {
        self.sender.run_device()
    }

    fn collect(&mut self) -> Result<()> {
        self.sender.collect()?;
        self.receiver.receive(BURST, self.len)
    }
}

/// Adds a device's port with attached queue pairs to the switch. Returns the uplink queue of the
/// first queue pair, whose receiveq is `rx`.
fn attach_port(
    switch: &Arc<Switch>,
    features: u64,
    pairs: u16,
    rx: &Weak<dyn RxSink>,
) -> Result<Arc<dyn UplinkQueue>> {
    let port = switch.add_device_port("count")?;
    port.set_format(Features(features).format())?;
    let first = port.open_queue(0, Weak::clone(rx))?;
    first.set_attached(true)?;
    for pair in 1..pairs {
        port.open_queue(pair, null_rx_sink())?.set_attached(true)?;
    }
    Ok(first)
}

/// A header that is checked.
struct HeaderCheckRunner {
    header: VnetHeader,
    len: usize,
}

impl HeaderCheckRunner {
    fn new(has_tso: bool) -> Result<Self> {
        let frame = build_frame(if has_tso { 65_000 } else { 64 })?;
        Ok(Self {
            header: VnetHeader(frame.header.to_bytes()),
            len: frame.bytes.len(),
        })
    }
}

impl CaseRunner for HeaderCheckRunner {
    fn offer(&mut self) -> Result<()> {
        Ok(())
    }

    fn run_device(&mut self) -> Result<usize> {
        let mut valid = 0;
        for _ in 0..BURST {
            let header = black_box(&self.header);
            let checked = header.check(black_box(self.len), black_box(Features(MODERN)));
            valid += usize::from(checked.is_ok());
        }
        Ok(valid)
    }

    fn collect(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Builds a frame of `len` bytes. A large one requests TSO.
fn build_frame(len: usize) -> Result<Frame> {
    let (transport, headers) = match len > LARGE {
        true => (Transport::Tcp, 54),
        false => (Transport::Udp, 42),
    };
    let mut spec = FrameSpec::v4(transport);
    if len > LARGE {
        spec.checksum = Checksum::Partial;
        spec.gso_size = Some(1460);
    }
    Ok(spec.build(&vec![0x5a; len - headers])?)
}
