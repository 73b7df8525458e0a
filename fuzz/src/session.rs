//! A hostile front-end and its guest: whole sequences of requests with descriptors of every kind,
//! on a real socket, to a network device of the daemon with its workers. A second port of its
//! switch pushes frames. Between single requests there are whole set-ups, so that vrings run in most
//! inputs.
//!
//! Invariants: there is no panic in any thread; the session answers each message, or ends, within a
//! bounded time; replies have the protocol's form; after the end of a session no worker runs and
//! the device writes nothing to the vrings; and no descriptor is left open.
//!
//! Input: options (1 byte, see [`Options`]), then steps, each a [`Step`] byte and its operands.

pub mod files;
mod frontend;
pub mod message;

use std::os::fd::AsFd;
use std::sync::{Arc, LazyLock, Once};
use std::thread;
use std::time::{Duration, Instant};

use virtionet_config::PollMode;
use virtionet_net_device::call_watchdog;
use virtionet_net_device::host_cpus::HostCpus;
use virtionet_net_device::net_device::NetDevice;
use virtionet_net_device::placer::Placer;
use virtionet_placement::{Placement, PlacementPlanner};
use virtionet_process::panic_policy;
use virtionet_uplink::switch::Switch;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{MAX_BURST, TxFrame, Uplink, UplinkQueue, null_rx_sink};
use virtionet_virtqueue::memory::{GuestSlice, survive_lost_memory};

use self::files::{Files, RING_DISTANCE, RING_SIZE, RINGS, USED_AREA};
use self::frontend::Frontend;
use self::message::{FEATURES, Message, PACKED, PROTOCOL_FEATURES};
use crate::input::Input;
use crate::requests::*;

/// Number of queue pairs of the device.
const QUEUE_PAIRS: u16 = 2;
/// The most steps of an input.
const MAX_STEPS: usize = 96;
/// How long descriptors may stay open after the end of an input: the thread `closer` closes some.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

static HOST: LazyLock<Arc<HostCpus>> = LazyLock::new(|| Arc::new(HostCpus::read().unwrap()));

/// The bits of the first byte of an input.
#[derive(Debug, Clone, Copy)]
pub struct Options(pub u8);

impl Options {
    /// Packed virtqueues.
    pub const PACKED: u8 = 1;
    /// The device cannot seal the memory, so the front-end can truncate it.
    pub const NO_SEALS: u8 = 2;

    fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }
}

/// The first byte of a step, modulo their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// A request: see [`Message::read`].
    Request,
    /// All requests that negotiate features, share memory and start all vrings; connects if
    /// necessary.
    Start,
    /// The requests that start one vring (1 byte).
    StartVring,
    /// GET_VRING_BASE of one vring (1 byte).
    StopVring,
    /// The guest makes buffers available, and kicks: the vring (1 byte), their number (1 byte),
    /// their length (2 bytes), and a flaw of the last one (1 byte; 0 for none).
    Offer,
    /// The guest kicks a vring (1 byte).
    Kick,
    /// The guest writes 8 bytes to its memory: the offset (3 bytes) and the bytes.
    Write,
    /// Frames arrive: their number (1 byte) and their length (2 bytes).
    Push,
    /// The front-end truncates the file of the memory to a number of pages (1 byte).
    Truncate,
    /// The next interrupt of a vring (1 byte) blocks.
    BlockCalls,
    /// The front-end disconnects, and connects again.
    Reconnect,
    /// The front-end waits (1 byte, in units of 20 µs, modulo 64).
    Wait,
}

const STEPS: [Step; 12] = [
    Step::Request,
    Step::Start,
    Step::StartVring,
    Step::StopVring,
    Step::Offer,
    Step::Kick,
    Step::Write,
    Step::Push,
    Step::Truncate,
    Step::BlockCalls,
    Step::Reconnect,
    Step::Wait,
];

/// Runs one input.
pub fn run(data: &[u8]) {
    static WARM_UP: Once = Once::new();
    WARM_UP.call_once(|| {
        survive_lost_memory().unwrap();
        call_watchdog::start().unwrap();
        // What the process opens once must not count as a leak.
        let start = [0, Step::Start as u8];
        SessionFuzzer::run(&mut Input(&start));
    });
    let before = open_fds();
    SessionFuzzer::run(&mut Input(data));
    let deadline = Instant::now() + CLOSE_LIMIT;
    while open_fds() > before {
        assert!(Instant::now() < deadline, "descriptors are left open");
        thread::sleep(Duration::from_micros(100));
    }
}

/// Number of open descriptors of the process, and one for the folder itself.
fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

struct SessionFuzzer {
    options: Options,
    device: Arc<NetDevice>,
    files: Files,
    /// `None` only between two sessions.
    frontend: Option<Frontend>,
    /// A second port of the switch.
    port: Arc<dyn UplinkQueue>,
    port_stats: VringStats,
}

impl SessionFuzzer {
    fn run(input: &mut Input<'_>) {
        let mut fuzzer = Self::new(Options(input.u8()));
        for _ in 0..MAX_STEPS {
            if input.is_empty() {
                break;
            }
            fuzzer.step(input);
        }
        fuzzer.disconnect();
    }

