//! The `vhost` crate's front-end as a client, which checks that another implementation interprets
//! the protocol in the same way.
#![cfg(test)]

#[path = "common/device.rs"]
mod device;
#[path = "common/front_end.rs"]
mod front_end;

use std::io::Read;
use std::os::fd::AsRawFd;

use device::{BASE, Device, FEATURES, send, session};
use front_end::{bring_up, guest_file, region, start};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtionet_vhost_user::SessionEnd;
use virtionet_vhost_user::protocol_features::{VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES};

#[test]
fn queue_pair_can_be_started_and_stopped_twice() {
    let device = Device::default();
    let ended = session(&device, |stream| {
        let mut front_end = bring_up(stream);
        let rings =
            |device: &Device| -> Vec<u16> { device.0.lock().unwrap().keys().copied().collect() };
        assert_eq!(rings(&device), [0, 1]);
        {
            let running = device.0.lock().unwrap();
            let ring = &running[&1];
            assert_eq!(
                (ring.layout.size, ring.layout.desc, ring.base),
                (256, 0x4000, 5)
            );
            assert_eq!((ring.layout.avail, ring.layout.used), (0x5000, 0x6000));
            assert!(ring.enabled && ring.kick.is_some() && ring.call.is_some());
        }
        front_end.set_vring_enable(1, false).unwrap();
        assert!(!device.0.lock().unwrap()[&1].enabled);
        assert_eq!(front_end.get_max_mem_slots().unwrap(), 509);
        let file = guest_file();
        front_end.add_mem_region(&region(1 << 30, &file)).unwrap();
        assert!(front_end.add_mem_region(&region(1 << 30, &file)).is_err());
        front_end
            .remove_mem_region(&region(1 << 30, &file))
            .unwrap();
        assert!(
            front_end
                .remove_mem_region(&region(1 << 30, &file))
                .is_err()
        );
        assert_eq!(front_end.get_vring_base(0).unwrap(), BASE);
        assert_eq!(rings(&device), [1]);
        front_end.reset_device().unwrap();
        assert!(rings(&device).is_empty());
        for ring in 0..2 {
            start(&mut front_end, ring);
        }
        assert_eq!(rings(&device), [0, 1]);
        // Features that were not offered are refused, and the front-end sees the refusal.
        assert!(front_end.set_features(u64::MAX).is_err());
    });
    assert_eq!(ended.unwrap(), SessionEnd::Disconnected);
    assert!(device.0.lock().unwrap().is_empty());
}

#[test]
fn log_is_set_refused_and_switched_on() {
    let device = Device::default();
    session(&device, |stream| {
        let front_end = bring_up(stream);
        let file = guest_file();
        let set_log = |mmap_size| {
            let log = VhostUserDirtyLogRegion {
                mmap_size,
                mmap_offset: 0,
                mmap_handle: file.as_raw_fd(),
            };
            front_end.set_log_base(0, Some(log))
        };
        let features = FEATURES | VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL;
        assert!(set_log(0).is_err());
        assert!(front_end.set_features(features).is_err());
        set_log(4096).unwrap();
        front_end.set_features(features).unwrap();
        assert_eq!(device.0.lock().unwrap().len(), 2);
    })
    .unwrap();
}

#[test]
fn requests_sent_before_earlier_replies_are_read_are_answered() {
    let device = Device::default();
    session(&device, |mut stream| {
        let words: Vec<u32> = (0..100).flat_map(|_| [17, 1, 0]).collect();
        send(&stream, &words, &[], &[]);
        let mut replies = [0; 20 * 100];
        stream.read_exact(&mut replies).unwrap();
        for reply in replies.chunks(20) {
            assert_eq!(reply, &replies[..20]);
        }
        assert_eq!(replies[12], 2);
    })
    .unwrap();
}
