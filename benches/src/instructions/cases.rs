//! The cases: a guest's driver on one side, the device's part, which is counted, on the other.

use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result, ensure};
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
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue, TxQueue};
use virtionet_virtqueue::memory::GuestSlice;
use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueConfig, VirtqueueLayout};

/// Descriptors of every ring.
const SIZE: u16 = 256;
/// Packets a burst.
const BURST: u16 = 32;
/// Packets a burst where each fills dozens of buffers.
const LARGE_BURST: u16 = 4;
/// From this size on a frame has segments.
const LARGE: usize = 4096;
/// Bytes of a chain where only the ring is looked at.
const CHAIN: u32 = 128;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    /// A ring alone: chains of so many descriptors, or in a table, are taken, completed, published.
    Ring { descriptors: usize, table: bool },
    /// Frames of so many bytes that the guest sends to nowhere.
    Transmit(usize),
    /// Frames of so many bytes, pushed to the guest.
    Push(usize),
    /// Frames of so many bytes from one guest to another, of so many pairs, through a switch.
    Forward { len: usize, pairs: u16 },
    /// Headers only: without offloads, or of a frame with segments.
    Header { segments: bool },
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstructionCase {
    path: Path,
    packed: bool,
}

/// A case made ready.
pub trait CaseRunner {
    /// The driver's part before: offers a burst.
    ///
    /// # Errors
    /// When the driver cannot.
    fn offer(&mut self) -> Result<()>;

    /// The device's part, which is counted; the packets that it did.
    ///
    /// # Errors
    /// When the device fails.
    fn device(&mut self) -> Result<usize>;

    /// The driver's part after: takes back what was used, and looks whether it is right.
    ///
    /// # Errors
    /// When it is not.
    fn collect(&mut self) -> Result<()>;
}

impl InstructionCase {
    /// Every case.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let ring = |descriptors, table| Path::Ring { descriptors, table };
        let forward = |len, pairs| Path::Forward { len, pairs };
        let paths = [
            ring(1, false),
            ring(2, false),
            ring(2, true),
            Path::Transmit(64),
            Path::Transmit(1514),
            Path::Push(64),
            Path::Push(1514),
            Path::Push(65_000),
            forward(64, 1),
            forward(1514, 1),
            forward(64, 4),
        ];
        let mut cases = Vec::new();
        for path in paths {
            cases.extend([false, true].map(|packed| Self { path, packed }));
        }
        for segments in [false, true] {
            cases.push(Self {
                path: Path::Header { segments },
                packed: false,
            });
        }
        cases
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        let format = if self.packed { "packed" } else { "split" };
        match self.path {
            Path::Ring { table: true, .. } => format!("ring, {format}: indirect"),
            Path::Ring { descriptors: 1, .. } => format!("ring, {format}: 1 descriptor"),
            Path::Ring { descriptors, .. } => format!("ring, {format}: {descriptors} descriptors"),
            Path::Transmit(len) => format!("TX to null, {format}: {len} B"),
            Path::Push(len) => format!("RX push, {format}: {len} B"),
            Path::Forward { len, pairs: 1 } => format!("switch, {format}: {len} B"),
            Path::Forward { len, pairs } => format!("switch, {format}: {len} B, {pairs} pairs"),
            Path::Header { segments: false } => "header check: plain".into(),
            Path::Header { segments: true } => "header check: TSO".into(),
        }
    }

    /// The case made ready to run.
    ///
    /// # Errors
    /// When memory or rings cannot be had.
    pub fn prepare(&self) -> Result<Box<dyn CaseRunner>> {
        let features = match self.packed {
            true => MODERN | PACKED,
            false => MODERN,
        };
        Ok(match self.path {
            Path::Ring { descriptors, table } => {
                Box::new(RingOnly::new(features, descriptors, table)?)
            }
            Path::Transmit(len) => {
                let null = Null.open_queue(0, null_rx_sink())?;
                Box::new(Transmit::sending(features, &frame(len)?, null)?)
            }
            Path::Push(len) => Box::new(Push::new(features, len)?),
            Path::Forward { len, pairs } => Box::new(Forward::new(features, len, pairs)?),
            Path::Header { segments } => Box::new(Headers::new(segments)?),
        })
    }
}

/// A ring without a device on it.
struct RingOnly {
    driver: DriverVirtqueue,
    chain: Vec<Buf>,
    table: bool,
    ring: Virtqueue,
    burst: Burst,
    _ram: GuestRam,
}