    fn new(options: Options) -> Self {
        let planner = PlacementPlanner::new(Placement::Auto, HOST.allowed(), None).unwrap();
        let switch = Switch::new("fuzz");
        let uplink = switch.add_device_port("fuzz").unwrap();
        let other = switch.add_device_port("other").unwrap();
        let device = Arc::new(NetDevice::new(
            "fuzz",
            QUEUE_PAIRS,
            Arc::new(uplink),
            Placer::new("fuzz", planner, Arc::clone(&HOST)),
            PollMode::Off,
            Arc::default(),
        ));
        Self {
            options,
            files: Files::new(
                options.has(Options::PACKED),
                !options.has(Options::NO_SEALS),
            ),
            frontend: Some(Frontend::connect(&device)),
            port: other.open_queue(0, null_rx_sink()).unwrap(),
            port_stats: VringStats::default(),
            device,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match STEPS[usize::from(input.u8()) % STEPS.len()] {
            Step::Request => {
                let message = Message::read(input);
                self.send(&message);
                self.wait_until_handled();
            }
            Step::Start => self.start(),
            Step::StartVring => {
                let ring = ring(input);
                self.start_vring(ring);
                self.wait_until_handled();
            }
            Step::StopVring => self.stop_vring(ring(input)),
            Step::Offer => self.offer(input),
            Step::Kick => self.files.kick(ring(input)),
            Step::Write => {
                let [a, b, c] = input.array();
                let offset = u32::from_le_bytes([a, b, c, 0]);
                self.files.write(offset.into(), &input.array::<8>());
            }
            Step::Push => self.push(input),
            Step::Truncate => self.files.truncate(u64::from(input.u8()) * 4096),
            Step::BlockCalls => self.files.block_calls(ring(input)),
            Step::Reconnect => self.reconnect(),
            Step::Wait => {
                thread::sleep(Duration::from_micros(20) * u32::from(input.u8() % 64));
            }
        }
    }

    /// Sends what QEMU sends when it starts the device.
    fn start(&mut self) {
        if !self.frontend.as_ref().is_some_and(Frontend::is_connected) {
            self.reconnect();
        }
        let packed = match self.options.has(Options::PACKED) {
            true => PACKED,
            false => 0,
        };
        for message in [
            Message::new(GET_FEATURES, &[]),
            Message::new(GET_PROTOCOL_FEATURES, &[]),
            Message::number(SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES),
            Message::new(GET_QUEUE_NUM, &[]),
            Message::new(SET_OWNER, &[]),
            Message::number(SET_FEATURES, FEATURES | packed),
            Message::mem_table(),
        ] {
            self.send(&message);
        }
        for ring in 0..RINGS {
            self.start_vring(ring);
        }
        self.wait_until_handled();
    }

    fn send(&mut self, message: &Message) {
        if let Some(frontend) = &mut self.frontend {
            frontend.send(message, &self.files);
        }
    }

    fn wait_until_handled(&mut self) {
        if let Some(frontend) = &mut self.frontend {
            frontend.wait_until_handled();
        }
    }

    fn start_vring(&mut self, ring: usize) {
        self.files.reset_ring(ring);
        let index = u32::try_from(ring).unwrap();
        let base = match self.options.has(Options::PACKED) {
            // The wrap counters of the first lap.
            true => 0x8000_8000,
            false => 0,
        };
        self.send(&Message::state(SET_VRING_NUM, index, RING_SIZE.into()));
        self.send(&Message::state(SET_VRING_BASE, index, base));
        self.send(&Message::vring_addr(index));
        if let Some(frontend) = &mut self.frontend {
            let kick = Message::number(SET_VRING_KICK, index.into());
            frontend.send_fd(&kick, self.files.kicks[ring].as_fd());
            let call = Message::number(SET_VRING_CALL, index.into());
            frontend.send_fd(&call, self.files.calls[ring].as_fd());
        }
        self.send(&Message::state(SET_VRING_ENABLE, index, 1));
    }

    fn stop_vring(&mut self, ring: usize) {
        let index = u32::try_from(ring).unwrap();
        self.send(&Message::state(GET_VRING_BASE, index, 0));
        self.wait_until_handled();
    }

    fn offer(&mut self, input: &mut Input<'_>) {
        let ring = ring(input);
        let count = input.u8() % 64;
        let len = input.u16().into();
        let flaw = input.u8().into();
        for n in 0..=count {
            let flaw = match n == count {
                true => flaw,
                false => 0,
            };
            self.files.offer(ring, len, flaw);
        }
        self.files.kick(ring);
    }

    /// Frames to all ports arrive at the switch.
    fn push(&mut self, input: &mut Input<'_>) {
        let count = usize::from(input.u8()) % MAX_BURST + 1;
        let len = usize::from(input.u16()).max(14);
        let mut bytes = vec![0xff; len];
        let payload = [GuestSlice::from_private(&mut bytes)];
        let frame = TxFrame {
            header: VnetHeader::default(),
            payload: &payload,
            len,
        };
        self.port.transmit(&vec![frame; count], &self.port_stats);
    }

    fn reconnect(&mut self) {
        self.disconnect();
        self.frontend = Some(Frontend::connect(&self.device));
    }

    /// Ends the session, and checks that nothing of it goes on.
    fn disconnect(&mut self) {
        if let Some(frontend) = self.frontend.take() {
            frontend.disconnect();
        }
        assert_eq!(panic_policy::contained_panics(), 0, "a thread panicked");
        let is_open = |device: &NetDevice| device.pairs().any(|pair| pair.worker.is_open());
        assert!(!is_open(&self.device), "a worker has open descriptors");
        let used = |files: &Files| -> Vec<_> {
            let areas = (0..RINGS as u64).map(|ring| RING_DISTANCE * ring + USED_AREA);
            areas.map(|area| files.read(area, 0x1000)).collect()
        };
        let before = used(&self.files);
        (0..RINGS).for_each(|ring| self.files.kick(ring));
        self.push(&mut Input(&[0, 60]));
        assert!(
            used(&self.files) == before,
            "the device has written to a vring after the end of the session"
        );
    }
}

fn ring(input: &mut Input<'_>) -> usize {
    usize::from(input.u8()) % RINGS
}
