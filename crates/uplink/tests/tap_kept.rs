//! TAPs that another program keeps open between two processes of this one.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod host;

use std::os::fd::OwnedFd;

use host::{PacketSocket, eventually, frame, in_namespaces, run, send, wait_for_frame};
use virtionet_uplink::tap::{Tap, TapConfig};
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::uplink::{Uplink, null_rx_sink};

const NAME: &str = "vt0";

fn config() -> TapConfig {
    TapConfig {
        name: NAME.into(),
        bridge: None,
    }
}

fn index() -> String {
    let link = run(&format!("ip -oneline link show {NAME}"));
    link.split(':').next().unwrap().to_owned()
}

/// A TAP that is created, and the file that keeps it. Its only queue is attached if `is_attached`
/// says so, as after a crash.
fn kept_file(is_attached: bool) -> OwnedFd {
    let tap = eventually(|| Tap::open(&config()).ok());
    let queue = tap.open_queue(0, null_rx_sink()).unwrap();
    queue.set_attached(true).unwrap();
    let file = tap.file_to_keep().unwrap().unwrap();
    if is_attached {
        // Without the destructor, which would detach it.
        std::mem::forget((tap, queue));
    }
    file
}

#[test]
fn interface_and_its_addresses_outlive_the_process_that_created_it() {
    in_namespaces(|| {
        let file = kept_file(false);
        run(&format!("ip addr add 192.0.2.1/24 dev {NAME}"));
        let before = index();
        for _ in 0..2 {
            let kept = file.try_clone().unwrap();
            let tap = Tap::from_kept(&config(), kept).unwrap();
            assert!(tap.is_created_by_us());
            assert_eq!(index(), before);
            let queues = [0, 1].map(|pair| tap.open_queue(pair, null_rx_sink()).unwrap());
            for (queue, mark) in queues.iter().zip(1..) {
                queue.set_attached(true).unwrap();
                let socket = PacketSocket::on(NAME);
                let sent = frame(100, mark);
                let stats = send(&**queue, VnetHeader([0; 12]), &sent, 100);
                assert_eq!(stats.frames.get(), 1);
                assert!(socket.next() == sent);
            }
            queues[1].set_attached(false).unwrap();
            PacketSocket::on(NAME).send(&frame(60, 9));
            assert!(!wait_for_frame(&*queues[0]).is_empty());
        }
        let addresses = run(&format!("ip addr show {NAME}"));
        assert!(addresses.contains("192.0.2.1/24"), "{addresses}");
        drop(file);
        eventually(|| (!run("ip -oneline link").contains(NAME)).then_some(()));
    });
}

#[test]
fn queue_that_a_crash_has_left_attached_is_used() {
    in_namespaces(|| {
        let file = kept_file(true);
        let stale = frame(60, 7);
        PacketSocket::on(NAME).send(&stale);
        // The files of the process that crashed are closed with it; here they are still open, and
        // are one with the file that is kept.
        let tap = Tap::from_kept(&config(), file).unwrap();
        let queue = tap.open_queue(0, null_rx_sink()).unwrap();
        queue.set_attached(true).unwrap();
        let fresh = frame(60, 8);
        PacketSocket::on(NAME).send(&fresh);
        eventually(|| {
            let received = wait_for_frame(&*queue);
            assert!(received[12..] != stale);
            (received[12..] == fresh).then_some(())
        });
    });
}

#[test]
fn interface_that_was_deleted_renamed_or_is_shared_is_not_used() {
    in_namespaces(|| {
        let refused = |file: &OwnedFd| {
            let error = Tap::from_kept(&config(), file.try_clone().unwrap());
            error.unwrap_err().to_string()
        };
        let file = kept_file(false);
        run(&format!("ip link set {NAME} down name vt9"));
        assert!(refused(&file).contains(NAME));
        run(&format!("ip link set vt9 name {NAME} up"));
        let other = Tap::from_kept(&config(), file.try_clone().unwrap()).unwrap();
        let _second = other.open_queue(1, null_rx_sink()).unwrap();
        let error = refused(&file);
        assert!(error.contains("another process"), "{error}");
        run(&format!("ip link del {NAME}"));
        assert!(refused(&file).contains(NAME));
    });
}

#[test]
fn interface_of_the_host_needs_not_be_kept() {
    in_namespaces(|| {
        run(&format!(
            "ip tuntap add dev {NAME} mode tap multi_queue vnet_hdr"
        ));
        let tap = eventually(|| Tap::open(&config()).ok());
        assert!(tap.file_to_keep().unwrap().is_none());
    });
}
