//! Translations of I/O virtual addresses: misses, updates, invalidations, and front-ends that send
//! wrong ones.

use std::os::fd::BorrowedFd;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use virtionet_guest::iommu::iotlb_message;
use virtionet_virtqueue::memory::Access;

use super::super::iommu::ACCESS_PLATFORM;
use super::*;

const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
const READ_WRITE: u8 = 3;
const PAGE: u64 = 4096;

impl FrontEnd {
    /// Sends SET_BACKEND_REQ_FD, and returns the front-end's end of the channel.
    fn open_channel(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        assert_eq!(self.set_channel(&[theirs.as_fd()]), 0);
        ours
    }

    fn set_channel(&self, fds: &[BorrowedFd<'_>]) -> u64 {
        self.send_u64(Code::SET_PROTOCOL_FEATURES, protocol_features::OFFERED);
        let code = Code::SET_BACKEND_REQ_FD.into();
        self.raw.send_with_ack(code, &[], fds)
    }

    fn negotiate_iommu(&self) {
        self.send_u64(Code::SET_PROTOCOL_FEATURES, protocol_features::OFFERED);
        let features = FEATURES | ACCESS_PLATFORM | VHOST_USER_F_PROTOCOL_FEATURES;
        self.send_u64(Code::SET_FEATURES, features);
    }

    /// Sends NUM, BASE and KICK.
    fn configure_rest(&self, ring: u32, size: u32) {
        self.send_request(Code::SET_VRING_NUM, &payload(&[ring, size]));
        self.send_request(Code::SET_VRING_BASE, &payload(&[ring, 0]));
        self.event(Code::SET_VRING_KICK, ring.into());
    }

    fn iotlb(&self, message: &[u8]) -> u64 {
        self.send_with_ack(Code::IOTLB_MSG, message)
    }

    fn update(&self, iova: u64, size: u64, user_addr: u64) -> u64 {
        self.iotlb(&iotlb_message(iova, size, user_addr, READ_WRITE, UPDATE))
    }
}

/// The address and the permission of the next miss.
fn next_miss(channel: &mut UnixStream) -> (u64, u8) {
    let mut bytes = [0; 44];
    channel.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..12], payload(&[1, 1, 32]));
    assert_eq!(bytes[37], 1, "the type");
    (
        u64::from_ne_bytes(bytes[12..20].try_into().unwrap()),
        bytes[36],
    )
}

/// A session whose device offers VIRTIO_F_ACCESS_PLATFORM.
fn iommu_session(work: impl FnOnce(&FrontEnd, &RecordingBackend) + Send) {
    let backend = RecordingBackend::with_features(ACCESS_PLATFORM);
    session(&backend, |front_end| work(front_end, &backend)).unwrap();
}

#[test]
fn vring_starts_when_the_translations_of_its_areas_have_come() {
    iommu_session(|front_end, backend| {
        let mut channel = front_end.open_channel();
        front_end.negotiate_iommu();
        // The memory has no front-end address below 1 MiB, where the I/O virtual addresses are.
        assert_eq!(front_end.add_memory(1 << 20), 0);
        front_end.configure(0, 256, 7);
        // The areas of this one overlap. They begin on the second page, and end on the third.
        front_end.send_request(Code::SET_VRING_ADDR, &addresses(1, PAGE + 0x800));
        front_end.configure_rest(1, 512);
        front_end.sync();
        assert!(backend.running().is_empty());
        let misses = [(); 4].map(|()| next_miss(&mut channel));
        let wanted = [0, PAGE, 2 * PAGE, 3 * PAGE].map(|iova| (iova, READ_WRITE));
        assert_eq!(misses, wanted);

        let user = |iova| (1 << 20) + iova;
        assert_eq!(front_end.update(PAGE, 2 * PAGE, user(PAGE)), 0);
        assert!(backend.running().is_empty());
        assert_eq!(front_end.update(0, PAGE, user(0)), 0);
        assert_eq!(backend.running(), [0]);
        assert_eq!(front_end.update(3 * PAGE, PAGE, user(3 * PAGE)), 0);
        assert_eq!(backend.running(), [0, 1]);
        let start = backend.started_with(0);
        assert_eq!(start.base, 7);
        let iotlb = start.memory.iotlb().unwrap();
        assert!(iotlb.find(PAGE, Access::ReadWrite).is_some());
        assert_eq!(front_end.base(0), 7);
    });
}

