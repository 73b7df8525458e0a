//! Each condition of a device is among its warnings for as long as it lasts.

use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};
use virtionet_config::PollMode;
use virtionet_guest::driver::Buf;
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::hostile::forbid_seals;
use virtionet_guest::log_lines::with_log;
use virtionet_guest::test_frontend::TestFrontend;
use virtionet_uplink::null::Null;
use virtionet_vhost_user::{Backend, VringState};
use virtionet_virtqueue::memory::survive_lost_memory;

use super::*;
use crate::testing::{
    TestUplink, net_device, send, sent_frames, two_pairs, wait_until, with_frontend, with_socket,
};

/// Where a second region of guest memory begins.
const PLUGGED_IN: u64 = 1 << 32;

/// The only warning that contains `words`.
fn warning(net_device: &NetDevice, words: &str) -> Option<String> {
    net_device.refresh_placement();
    let mut warnings = net_device.warnings();
    warnings.retain(|warning| warning.contains(words));
    assert!(warnings.len() <= 1, "{warnings:?}");
    warnings.pop()
}

/// Sends a chain of one buffer on queue pair 0.
fn send_buffer(frontend: &mut TestFrontend, address: u64, len: u32) {
    let queue = &mut frontend.pairs[0].tx.queue;
    let buffer = Buf::readable(address, len);
    queue.ring.add(&[buffer], false, 0).unwrap();
    queue.ring.publish();
    queue.kick_now().unwrap();
}

#[test]
fn memory_that_was_plugged_in_without_sharing_it_is_a_warning_that_names_the_remedy() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        assert_eq!(warning(&net_device, "share=on"), None);
        // The guest uses memory that the front-end has not sent.
        send_buffer(frontend, PLUGGED_IN, 100);
        let tx = net_device.pairs().next().unwrap().pair.tx();
        wait_until("the chain is dropped", || {
            tx.stats().address_invalid.get() == 1
        });
        let expected = "the guest uses addresses that are not in the memory shared with virtionetd, and these chains are dropped (address_invalid); if memory was plugged in, plug it in with share=on";
        assert_eq!(warning(&net_device, "share=on").as_deref(), Some(expected));
        // Its other memory is still used, and the warning remains.
        wait_until("the chain is given back", || {
            tx.state() == VringState::Running
        });
        frontend.pairs[0].tx.queue.ring.collect(|_, _| {}).unwrap();
        send(frontend, 0, 3);
        assert_eq!(sent_frames(&net_device), [3, 0]);
        assert!(warning(&net_device, "share=on").is_some());
    });
    assert_eq!(net_device.warnings(), [""; 0]);
    // The next guest has no such memory, although the counter remains.
    with_frontend(&net_device, &two_pairs(), |_| {
        assert_eq!(warning(&net_device, "share=on"), None);
    });
}

#[test]
fn memory_whose_file_shrinks_is_a_warning_and_quarantines_the_ring_that_uses_it() {
    survive_lost_memory().unwrap();
    let net_device = net_device(2, Null, PollMode::Off);
    let mut config = two_pairs();
    config.layout = vec![(0, 8 << 20), (PLUGGED_IN, 4096)];
    with_socket(&net_device, |socket| {
        let connection = FrontendConnection::from_socket(socket).unwrap();
        let frontend = &mut TestFrontend::negotiate(connection, &config).unwrap();
        // The device seals a file against shrinking where it can.
        forbid_seals(frontend.ram().file()).unwrap();
        frontend.start().unwrap();
        send(frontend, 0, 1);
        assert_eq!(warning(&net_device, "vanished"), None);
        frontend.ram().file().set_len(8 << 20).unwrap();
        send_buffer(frontend, PLUGGED_IN, 100);
        let tx = net_device.pairs().next().unwrap().pair.tx();
        wait_until("the ring is quarantined", || {
            tx.state() == VringState::Quarantined
        });
        assert_eq!(tx.stats().memory_lost.get(), 1);
        assert!(warning(&net_device, "pages of the guest's memory have vanished").is_some());
    });
    assert_eq!(net_device.warnings(), [""; 0]);
}

#[test]
fn mtu_that_the_uplink_refuses_is_a_warning_until_the_uplink_takes_it() {
    let uplink = TestUplink::default();
    uplink.max_mtu.store(1500, Ordering::Relaxed);
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        // The front-end is not told, because smaller frames are carried.
        frontend.connection.set_mtu(9000).unwrap();
        assert_eq!(net_device.frontend().mtu, Some(9000));
        let warning_now = || warning(&net_device, "the guest's MTU is 9000, but ");
        assert!(warning_now().unwrap().contains("ip link set t0 mtu 9000"));
        // An uplink that is down is not asked again.
        uplink.is_down.store(true, Ordering::Relaxed);
        uplink.max_mtu.store(9000, Ordering::Relaxed);
        assert!(warning_now().is_some());
        assert_eq!(*uplink.mtus.lock(), [0; 0]);
        uplink.is_down.store(false, Ordering::Relaxed);
        assert!(warning_now().is_none());
        assert_eq!(*uplink.mtus.lock(), [9000]);
        // It is not set again and again.
        assert!(warning_now().is_none());
        assert_eq!(*uplink.mtus.lock(), [9000]);
    });
}

