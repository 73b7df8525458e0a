//! A front-end that sends raw bytes, and a device that records its calls.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtionet_virtqueue::memory::{GuestMemory, IovaRange};
use virtionet_virtqueue::{VirtqueueError, VirtqueueLayout};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backend::{Backend, UnmappedVring, VringStart};
use crate::backend_error::BackendError;
use crate::error::RefusedRequest;

/// A raw eventfd.
pub(crate) fn eventfd(flags: i32) -> OwnedFd {
    let number = EventFd::new(flags).unwrap().into_raw_fd();
    #[allow(unsafe_code)]
    // SAFETY: the number was just given up by its only owner.
    unsafe {
        OwnedFd::from_raw_fd(number)
    }
}

/// A stop descriptor: the end that triggers it, and the end to wait on.
pub(crate) fn stop_pair() -> (EventFd, OwnedFd) {
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let waited = stop.try_clone().unwrap().into_raw_fd();
    #[allow(unsafe_code)]
    // SAFETY: the number was just given up by its only owner.
    (stop, unsafe { OwnedFd::from_raw_fd(waited) })
}

/// A file of `size` bytes.
pub(crate) fn memory_file(size: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(size).unwrap();
    file
}

/// Converts words to bytes.
pub(crate) fn payload(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A complete message.
pub(crate) fn encode_message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let mut bytes: Vec<u8> = [code, flags, size]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    bytes.extend(payload);
    bytes
}

/// The front-end's end of a socket.
#[derive(Debug)]
pub(crate) struct RawFrontEnd(pub(crate) UnixStream);

impl RawFrontEnd {
    /// This end of a new socket pair, and and the back-end's end.
    pub(crate) fn pair() -> (Self, UnixStream) {
        let (front_end, back_end) = UnixStream::pair().unwrap();
        front_end
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        (Self(front_end), back_end)
    }

    /// Sends bytes and descriptors with one write.
    pub(crate) fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        if bytes.is_empty() {
            return;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(
            &self.0,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        assert_eq!(sent, Ok(bytes.len()));
    }

    /// Sends a request without asking for an acknowledgement.
    pub(crate) fn send_request(&self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(&encode_message(code, 1, payload), fds);
    }

    /// Sends a request and returns the payload of its reply.
    pub(crate) fn request_reply(&self, code: u32, payload: &[u8]) -> [u8; 8] {
        self.send_request(code, payload, &[]);
        self.reply(code)
    }

    /// Sends a request that asks for an acknowledgement, and returns that.
    pub(crate) fn send_with_ack(&self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        self.send(&encode_message(code, 9, payload), fds);
        u64::from_ne_bytes(self.reply(code))
    }

    /// Receives the next reply, which must be to `code`, and returns its payload.
    pub(crate) fn reply(&self, code: u32) -> [u8; 8] {
        let mut bytes = [0; 20];
        (&self.0).read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..12], encode_message(code, 5, &[0; 8])[..12]);
        bytes[12..].try_into().unwrap()
    }
}

/// A device that only records its calls.
#[derive(Debug, Default)]
pub(crate) struct RecordingBackend {
    entries: Mutex<Vec<String>>,
    running: Mutex<std::collections::BTreeMap<u16, VringStart>>,
    stop_base: Option<u32>,
    /// How long it takes to stop a vring.
    stop_time: Duration,
    /// The features that it offers beside [`FEATURES`].
    more_features: u64,
    /// Whether it reads guest address 0 when it stops a vring.
    reads_when_it_stops: bool,
    /// The code of the first refused request of a session that has ended.
    pub(crate) refused: Mutex<Option<&'static str>>,
}

pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 34 | 1;
pub(crate) const QUEUE_PAIRS: u16 = 2;

impl RecordingBackend {
    /// Creates a device whose vrings all stop at `base`.
    pub(crate) fn with_stop_base(base: u32) -> Self {
        Self {
            stop_base: Some(base),
            ..Self::default()
        }
    }

    /// Creates a device that takes this time to stop a vring.
    pub(crate) fn slow_to_stop(stop_time: Duration) -> Self {
        Self {
            stop_time,
            ..Self::default()
        }
    }

    /// Creates a device that also offers `more_features`.
    pub(crate) fn with_features(more_features: u64) -> Self {
        Self {
            more_features,
            ..Self::default()
        }
    }

    /// Creates a device that reads guest address 0 when it stops a vring.
    pub(crate) fn reading_memory_when_it_stops() -> Self {
        Self {
            reads_when_it_stops: true,
            ..Self::default()
        }
    }

    fn write(&self, entry: String) {
        self.entries.lock().unwrap().push(entry);
    }

    /// Returns the entries recorded since the last call.
    pub(crate) fn read(&self) -> Vec<String> {
        std::mem::take(&mut self.entries.lock().unwrap())
    }

    /// The indices of the running vrings.
    pub(crate) fn running(&self) -> Vec<u16> {
        self.running.lock().unwrap().keys().copied().collect()
    }

    /// The configuration with which a running vring was started.
    pub(crate) fn started_with(&self, index: u16) -> VringStart {
        self.running.lock().unwrap()[&index].clone()
    }
}