#[test]
fn vring_that_waits_to_start_has_the_base_that_the_front_end_set() {
    iommu_session(|front_end, backend| {
        front_end.negotiate_iommu();
        assert_eq!(front_end.add_memory(1 << 20), 0);
        front_end.configure(0, 256, 7);
        assert_eq!(front_end.base(0), 7);
        assert_eq!(front_end.update(0, 16 * PAGE, 1 << 20), 0);
        assert!(backend.running().is_empty());
    });
}

#[test]
fn miss_that_is_not_answered_is_sent_again() {
    iommu_session(|front_end, _| {
        let mut channel = front_end.open_channel();
        front_end.negotiate_iommu();
        assert_eq!(front_end.add_memory(1 << 20), 0);
        front_end.configure(0, 256, 0);
        let first = next_miss(&mut channel);
        let sent_at = Instant::now();
        assert_eq!(next_miss(&mut channel), first);
        assert!(sent_at.elapsed() > Duration::from_millis(800));
    });
}

#[test]
fn invalidation_is_answered_after_all_vrings_have_dropped_what_they_knew() {
    iommu_session(|front_end, backend| {
        front_end.negotiate_iommu();
        assert_eq!(front_end.add_memory(1 << 20), 0);
        assert_eq!(front_end.update(0, 16 * PAGE, 1 << 20), 0);
        front_end.configure(0, 256, 0);
        front_end.sync();
        let iotlb = Arc::clone(backend.started_with(0).memory.iotlb().unwrap());
        backend.read();
        let invalidate = |iova, size| front_end.iotlb(&iotlb_message(iova, size, 0, 0, INVALIDATE));
        assert_eq!(invalidate(PAGE, PAGE), 0);
        assert_eq!(backend.read(), ["forget [false, true, false, false]"]);
        assert!(iotlb.find(0, Access::Read).is_none());
        // All addresses, as QEMU says it.
        assert_eq!(front_end.update(0, PAGE, 1 << 20), 0);
        backend.read();
        assert_eq!(invalidate(0, 0), 0);
        assert_eq!(backend.read(), ["forget [true, true, true, true]"]);
        assert_eq!(iotlb.counts().entries, 0);
        assert_eq!(backend.running(), [0], "the vring stays started");
    });
}

#[test]
fn update_that_changes_a_translation_makes_the_vrings_drop_the_old_one() {
    iommu_session(|front_end, backend| {
        front_end.negotiate_iommu();
        assert_eq!(front_end.add_memory(1 << 20), 0);
        assert_eq!(front_end.update(0, PAGE, 1 << 20), 0);
        assert_eq!(front_end.update(0, PAGE, 1 << 20), 0);
        backend.read();
        assert_eq!(front_end.update(0, PAGE, (1 << 20) + PAGE), 0);
        assert_eq!(
            backend.read(),
            ["forget [true, false, false, false]", "translations"]
        );
    });
}

#[test]
fn translations_are_forgotten_when_the_last_vring_stops() {
    iommu_session(|front_end, backend| {
        front_end.negotiate_iommu();
        assert_eq!(front_end.add_memory(1 << 20), 0);
        assert_eq!(front_end.update(0, 16 * PAGE, 1 << 20), 0);
        front_end.configure(0, 256, 0);
        front_end.configure(1, 256, 0);
        front_end.sync();
        assert_eq!(backend.running(), [0, 1]);
        let iotlb = Arc::clone(backend.started_with(0).memory.iotlb().unwrap());
        front_end.base(0);
        assert_eq!(iotlb.counts().entries, 1);
        front_end.base(1);
        assert_eq!(iotlb.counts().entries, 0);
        front_end.event(Code::SET_VRING_KICK, 1);
        front_end.sync();
        assert!(backend.running().is_empty());
    });
}