impl RingOnly {
    fn new(features: u64, descriptors: usize, table: bool) -> Result<Self> {
        let ram = GuestRam::new(1 << 20)?;
        let driver = DriverVirtqueue::new(&ram, DriverVirtqueueConfig::new(SIZE, features))?;
        let buffer = ram.alloc(4096, 4096)?;
        let memory = Arc::new(ram.guest_memory()?);
        let config = VirtqueueConfig {
            layout: layout(&ram, &driver)?,
            base: driver.base(),
            direction: Direction::Readable,
            packed: features & PACKED != 0,
            event_idx: true,
            indirect: true,
            min_len: 12,
        };
        Ok(Self {
            driver,
            chain: vec![Buf::readable(buffer, CHAIN); descriptors],
            table,
            ring: Virtqueue::new(config, &memory)?,
            burst: Burst::new(memory),
            _ram: ram,
        })
    }
}

impl CaseRunner for RingOnly {
    fn offer(&mut self) -> Result<()> {
        for token in 0..BURST {
            self.driver.add(&self.chain, self.table, token.into())?;
        }
        self.driver.publish();
        Ok(())
    }

    fn device(&mut self) -> Result<usize> {
        let taken = self.ring.dequeue(&mut self.burst, MAX_BURST)?;
        self.ring.complete_all(self.burst.chains());
        self.burst.clear();
        black_box(self.ring.publish());
        Ok(taken)
    }

    fn collect(&mut self) -> Result<()> {
        let back = self.driver.collect(|_, _| ())?;
        ensure!(back == BURST, "{back} of {BURST} chains came back");
        Ok(())
    }
}

/// A transmitq and an uplink.
struct Transmit {
    driver: tx::DriverTxQueue,
    device: TxQueue,
    uplink: Arc<dyn UplinkQueue>,
    stats: Arc<VringStats>,
}

impl Transmit {
    fn sending(features: u64, frame: &Frame, uplink: Arc<dyn UplinkQueue>) -> Result<Self> {
        let mut config = net::DriverQueueConfig::new(SIZE, features);
        config.tx_layout = TxLayout::Single;
        let ram = ram(&config)?;
        let mut driver = tx::DriverTxQueue::new(&ram, &config)?;
        driver.prefill(frame)?;
        let stats = Arc::new(VringStats::default());
        Ok(Self {
            device: device(&ram, &driver.queue.ring, features, &stats)?,
            driver,
            // Not to be seen through: in the daemon it may be any.
            uplink: black_box(uplink),
            stats,
        })
    }
}

impl CaseRunner for Transmit {
    fn offer(&mut self) -> Result<()> {
        let queued = self.driver.queue_prefilled(BURST)?;
        ensure!(queued == BURST, "{queued} of {BURST} frames fit the ring");
        self.driver.queue.ring.publish();
        Ok(())
    }

    fn device(&mut self) -> Result<usize> {
        Ok(black_box(self.device.send(Some(&*self.uplink))?).chains)
    }

    fn collect(&mut self) -> Result<()> {
        let back = self.driver.reclaim()?;
        ensure!(back == BURST, "{back} of {BURST} frames were used");
        let sent = self.stats.frames.get();
        ensure!(
            sent.is_multiple_of(BURST.into()) && sent > 0,
            "a frame was refused"
        );
        Ok(())
    }
}

/// A receiveq to which frames are pushed, as a pair has it for a switch.
#[derive(Debug)]
struct Port(Mutex<RxQueue>);

impl RxSink for Port {
    fn push(&self, frames: &[TxFrame<'_>]) {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A broken ring gives no frames to the driver, which looks for them.
        _ = black_box(queue.push(frames));
    }
}

/// A guest that receives.
struct Receiver {
    driver: rx::DriverRxQueue,
    port: Arc<Port>,
}

impl Receiver {
    fn new(features: u64) -> Result<Self> {
        let config = net::DriverQueueConfig::new(SIZE, features);
        let ram = ram(&config)?;
        let mut driver = rx::DriverRxQueue::new(&ram, &config)?;
        driver.fill()?;
        let stats = Arc::new(VringStats::default());
        let queue = device(&ram, &driver.queue.ring, features, &stats)?;
        Ok(Self {
            driver,
            port: Arc::new(Port(Mutex::new(queue))),
        })
    }

    fn receive(&mut self, want: u16, len: usize) -> Result<()> {
        let mut whole = 0;
        let got = self.driver.receive(usize::MAX, |frame| {
            whole += u16::from(frame.len == len);
        })?;
        ensure!(
            got == usize::from(want) && whole == want,
            "{whole} of {want} frames of {len} bytes came, and {got} in all"
        );
        Ok(())
    }
}

/// Frames from nowhere, pushed.
struct Push {
    receiver: Receiver,
    frames: Vec<TxFrame<'static>>,
    len: usize,
}

impl Push {
    fn new(features: u64, len: usize) -> Result<Self> {
        let frame = frame(len)?;
        let burst = if len > LARGE { LARGE_BURST } else { BURST };
        // As a guest has them: by pages. They live until this short-lived process ends.
        let bytes = Box::leak(frame.bytes.into_boxed_slice());
        let segment_list: Vec<_> = bytes
            .chunks_mut(4096)
            .map(GuestSlice::from_private)
            .collect();
        let one = TxFrame {
            header: VnetHeader(frame.header.to_bytes()),
            payload: Box::leak(segment_list.into_boxed_slice()),
            len,
        };
        Ok(Self {
            receiver: Receiver::new(features)?,
            frames: vec![one; burst.into()],
            len,
        })
    }
}

impl CaseRunner for Push {
    fn offer(&mut self) -> Result<()> {
        Ok(())
    }

