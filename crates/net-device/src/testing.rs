//! What the tests share: a device, an uplink whose behaviour a test decides, and a session with a
//! front-end on a socket pair.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use virtionet_config::PollMode;
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::log_lines::with_log;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_placement::{Placement, PlacementPlanner};
use virtionet_vhost_user::{SessionLog, VringStart, serve};
use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::stats::{VringStats, to_u64};
use virtionet_virtio_net::uplink::{
    AddressConflict, HostInterface, Received, RxSink, TxFrame, Uplink, UplinkChange, UplinkError,
    UplinkQueue,
};
use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::GuestSlice;

use crate::crash_records::CrashRecords;
use crate::host_cpus::HostCpus;
use crate::net_device::NetDevice;
use crate::placer::Placer;
use crate::worker_pool::WorkerPool;

/// The longest time that a test waits for anything.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// An uplink that does what a test asks for, and notes what the device does. Clones are the same
/// uplink.
#[derive(Debug, Clone, Default)]
pub struct TestUplink(Arc<UplinkState>);

/// What a [`TestUplink`] does, and what the device did with it.
#[derive(Debug)]
pub struct UplinkState {
    /// The largest MTU that it takes.
    pub max_mtu: AtomicU16,
    /// The MTUs that it took.
    pub mtus: Mutex<Vec<u16>>,
    /// It carries no frames now.
    pub is_down: AtomicBool,
    /// It was opened again since the last check.
    pub is_reopened: AtomicBool,
    /// Another device has the same MAC address.
    pub has_conflict: AtomicBool,
    /// It refuses further queues.
    pub refuses_queues: AtomicBool,
    /// It refuses what the driver negotiates.
    pub refuses_formats: AtomicBool,
    /// It refuses to attach and detach queues.
    pub refuses_attaching: AtomicBool,
    /// By queue pair: whether its queue is attached.
    pub attached: Mutex<BTreeMap<u16, bool>>,
    /// How often a queue that was attached was detached.
    pub detached: AtomicU16,
    /// The frames that wait in its queue 0, if it has one that can be waited for.
    pub waiting: Option<WaitingFrames>,
    /// It panics when the driver's features are negotiated.
    pub panics: AtomicBool,
    /// How long it takes to transmit a burst, in microseconds.
    pub transmit_micros: AtomicU16,
    /// How often frames were to be transmitted.
    pub bursts: AtomicU16,
    /// Held by a test that blocks a thread in `transmit`.
    pub gate: Mutex<()>,
}

/// Frames that an uplink has received.
#[derive(Debug)]
pub struct WaitingFrames {
    frames: Mutex<VecDeque<Vec<u8>>>,
    readable: OwnedFd,
}

impl Default for UplinkState {
    fn default() -> Self {
        Self {
            max_mtu: AtomicU16::new(u16::MAX),
            mtus: Mutex::default(),
            is_down: AtomicBool::default(),
            is_reopened: AtomicBool::default(),
            has_conflict: AtomicBool::default(),
            refuses_queues: AtomicBool::default(),
            refuses_formats: AtomicBool::default(),
            refuses_attaching: AtomicBool::default(),
            attached: Mutex::default(),
            detached: AtomicU16::default(),
            panics: AtomicBool::default(),
            transmit_micros: AtomicU16::default(),
            bursts: AtomicU16::default(),
            waiting: None,
            gate: Mutex::default(),
        }
    }
}

impl TestUplink {
    /// An uplink from which frames are received, as from a TAP.
    pub fn with_frames() -> Self {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Self(Arc::new(UplinkState {
            waiting: Some(WaitingFrames {
                frames: Mutex::default(),
                readable: eventfd(0, flags).unwrap(),
            }),
            ..UplinkState::default()
        }))
    }

    /// Lets a frame arrive at the uplink.
    pub fn arrive(&self, frame: Vec<u8>) {
        let waiting = self.waiting.as_ref().unwrap();
        waiting.frames.lock().push_back(frame);
        rustix::io::write(&waiting.readable, &1_u64.to_ne_bytes()).unwrap();
    }

    /// The number of frames that have arrived and were not received.
    pub fn waiting_frames(&self) -> usize {
        self.waiting
            .as_ref()
            .map_or(0, |waiting| waiting.frames.lock().len())
    }
}

impl std::ops::Deref for TestUplink {
    type Target = UplinkState;

