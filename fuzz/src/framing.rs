//! A hostile front-end: the input consists of the messages that it writes to the socket.
//!
//! Bits of a header's flags that the protocol reserves describe the file descriptors that come with
//! the message: bits 8 to 13 their number, and bits 16 to 19 their [`FdKind`]. A header may
//! announce more payload than there is. With bit 31 of the first header's flags, the messages pass
//! a real socket; otherwise they are given to the session directly.
//!
//! The back-end consists of real queues in the memory that the front-end shares. Invariants: there
//! is no panic; vrings are started and stopped alternately, with indices that exist; a queue
//! accesses only mapped memory; and no vring runs when the session has ended.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use virtionet_guest::memory::GuestRam;
use virtionet_vhost_user::wire::{HEADER_SIZE, Header, Message};
use virtionet_vhost_user::{
    Backend, BackendError, ForeignFd, Session, SessionLog, UnmappedVring, VringStart, serve,
};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue, TxQueue};
use virtionet_virtqueue::memory::GuestMemory;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::input::Input;
use crate::uplink::{CheckingUplink, Mapped};

/// Number of queue pairs of the device.
const QUEUE_PAIRS: u16 = 2;
/// Size in bytes of the file that the front-end shares.
pub const SHARED_FILE_SIZE: u64 = 0x10_0000;
/// The largest size of an input in bytes. A longer one could cause more replies than a socket can
/// hold unread.
const MAX_INPUT_SIZE: usize = 2048;
/// In the flags of the first header: the messages pass a real socket.
pub const OVER_SOCKET: u32 = 1 << 31;

/// Runs one input.
pub fn run(data: &[u8]) {
    let data = &data[..data.len().min(MAX_INPUT_SIZE)];
    let device = FuzzDevice::default();
    let files = Files::new();
    let flags = data.get(4..8).map_or([0; 4], |f| [f[0], f[1], f[2], f[3]]);
    match u32::from_ne_bytes(flags) & OVER_SOCKET {
        0 => run_in_process(data, &device, &files),
        _ => run_over_socket(data, &device, &files),
    }
    assert!(
        device.vrings.lock().unwrap().is_empty(),
        "a vring still runs after the end of the session"
    );
}

/// A message of the input: its header, as much of its payload as there is, and its file
/// descriptors.
struct InputMessage<'d> {
    bytes: &'d [u8],
    header: [u8; HEADER_SIZE],
    payload: &'d [u8],
    fds: usize,
    kind: FdKind,
}

fn input_messages(data: &[u8]) -> impl Iterator<Item = InputMessage<'_>> {
    let mut input = Input(data);
    std::iter::from_fn(move || {
        if input.is_empty() {
            return None;
        }
        let all = input.0;
        let header: [u8; HEADER_SIZE] = input.array();
        let [_, _, _, _, _, fds, kind, _, ..] = header;
        let size = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let payload = input.bytes(usize::try_from(size).unwrap());
        Some(InputMessage {
            bytes: &all[..all.len() - input.0.len()],
            header,
            payload,
            fds: usize::from(fds % 64),
            kind: FdKind::from(kind),
        })
    })
}

fn run_in_process(data: &[u8], device: &FuzzDevice, files: &Files) {
    let log = SessionLog::default();
    let mut session = Session::new(device, &log);
    for input_message in input_messages(data) {
        let Ok(header) = Header::parse(input_message.header) else {
            break;
        };
        if input_message.payload.len() < header.size {
            break;
        }
        let message = Message {
            header,
            payload: input_message.payload.to_vec(),
            fds: (0..input_message.fds.min(32))
                .map(|_| files.owned(input_message.kind))
                .map(ForeignFd::new)
                .collect(),
        };
        match session.handle(message) {
            Ok(Some(reply)) => assert_eq!(reply.code, header.code),
            Ok(None) => {}
            Err(_) => break,
        }
        device.turn();
    }
    session.stop_all();
}

/// Writes the whole input before the session reads it. The buffer of the socket is larger than any
/// input.
fn run_over_socket(data: &[u8], device: &FuzzDevice, files: &Files) {
    let (front, back) = UnixStream::pair().unwrap();
    for input_message in input_messages(data) {
        let fds: Vec<RawFd> = (0..input_message.fds)
            .map(|_| files.raw(input_message.kind))
            .collect();
        match fds.is_empty() {
            true => (&front).write_all(input_message.bytes).unwrap(),
            false => {
                let sent = front.send_with_fds(&[input_message.bytes], &fds).unwrap();
                assert_eq!(sent, input_message.bytes.len());
            }
        }
    }
    front.shutdown(std::net::Shutdown::Write).unwrap();
    let never = eventfd(0, EventfdFlags::empty()).unwrap();
    let _session_end = serve(back, device, never.as_fd(), None, &SessionLog::default());
}

/// The kind of the file descriptors that come with a message.
#[derive(Debug, Clone, Copy)]
pub enum FdKind {
    /// An eventfd, which most messages carry.
    EventFd,
    /// The file of guest memory.
    Memory,
    /// Another file.
    Null,
}

impl From<u8> for FdKind {
    fn from(bits: u8) -> Self {
        match bits % 16 {
            0 => Self::EventFd,
            1 => Self::Memory,
            _ => Self::Null,
        }
    }
}

/// A file of each kind.
struct Files {
    event: OwnedFd,
    memory: GuestRam,
    null: File,
}

impl Files {
    fn new() -> Self {
        Self {
            event: eventfd(0, EventfdFlags::empty()).unwrap(),
            memory: GuestRam::new(SHARED_FILE_SIZE).unwrap(),
            null: File::open("/dev/null").unwrap(),
        }
    }

