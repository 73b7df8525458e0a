//! No descriptor stays open after any connection. The test counts the descriptors of the whole
//! process, so it is the only one of its process.
#![cfg(test)]

#[path = "common/descriptors.rs"]
mod descriptors;
#[path = "common/device.rs"]
mod device;
#[path = "common/front_end.rs"]
mod front_end;

use std::fs::File;
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use descriptors::{assert_open_fds, open_fds};
use device::{Device, send, session};
use front_end::{bring_up, guest_file};
use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::eventfd::EventFd;

#[test]
fn descriptors_of_every_connection_are_closed() {
    let device = Device::default();
    // The first connection opens what stays open for the whole process.
    session(&device, |stream| drop(bring_up(stream))).unwrap();
    thread::sleep(Duration::from_millis(200));
    let before = open_fds();

    for _ in 0..1000 {
        session(&device, drop).unwrap();
    }
    for _ in 0..20 {
        session(&device, |stream| drop(bring_up(stream))).unwrap();
    }
    assert_open_fds(before);

    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let guest = guest_file();
    let zero = File::open("/dev/zero").unwrap();
    let region = [0, 0, 1 << 20, 0, 0].map(u64::to_ne_bytes).concat();
    let held = open_fds();
    // Code, payload and number of descriptors. Each message is repeated within a session, and many
    // of them end it.
    for (code, payload, fds) in [
        (12, vec![0; 8], vec![event.as_fd()]),
        (13, vec![0; 8], vec![event.as_fd()]),
        (14, vec![9, 0, 0, 0, 0, 0, 0, 0], vec![event.as_fd()]),
        (12, vec![0; 8], vec![zero.as_fd()]),
        (12, vec![0; 8], vec![event.as_fd(); 2]),
        (12, vec![0; 7], vec![event.as_fd()]),
        (1, vec![], vec![zero.as_fd(); 32]),
        (1, vec![], vec![zero.as_fd(); 33]),
        (6, vec![0; 16], vec![zero.as_fd()]),
        (5, vec![0; 8], vec![guest.as_fd()]),
        (37, region.clone(), vec![guest.as_fd()]),
        (37, region.clone(), vec![zero.as_fd()]),
        (37, region.clone(), vec![guest.as_fd(); 2]),
        (38, region.clone(), vec![guest.as_fd()]),
        (999, vec![0; 100], vec![guest.as_fd(); 5]),
    ] {
        let size = u32::try_from(payload.len()).unwrap();
        let _ = session(&device, |stream| {
            for _ in 0..50 {
                send(&stream, &[code, 1, size], &payload, &fds);
            }
        });
        eprintln!("after request {code} with {} descriptors", fds.len());
        assert_open_fds(held);
    }
    // The message is never complete.
    let _ = session(&device, |stream| {
        send(&stream, &[12, 1, 8], &[0; 3], &[event.as_fd(); 3]);
    });
    assert_open_fds(held);
    // A descriptor replaced while its vring runs.
    session(&device, |stream| {
        let front_end = bring_up(stream);
        for _ in 0..100 {
            let event = EventFd::new(0).unwrap();
            vhost::VhostBackend::set_vring_call(&front_end, 0, &event).unwrap();
            vhost::VhostBackend::set_vring_kick(&front_end, 0, &event).unwrap();
        }
        // The session holds one descriptor of each kind.
        assert!(open_fds() < held + 20);
    })
    .unwrap();
    assert_open_fds(held);
}