    fn deref(&self) -> &UplinkState {
        &self.0
    }
}

fn refused() -> io::Error {
    io::Error::from(io::ErrorKind::PermissionDenied)
}

impl Uplink for TestUplink {
    fn open_queue(
        &self,
        pair: u16,
        _rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        if self.refuses_queues.load(Ordering::Relaxed) {
            return Err(UplinkError::Other {
                code: "test-queue-refused",
                source: "it has no queue left; use fewer".into(),
            });
        }
        let uplink = self.clone();
        Ok(Arc::new(TestQueue { uplink, pair }))
    }

    fn set_format(&self, format: FrameFormat) -> Result<(), UplinkError> {
        let is_panicking = self.panics.load(Ordering::Relaxed);
        assert!(!is_panicking, "this panic is part of the test");
        if self.refuses_formats.load(Ordering::Relaxed) {
            return Err(UplinkError::FormatRefused {
                name: self.name(),
                format,
                source: refused(),
            });
        }
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) -> Result<(), UplinkError> {
        let largest = self.max_mtu.load(Ordering::Relaxed);
        if mtu > largest {
            return Err(UplinkError::MtuRefused {
                name: self.name(),
                mtu: largest.into(),
                wanted: mtu.into(),
                source: refused(),
            });
        }
        self.mtus.lock().push(mtu);
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "test"
    }

    fn name(&self) -> String {
        "t0".into()
    }

    fn refresh(&self) -> Result<UplinkChange, UplinkError> {
        if self.is_down.load(Ordering::Relaxed) {
            return Err(UplinkError::TapDown { name: self.name() });
        }
        Ok(match self.is_reopened.swap(false, Ordering::Relaxed) {
            true => UplinkChange::Reopened,
            false => UplinkChange::Unchanged,
        })
    }

    fn address_conflict(&self) -> Option<AddressConflict> {
        let has_conflict = self.has_conflict.load(Ordering::Relaxed);
        has_conflict.then(|| AddressConflict {
            mac: [2, 0, 0, 0, 0, 7],
            users: ["device vnet".into(), "device other".into()],
            switch: self.name(),
        })
    }

    fn host_interface(&self) -> Option<HostInterface> {
        let attached = self.attached.lock();
        let queues = attached.iter().filter_map(|(pair, is)| is.then_some(*pair));
        Some(HostInterface {
            name: self.name(),
            index: 7,
            changes: 0,
            queues: queues.collect(),
        })
    }
}

#[derive(Debug)]
struct TestQueue {
    uplink: TestUplink,
    pair: u16,
}