    fn raw(&self, kind: FdKind) -> RawFd {
        match kind {
            FdKind::EventFd => self.event.as_raw_fd(),
            FdKind::Memory => self.memory.fd(),
            FdKind::Null => self.null.as_raw_fd(),
        }
    }

    fn owned(&self, kind: FdKind) -> OwnedFd {
        match kind {
            FdKind::EventFd => self.event.try_clone().unwrap(),
            FdKind::Memory => self.memory.file().try_clone().unwrap().into(),
            FdKind::Null => self.null.try_clone().unwrap().into(),
        }
    }
}

/// A queue of either direction.
enum Queue {
    Rx(RxQueue),
    Tx(TxQueue),
}

impl Queue {
    fn new(index: u16, config: QueueConfig) -> Result<Self, virtionet_virtqueue::VirtqueueError> {
        Ok(match index % 2 {
            0 => Self::Rx(RxQueue::new(config)?),
            _ => Self::Tx(TxQueue::new(config)?),
        })
    }

    fn rebind(
        &mut self,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), virtionet_virtqueue::VirtqueueError> {
        match self {
            Self::Rx(rx) => rx.rebind(memory),
            Self::Tx(tx) => tx.rebind(memory),
        }
    }

    fn set_used_log(&mut self, used_log: Option<u64>) {
        match self {
            Self::Rx(rx) => rx.set_used_log(used_log),
            Self::Tx(tx) => tx.set_used_log(used_log),
        }
    }

    fn rewind(&mut self) -> u32 {
        match self {
            Self::Rx(rx) => rx.rewind(),
            Self::Tx(tx) => tx.rewind(),
        }
    }

    fn turn(&mut self, uplink: &CheckingUplink) {
        match self {
            Self::Rx(rx) => {
                uplink.pending.lock().unwrap().push_back(100);
                let _fault = rx.receive(uplink, 4, 1 << 20);
            }
            Self::Tx(tx) => {
                let _fault = tx.send(Some(uplink));
            }
        }
    }
}

/// The device with its running vrings.
#[derive(Default)]
struct FuzzDevice {
    vrings: Mutex<BTreeMap<u16, (Queue, CheckingUplink)>>,
}

impl FuzzDevice {
    fn turn(&self) {
        for (queue, uplink) in self.vrings.lock().unwrap().values_mut() {
            queue.turn(uplink);
        }
    }

    fn assert_known(&self, index: u16) {
        assert!(index < 2 * QUEUE_PAIRS, "vring {index} does not exist");
    }
}

impl Backend for FuzzDevice {
    fn features(&self) -> u64 {
        Features::offered().0
    }

    fn max_queue_pairs(&self) -> u16 {
        QUEUE_PAIRS
    }

    fn set_features(&self, acked: u64) {
        assert_eq!(acked & !self.features(), 0);
    }

    /// No session of this fuzz target is suspended.
    fn suspend(&self) -> Vec<(u16, u32)> {
        Vec::new()
    }

    fn set_memory(&self, memory: &Arc<GuestMemory>) -> Vec<UnmappedVring> {
        let mut unmapped = Vec::new();
        self.vrings
            .lock()
            .unwrap()
            .retain(|index, (queue, uplink)| {
                *uplink.mapped.lock().unwrap() = Mapped::new(memory);
                let Err(source) = queue.rebind(memory) else {
                    return true;
                };
                let index = *index;
                unmapped.push(UnmappedVring {
                    index,
                    base: queue.rewind(),
                    error: BackendError::VringUnmapped { index, source },
                });
                false
            });
        unmapped
    }

    fn start_vring(&self, index: u16, start: VringStart) -> Result<(), BackendError> {
        self.assert_known(index);
        assert!(!start.memory.is_empty());
        assert!((1..=virtionet_virtqueue::MAX_QUEUE_SIZE).contains(&start.layout.size));
        let features = Features(start.features);
        let uplink = CheckingUplink::new(features, &start.memory);
        let config = QueueConfig {
            layout: start.layout,
            base: start.base,
            features,
            memory: start.memory,
            stats: Arc::new(VringStats::default()),
            record: None,
        };
        let queue = Queue::new(index, config)
            .map_err(|source| BackendError::VringConfig { index, source })?;
        let before = self.vrings.lock().unwrap().insert(index, (queue, uplink));
        assert!(before.is_none(), "vring {index} already runs");
        Ok(())
    }

    fn stop_vring(&self, index: u16) -> Option<u32> {
        self.assert_known(index);
        let (mut queue, _) = self.vrings.lock().unwrap().remove(&index)?;
        Some(queue.rewind())
    }

    fn set_used_log(&self, index: u16, used_log: Option<u64>) {
        self.assert_known(index);
        if let Some((queue, _)) = self.vrings.lock().unwrap().get_mut(&index) {
            queue.set_used_log(used_log);
        }
    }

    fn announce(&self, mac: [u8; 6]) {
        assert_eq!(mac[0] & 1, 0, "a group address is announced");
    }

    fn set_enabled(&self, index: u16, _enabled: bool) {
        self.assert_known(index);
    }

    fn set_kick(&self, index: u16, _kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError> {
        self.assert_known(index);
        Ok(())
    }

    fn set_call(&self, index: u16, _call: Option<Arc<OwnedFd>>) {
        self.assert_known(index);
    }

    fn set_err(&self, index: u16, _err: Option<Arc<OwnedFd>>) {
        self.assert_known(index);
    }

    fn set_mtu(&self, mtu: u16) -> Result<(), BackendError> {
        assert!(mtu >= 68);
        Ok(())
    }
}
