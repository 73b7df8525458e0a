//! A device that starts and stops rings, and the `vhost` crate's front-end against it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtionet_ring::memory::GuestMemory;
use virtionet_session::features::F_PROTOCOL_FEATURES;
use virtionet_session::{Backend, BackendError, Ended, RingStart, SessionError, serve};
use vmm_sys_util::eventfd::EventFd;

/// VIRTIO_F_VERSION_1 and VIRTIO_NET_F_MQ.
pub const FEATURES: u64 = 1 << 32 | 1 << 22;
/// Where every ring of the device stops.
pub const BASE: u32 = 77;
const MEMORY: u64 = 1 << 20;

/// Rings that run, with what they were started with.
#[derive(Debug, Default)]
pub struct Device(pub Mutex<BTreeMap<u16, RingStart>>);

impl Backend for Device {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn max_pairs(&self) -> u16 {
        2
    }

    fn set_features(&self, _acked: u64) {}

    fn set_memory(&self, _memory: &Arc<GuestMemory>) {}

    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), BackendError> {
        self.0.lock().unwrap().insert(index, start);
        Ok(())
    }

    fn stop_ring(&self, index: u16) -> Option<u32> {
        self.0.lock().unwrap().remove(&index).map(|_| BASE)
    }

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

/// An anonymous file as large as the guest's memory.
pub fn guest_file() -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(MEMORY).unwrap();
    file
}

/// A region that is all of `file`.
pub fn region(guest_phys_addr: u64, file: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr,
        memory_size: MEMORY,
        userspace_addr: guest_phys_addr,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

/// Runs a session for as long as `peer` runs on the other end of its socket.
pub fn session(
    device: &Device,
    peer: impl FnOnce(UnixStream) + Send,
) -> Result<Ended, SessionError> {
    let (near, far) = UnixStream::pair().unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || peer(near));
        serve(far, device, stop.as_fd())
    })
}

/// Brings the first pair up; every request is acknowledged.
pub fn bring_up(stream: UnixStream) -> Frontend {
    let mut front_end = Frontend::from_stream(stream, 4);
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front_end.set_owner().unwrap();
    assert_eq!(
        front_end.get_features().unwrap(),
        FEATURES | F_PROTOCOL_FEATURES
    );
    let offered = front_end.get_protocol_features().unwrap();
    assert!(offered.contains(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::STATUS));
    front_end.set_protocol_features(offered).unwrap();
    assert_eq!(front_end.get_queue_num().unwrap(), 2);
    front_end
        .set_features(FEATURES | F_PROTOCOL_FEATURES)
        .unwrap();
    let file = guest_file();
    front_end.set_mem_table(&[region(0, &file)]).unwrap();
    for ring in 0..2 {
        start(&mut front_end, ring);
    }
    front_end
}

/// Configures a ring, starts and enables it.
pub fn start(front_end: &mut Frontend, ring: usize) {
    let event = EventFd::new(0).unwrap();
    let place = u64::try_from(ring).unwrap() * 0x4000;
    let layout = VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: place,
        avail_ring_addr: place + 0x1000,
        used_ring_addr: place + 0x2000,
        log_addr: None,
    };
    front_end.set_vring_num(ring, 256).unwrap();
    front_end.set_vring_addr(ring, &layout).unwrap();
    front_end.set_vring_base(ring, 5).unwrap();
    front_end.set_vring_call(ring, &event).unwrap();
    front_end.set_vring_err(ring, &event).unwrap();
    front_end.set_vring_kick(ring, &event).unwrap();
    front_end.set_vring_enable(ring, true).unwrap();
}

/// A message with `fds`, written at once.
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
