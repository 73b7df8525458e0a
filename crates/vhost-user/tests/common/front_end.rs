//! The `vhost` crate's front-end.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtionet_vhost_user::protocol_features::{VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES};
use vmm_sys_util::eventfd::EventFd;

use crate::device::FEATURES;

const MEMORY: u64 = 1 << 20;

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

/// Starts the first queue pair, with an acknowledgement for every request.
pub fn bring_up(stream: UnixStream) -> Frontend {
    let mut front_end = Frontend::from_stream(stream, 4);
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front_end.set_owner().unwrap();
    assert_eq!(
        front_end.get_features().unwrap(),
        FEATURES | VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL
    );
    let offered = front_end.get_protocol_features().unwrap();
    assert!(offered.contains(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::STATUS));
    front_end.set_protocol_features(offered).unwrap();
    assert_eq!(front_end.get_queue_num().unwrap(), 2);
    front_end
        .set_features(FEATURES | VHOST_USER_F_PROTOCOL_FEATURES)
        .unwrap();
    let file = guest_file();
    front_end.set_mem_table(&[region(0, &file)]).unwrap();
    for ring in 0..2 {
        start(&mut front_end, ring);
    }
    front_end
}

/// Configures, starts and enables a vring.
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