#[test]
fn translation_that_cannot_be_is_refused() {
    iommu_session(|front_end, _| {
        front_end.negotiate_iommu();
        assert_eq!(front_end.add_memory(1 << 20), 0);
        for (iova, size, user_addr) in [
            (0, 0, 1 << 20),
            (u64::MAX, 2, 1 << 20),
            (0, PAGE, 0),
            (0, PAGE, (2 << 20) - 1),
            (0, u64::MAX, 1 << 20),
            (0, PAGE, u64::MAX),
        ] {
            assert_eq!(front_end.update(iova, size, user_addr), 1, "{iova:#x}");
        }
        for (access, kind) in [(0, UPDATE), (4, UPDATE), (1, 1), (1, 4), (1, 0)] {
            let message = iotlb_message(0, PAGE, 1 << 20, access, kind);
            assert_eq!(front_end.iotlb(&message), 1, "{access} {kind}");
        }
        // The session goes on.
        assert_eq!(front_end.update(0, PAGE, 1 << 20), 0);
    });
}

#[test]
fn translation_is_refused_without_an_iommu() {
    let backend = RecordingBackend::with_features(ACCESS_PLATFORM);
    session(&backend, |front_end| {
        front_end.negotiate();
        assert_eq!(front_end.add_memory(1 << 20), 0);
        assert_eq!(front_end.update(0, PAGE, 1 << 20), 1);
    })
    .unwrap();
    let refused = *backend.refused.lock().unwrap();
    assert_eq!(refused, Some("iotlb-without-iommu"));
}

#[test]
fn channel_that_is_no_stream_socket_is_refused() {
    iommu_session(|front_end, _| {
        let (reader, _writer) = std::io::pipe().unwrap();
        let (datagrams, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let event = eventfd(0);
        for fd in [
            reader.as_fd(),
            datagrams.as_fd(),
            tcp.as_fd(),
            event.as_fd(),
        ] {
            assert_eq!(front_end.set_channel(&[fd]), 1);
        }
        front_end.open_channel();
    });
}

#[test]
fn channel_that_nobody_reads_or_that_is_closed_does_not_hold_the_session() {
    iommu_session(|front_end, backend| {
        let channel = front_end.open_channel();
        front_end.negotiate_iommu();
        assert_eq!(front_end.add_memory(1 << 20), 0);
        front_end.configure(0, 256, 0);
        front_end.sync();
        // Nobody reads: more misses than are sent at once, again and again.
        for start in (0..400).map(|n| n * 64 * PAGE) {
            front_end.send_request(Code::SET_VRING_ADDR, &addresses(0, start));
        }
        front_end.sync();
        drop(channel);
        front_end.send_request(Code::SET_VRING_ADDR, &addresses(0, 0));
        thread::sleep(Duration::from_millis(1200));
        front_end.sync();
        assert_eq!(front_end.update(0, 16 * PAGE, 1 << 20), 0);
        assert_eq!(backend.running(), [0]);
    });
}

#[test]
fn running_vring_is_bound_again_when_the_iommu_comes_or_goes() {
    iommu_session(|front_end, backend| {
        front_end.negotiate();
        assert_eq!(front_end.add_memory(0), 0);
        front_end.configure(0, 256, 0);
        front_end.sync();
        assert_eq!(backend.running(), [0]);
        backend.read();
        front_end.negotiate_iommu();
        front_end.sync();
        assert!(backend.read().contains(&"memory 1".to_owned()));
        front_end.negotiate();
        front_end.sync();
        assert!(backend.read().contains(&"memory 1".to_owned()));
        assert_eq!(front_end.update(0, PAGE, 0), 1);
    });
}