#[test]
fn uplink_that_is_down_is_a_warning_and_one_that_was_reopened_is_set_up_again() {
    let uplink = TestUplink::default();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        frontend.connection.set_mtu(2000).unwrap();
        uplink.is_down.store(true, Ordering::Relaxed);
        let text = warning(&net_device, "TAP t0 is down").unwrap();
        assert!(text.contains("ip link set t0 up"), "{text}");
        assert!(!net_device.is_uplink_up());
        uplink.is_down.store(false, Ordering::Relaxed);
        uplink.is_reopened.store(true, Ordering::Relaxed);
        let (none, log) = with_log(|| warning(&net_device, "t0"));
        assert_eq!(none, None);
        assert!(net_device.is_uplink_up());
        let end = "uplink test:t0 is there again, and its queues were opened again";
        assert!(log.contains(end), "{log}");
        assert_eq!(*uplink.mtus.lock(), [2000, 2000]);
        // One that was deleted and made again between two checks is logged as well.
        uplink.is_reopened.store(true, Ordering::Relaxed);
        let (none, log) = with_log(|| warning(&net_device, "t0"));
        assert_eq!(none, None);
        assert!(
            log.contains("uplink test:t0 was deleted; it is there again"),
            "{log}"
        );
        assert_eq!(*uplink.mtus.lock(), [2000, 2000, 2000]);
        // The queues are attached again by their workers, which were woken.
        uplink.attached.lock().clear();
        uplink.is_reopened.store(true, Ordering::Relaxed);
        assert_eq!(warning(&net_device, "t0"), None);
        wait_until("both queues are attached again", || {
            uplink.attached.lock().values().filter(|is| **is).count() == 2
        });
        send(frontend, 1, 1);
    });
}

#[test]
fn device_without_a_front_end_is_not_checked() {
    let uplink = TestUplink::default();
    uplink.is_down.store(true, Ordering::Relaxed);
    let net_device = net_device(1, uplink, PollMode::Off);
    assert!(!net_device.has_frontend());
    assert_eq!(warning(&net_device, "TAP t0 is down"), None);
    net_device.on_connect(None);
    assert!(net_device.has_frontend());
    assert!(warning(&net_device, "TAP t0 is down").is_some());
    net_device.on_disconnect(None);
    assert!(!net_device.has_frontend());
}

#[test]
fn address_of_another_device_is_a_warning_until_the_conflict_ends() {
    let uplink = TestUplink::default();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |_| {
        assert_eq!(warning(&net_device, "MAC address"), None);
        uplink.has_conflict.store(true, Ordering::Relaxed);
        let text = warning(&net_device, "MAC address 02:00:00:00:00:07").unwrap();
        assert!(
            text.contains("device vnet") && text.contains("device other"),
            "{text}"
        );
        uplink.has_conflict.store(false, Ordering::Relaxed);
        assert_eq!(warning(&net_device, "MAC address"), None);
    });
}

/// A process that is killed at the end.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn front_end_whose_process_is_stopped_is_a_warning_until_it_continues() {
    let net_device = net_device(1, Null, PollMode::Off);
    let process = Process(Command::new("sleep").arg("60").spawn().unwrap());
    let pid = process.0.id();
    net_device.on_connect(Some(pid));
    assert_eq!(warning(&net_device, "is stopped"), None);
    process.signal(Signal::STOP);
    wait_until("the process is stopped", || is_process_stopped(pid));
    let text = warning(&net_device, "is stopped by a signal").unwrap();
    assert!(text.contains(&format!("kill -CONT {pid}")), "{text}");
    process.signal(Signal::CONT);
    wait_until("the process runs", || !is_process_stopped(pid));
    assert_eq!(warning(&net_device, "is stopped"), None);
    net_device.on_disconnect(None);
}

#[test]
fn reason_why_there_is_no_connection_is_a_warning_until_there_is_one() {
    let net_device = net_device(1, Null, PollMode::Off);
    net_device.report_unconnected("no front-end listens on it; start the front-end");
    assert_eq!(
        net_device.warnings(),
        ["no front-end listens on it; start the front-end"]
    );
    net_device.report_connected();
    assert_eq!(net_device.warnings(), [""; 0]);
}

#[test]
fn memory_that_is_not_shared_is_a_warning_until_a_ring_starts() {
    let net_device = net_device(2, Null, PollMode::Off);
    net_device.report_memory_not_shared(&SessionError::NotShared);
    assert_eq!(net_device.warnings(), [SessionError::NotShared.to_string()]);
    with_frontend(&net_device, &two_pairs(), |_| {
        assert_eq!(net_device.warnings(), [""; 0]);
    });
}

#[test]
fn session_errors_are_logged_once_a_second() {
    let net_device = net_device(1, Null, PollMode::Off);
    let ((), log) = with_log(|| {
        for _ in 0..3 {
            net_device.report_session_error(&SessionError::FdLimit);
        }
    });
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(
        log.contains(&format!("vnet: {}", SessionError::FdLimit)),
        "{log}"
    );
}