impl UplinkQueue for TestQueue {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        self.uplink.bursts.fetch_add(1, Ordering::Relaxed);
        let _open = self.uplink.gate.lock();
        let micros = self.uplink.transmit_micros.load(Ordering::Relaxed);
        if micros > 0 {
            std::thread::sleep(Duration::from_micros(micros.into()));
        }
        stats.frames.add(to_u64(frames.len()));
    }

    /// The frames of the tests are small, and so is the header, so they fit the bounce buffer.
    fn receive(&self, buffers: &[GuestSlice<'_>], bounce: &mut [u8]) -> Received {
        assert!(buffers.is_empty());
        let waiting = self.uplink.waiting.as_ref();
        let Some(frame) = waiting.and_then(|waiting| waiting.frames.lock().pop_front()) else {
            return Received::Empty;
        };
        let header = 12;
        bounce[..header].fill(0);
        bounce[header..header + frame.len()].copy_from_slice(&frame);
        Received::Frame(header + frame.len())
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        let waiting = self.uplink.waiting.as_ref()?;
        (self.pair == 0).then(|| waiting.readable.as_fd())
    }

    fn set_attached(&self, attached: bool) -> Result<(), UplinkError> {
        if self.uplink.refuses_attaching.load(Ordering::Relaxed) {
            return Err(UplinkError::QueueAttachFailed {
                name: self.uplink.name(),
                source: refused(),
            });
        }
        let before = self.uplink.attached.lock().insert(self.pair, attached);
        if before == Some(true) && !attached {
            self.uplink.detached.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A device `vnet` with `pairs` queue pairs and an uplink, whose workers run on the last CPU.
pub fn net_device(pairs: u16, uplink: impl Uplink + 'static, poll: PollMode) -> NetDevice {
    net_device_of(Arc::default(), pairs, uplink, poll)
}

/// The same device with workers of `pool`.
pub fn net_device_of(
    pool: Arc<WorkerPool>,
    pairs: u16,
    uplink: impl Uplink + 'static,
    poll: PollMode,
) -> NetDevice {
    let cpus = Arc::new(HostCpus::read().unwrap());
    let cpu = cpus.allowed().last().unwrap();
    let placement = Placement::List(vec![cpu]);
    let planner = PlacementPlanner::new(placement, cpus.allowed(), None)
        .unwrap()
        .with_polling(poll != PollMode::Off);
    let placer = Placer::new("vnet", planner, cpus);
    NetDevice::new("vnet", pairs, Arc::new(uplink), placer, poll, pool)
        .with_crash_records(CrashRecords::in_memory().unwrap())
}

/// The configuration of a front-end with two queue pairs.
pub fn two_pairs() -> TestFrontendConfig {
    TestFrontendConfig::new(2, 64, MODERN)
}

/// Connects a front-end, calls `work` with it, and disconnects it. Returns the log lines of the
/// session's thread.
pub fn with_frontend(
    net_device: &NetDevice,
    config: &TestFrontendConfig,
    work: impl FnOnce(&mut TestFrontend),
) -> String {
    with_socket(net_device, |socket| {
        let mut frontend = TestFrontend::from_socket(socket, config).unwrap();
        // The answer shows that the session has handled all earlier messages.
        frontend.connection.get_features().unwrap();
        work(&mut frontend);
    })
}

/// Serves a front-end that `work` is with its end of the socket. Returns the log lines of the
/// session's thread.
pub fn with_socket(net_device: &NetDevice, work: impl FnOnce(UnixStream)) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    std::thread::scope(|scope| {
        let session = scope.spawn(|| {
            with_log(|| serve(ours, net_device, stop.as_fd(), None, &SessionLog::default()))
        });
        work(theirs);
        let (ended, log) = session.join().unwrap();
        ended.unwrap();
        log
    })
}

/// What the session hands over to start vring `index` of `frontend` from the beginning, without
/// descriptors.
pub fn vring_start(net_device: &NetDevice, frontend: &TestFrontend, index: u16) -> VringStart {
    let setup = &frontend.rings()[usize::from(index)];
    let user = |address| frontend.ram().user_addr(address).unwrap();
    VringStart {
        layout: VirtqueueLayout {
            size: setup.size,
            desc: user(setup.addresses.descriptors),
            avail: user(setup.addresses.driver),
            used: user(setup.addresses.device),
        },
        base: 0,
        first_base: 0,
        used_log: None,
        features: frontend.features(),
        memory: net_device.frontend().memory,
        enabled: true,
        kick: None,
        call: None,
        err: None,
    }
}

/// Sends `count` frames on queue pair `pair`, and waits until the device has used them all.
pub fn send(frontend: &mut TestFrontend, pair: usize, count: usize) {
    let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
    let frames = vec![frame; count];
    frontend.pairs[pair].tx.send_all(&frames, TIMEOUT).unwrap();
    frontend.pairs[pair].tx.drain(TIMEOUT).unwrap();
}

/// The frames that each queue pair has transmitted.
pub fn sent_frames(net_device: &NetDevice) -> Vec<u64> {
    let pairs = net_device.pairs();
    pairs
        .map(|served| served.pair.tx().stats().frames.get())
        .collect()
}

/// Held by each test that starts vCPU threads or relies on there being none, because this process
/// is the front-end of all tests, and each would find the vCPU threads of the others.
pub static ONE_TEST_WITH_VCPUS_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Starts a thread with the name of a vCPU thread of QEMU, and returns its thread id. It runs until
/// the sender is dropped.
pub fn start_vcpu(index: u32) -> (i32, mpsc::Sender<()>, JoinHandle<()>) {
    let (tid_sender, tid) = mpsc::channel();
    let (end, ended) = mpsc::channel::<()>();
    let thread = std::thread::Builder::new().name(format!("CPU {index}/TCG"));
    let thread = thread.spawn(move || {
        tid_sender
            .send(rustix::thread::gettid().as_raw_nonzero().get())
            .unwrap();
        ended.recv().unwrap_err();
    });
    (tid.recv().unwrap(), end, thread.unwrap())
}

/// Waits until `is_done`.
pub fn wait_until(what: &str, is_done: impl Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
