//! A device that starts and stops vrings, and sessions with it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use virtionet_vhost_user::{
    Backend, BackendError, SessionEnd, SessionError, SessionLog, UnmappedVring, VringStart, serve,
};
use virtionet_virtqueue::memory::GuestMemory;

/// VIRTIO_F_VERSION_1 and VIRTIO_NET_F_MQ.
pub const FEATURES: u64 = 1 << 32 | 1 << 22;
/// The base at which every vring of the device stops.
pub const BASE: u32 = 77;

/// A device that stores the configuration of each running vring.
#[derive(Debug, Default)]
pub struct Device(pub Mutex<BTreeMap<u16, VringStart>>);

impl Backend for Device {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn max_queue_pairs(&self) -> u16 {
        2
    }

    fn set_features(&self, _acked: u64) {}

    fn suspend(&self) -> Vec<(u16, u32)> {
        let stopped = std::mem::take(&mut *self.0.lock().unwrap());
        stopped.into_keys().map(|index| (index, BASE)).collect()
    }

    fn set_memory(&self, _memory: &Arc<GuestMemory>) -> Vec<UnmappedVring> {
        Vec::new()
    }

    fn start_vring(&self, index: u16, start: VringStart) -> Result<(), BackendError> {
        self.0.lock().unwrap().insert(index, start);
        Ok(())
    }

    fn stop_vring(&self, index: u16) -> Option<u32> {
        self.0.lock().unwrap().remove(&index).map(|_| BASE)
    }

    fn set_used_log(&self, index: u16, used_log: Option<u64>) {
        if let Some(start) = self.0.lock().unwrap().get_mut(&index) {
            start.used_log = used_log;
        }
    }

    fn announce(&self, _mac: [u8; 6]) {}

    fn set_enabled(&self, index: u16, enabled: bool) {
        if let Some(start) = self.0.lock().unwrap().get_mut(&index) {
            start.enabled = enabled;
        }
    }

    fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError> {
        if let Some(start) = self.0.lock().unwrap().get_mut(&index) {
            start.kick = kick;
        }
        Ok(())
    }

    fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>) {
        if let Some(start) = self.0.lock().unwrap().get_mut(&index) {
            start.call = call;
        }
    }

    fn set_err(&self, _index: u16, _err: Option<Arc<OwnedFd>>) {}

    fn set_mtu(&self, _mtu: u16) -> Result<(), BackendError> {
        Ok(())
    }
}

/// Runs a session with a front-end. The session ends when `front_end` returns.
pub fn session(
    device: &Device,
    front_end: impl FnOnce(UnixStream) + Send,
) -> Result<SessionEnd, SessionError> {
    let (front_end_socket, back_end_socket) = UnixStream::pair().unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || front_end(front_end_socket));
        serve(
            back_end_socket,
            device,
            stop.as_fd(),
            None,
            &SessionLog::default(),
        )
    })
}

/// Sends a message and `fds` with one write.
pub fn send(stream: &UnixStream, words: &[u32], payload: &[u8], fds: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(payload);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let data = [std::io::IoSlice::new(&bytes)];
    // The session may have ended already.
    let _ = sendmsg(stream, &data, &mut control, SendFlags::NOSIGNAL);
}