    fn device(&mut self) -> Result<usize> {
        self.receiver.port.push(&self.frames);
        Ok(self.frames.len())
    }

    fn collect(&mut self) -> Result<()> {
        let want = u16::try_from(self.frames.len())?;
        self.receiver.receive(want, self.len)
    }
}

/// One guest's transmitq, a switch, another guest's receiveq.
struct Forward {
    sender: Transmit,
    receiver: Receiver,
    len: usize,
}

impl Forward {
    /// Both devices have so many pairs; the frames are of one flow, on the first.
    fn new(features: u64, len: usize, pairs: u16) -> Result<Self> {
        let mut receiver = Receiver::new(features)?;
        let there = Arc::clone(&receiver.port) as Arc<dyn RxSink>;
        let switch = Switch::new("count");
        let from = attach_port(&switch, features, pairs, &null_rx_sink())?;
        let to = attach_port(&switch, features, pairs, &Arc::downgrade(&there))?;
        // A frame the other way, so that the switch knows the receiver.
        let mut answer = frame(64)?;
        let (target, source) = answer.bytes[..12].split_at_mut(6);
        target.swap_with_slice(source);
        let mut back = Transmit::sending(features, &answer, to)?;
        back.offer()?;
        back.device()?;
        back.collect()?;
        receiver.receive(0, 64)?;
        Ok(Self {
            sender: Transmit::sending(features, &frame(len)?, from)?,
            receiver,
            len,
        })
    }
}

impl CaseRunner for Forward {
    fn offer(&mut self) -> Result<()> {
        self.sender.offer()
    }

    fn device(&mut self) -> Result<usize> {
        self.sender.device()
    }

    fn collect(&mut self) -> Result<()> {
        self.sender.collect()?;
        self.receiver.receive(BURST, self.len)
    }
}

/// A device's port with its pairs, all of which take frames; `rx` is the first one's receiveq. The
/// first one's way to the switch.
fn attach_port(
    switch: &Arc<Switch>,
    features: u64,
    pairs: u16,
    rx: &Weak<dyn RxSink>,
) -> Result<Arc<dyn UplinkQueue>> {
    let port = switch.add_device_port()?;
    port.set_format(Features(features).format())?;
    let first = port.open_queue(0, Weak::clone(rx))?;
    first.set_attached(true)?;
    for pair in 1..pairs {
        port.open_queue(pair, null_rx_sink())?.set_attached(true)?;
    }
    Ok(first)
}

/// Headers to be checked.
struct Headers {
    header: VnetHeader,
    len: usize,
}

impl Headers {
    fn new(segments: bool) -> Result<Self> {
        let frame = frame(if segments { 65_000 } else { 64 })?;
        Ok(Self {
            header: VnetHeader(frame.header.to_bytes()),
            len: frame.bytes.len(),
        })
    }
}

impl CaseRunner for Headers {
    fn offer(&mut self) -> Result<()> {
        Ok(())
    }

    fn device(&mut self) -> Result<usize> {
        let mut good = 0;
        for _ in 0..BURST {
            let header = black_box(&self.header);
            let checked = header.check(black_box(self.len), black_box(Features(MODERN)));
            good += usize::from(checked.is_ok());
        }
        Ok(good)
    }

    fn collect(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A frame of `len` bytes; a large one asks for segments.
fn frame(len: usize) -> Result<Frame> {
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

/// Guest memory for the queues of this configuration.
fn ram(config: &net::DriverQueueConfig) -> Result<GuestRam> {
    let bytes = config.memory().next_multiple_of(4096);
    Ok(GuestRam::new(bytes + (1 << 16))?)
}

/// A device's queue on a driver's ring.
fn device<Q: DeviceQueue>(
    ram: &GuestRam,
    driver: &DriverVirtqueue,
    features: u64,
    stats: &Arc<VringStats>,
) -> Result<Q> {
    Ok(Q::new(QueueConfig {
        layout: layout(ram, driver)?,
        base: driver.base(),
        features: Features(features),
        memory: Arc::new(ram.guest_memory()?),
        stats: Arc::clone(stats),
    })?)
}

fn layout(ram: &GuestRam, driver: &DriverVirtqueue) -> Result<VirtqueueLayout> {
    let at = driver.addresses();
    let user = |addr| ram.user_addr(addr).context("a ring is not in guest memory");
    Ok(VirtqueueLayout {
        size: driver.size(),
        desc: user(at.descriptors)?,
        avail: user(at.driver)?,
        used: user(at.device)?,
    })
}