fn is_outside(memory: &GuestMemory, start: &VringStart) -> bool {
    let layout = start.layout;
    memory.user_array::<u16>(layout.desc, layout.size).is_none()
}

fn outside(layout: VirtqueueLayout) -> VirtqueueError {
    VirtqueueError::Unmapped {
        what: "descriptor area",
        addr: layout.desc,
    }
}

/// Whether there is a descriptor, as a word.
fn fd_presence(fd: Option<&Arc<OwnedFd>>) -> &'static str {
    match fd {
        Some(fd) if fd.as_raw_fd() >= 0 => "fd",
        _ => "none",
    }
}

impl Backend for RecordingBackend {
    fn features(&self) -> u64 {
        FEATURES | self.more_features
    }

    fn max_queue_pairs(&self) -> u16 {
        QUEUE_PAIRS
    }

    fn on_connect(&self, pid: Option<u32>) {
        assert_eq!(pid, Some(std::process::id()));
        self.write("connected".into());
    }

    fn on_resume(&self, pid: Option<u32>) {
        assert_eq!(pid, Some(std::process::id()));
        self.write("resumed".into());
    }

    fn suspend(&self) -> Vec<(u16, u32)> {
        self.write("suspended".into());
        let running = std::mem::take(&mut *self.running.lock().unwrap());
        let base = |start: &VringStart| self.stop_base.unwrap_or(start.base);
        running
            .iter()
            .map(|(index, start)| (*index, base(start)))
            .collect()
    }

    fn set_protocol_features(&self, bits: u64) {
        self.write(format!("negotiated {bits:#x}"));
    }

    fn set_features(&self, acked: u64) {
        self.write(format!("features {acked:#x}"));
    }

    fn set_memory(&self, memory: &Arc<GuestMemory>) -> Vec<UnmappedVring> {
        let logged = if memory.is_logging() { " logged" } else { "" };
        self.write(format!("memory {}{logged}", memory.regions().count()));
        let mut running = self.running.lock().unwrap();
        let is_lost = |start: &VringStart| is_outside(memory, start);
        let lost: Vec<u16> = running
            .iter()
            .filter_map(|(index, start)| is_lost(start).then_some(*index))
            .collect();
        let unmapped = lost.into_iter().filter_map(|index| {
            let start = running.remove(&index)?;
            Some(UnmappedVring {
                index,
                base: self.stop_base.unwrap_or(start.base),
                error: BackendError::VringUnmapped {
                    index,
                    source: outside(start.layout),
                },
            })
        });
        unmapped.collect()
    }

    fn forget_translations(&self, range: IovaRange, _memory: &Arc<GuestMemory>) {
        let all = [0, 0x1000, 0x2000, u64::MAX].map(|addr| range.contains(addr));
        self.write(format!("forget {all:?}"));
    }

    fn on_translations(&self) {
        self.write("translations".into());
    }

    fn start_vring(&self, index: u16, start: VringStart) -> Result<(), BackendError> {
        let layout = start.layout;
        if is_outside(&start.memory, &start) {
            return Err(BackendError::VringConfig {
                index,
                source: outside(layout),
            });
        }
        self.write(format!(
            "start {index} size {} base {} enabled {} kick {} call {}",
            layout.size,
            start.base,
            start.enabled,
            fd_presence(start.kick.as_ref()),
            fd_presence(start.call.as_ref()),
        ));
        assert!(self.running.lock().unwrap().insert(index, start).is_none());
        Ok(())
    }

    fn stop_vring(&self, index: u16) -> Option<u32> {
        self.write(format!("stop {index}"));
        std::thread::sleep(self.stop_time);
        let start = self.running.lock().unwrap().remove(&index)?;
        if self.reads_when_it_stops {
            assert!(start.memory.read(0, &mut [0]));
        }
        Some(self.stop_base.unwrap_or(start.base))
    }

    fn set_used_log(&self, index: u16, used_log: Option<u64>) {
        self.write(format!("used log {index} {used_log:x?}"));
    }

    fn announce(&self, mac: [u8; 6]) {
        self.write(format!("announce {mac:?}"));
    }

    fn set_enabled(&self, index: u16, enabled: bool) {
        self.write(format!("enabled {index} {enabled}"));
    }

    fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError> {
        self.write(format!("kick {index} {}", fd_presence(kick.as_ref())));
        Ok(())
    }

    fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>) {
        self.write(format!("call {index} {}", fd_presence(call.as_ref())));
    }

    fn set_err(&self, index: u16, err: Option<Arc<OwnedFd>>) {
        self.write(format!("err {index} {}", fd_presence(err.as_ref())));
    }

    fn set_mtu(&self, mtu: u16) -> Result<(), BackendError> {
        self.write(format!("mtu {mtu}"));
        if mtu > 9000 {
            let source = io::Error::other(format!("the uplink cannot carry {mtu}"));
            return Err(BackendError::Mtu {
                mtu,
                source: source.into(),
            });
        }
        Ok(())
    }

    fn on_disconnect(&self, refused: Option<&RefusedRequest>) {
        if let Some(refused) = refused {
            *self.refused.lock().unwrap() = Some(refused.error.code());
        }
        self.write("disconnected".into());
    }
}
